"""The unlearning methods, one file each. Importing this package registers them all."""

from vlm_unlearn.methods import mixed_sft, npo, po, rmu
from vlm_unlearn.methods.base import METHODS, LossOutput, Method, Need, ReferenceHidden, ReferenceNLL, Role, Step, build_method

__all__ = ["METHODS", "LossOutput", "Method", "Need", "ReferenceHidden", "ReferenceNLL", "Role", "Step", "build_method"]
_registered = (mixed_sft, npo, po, rmu)
