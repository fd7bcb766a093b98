"""The unlearning methods, one file each. Importing this package registers them all."""

from vlm_unlearn.methods import dpo, gradient_ascent, mixed_sft, npo, po, rmu, rr, simnpo, undial
from vlm_unlearn.methods.base import (
    METHODS,
    LossOutput,
    Method,
    ReferenceHidden,
    ReferenceLogits,
    ReferenceNLL,
    ReferenceRequirement,
    Role,
    Step,
    TokenKind,
    build_method,
)

__all__ = [
    "METHODS",
    "LossOutput",
    "Method",
    "ReferenceRequirement",
    "ReferenceHidden",
    "ReferenceLogits",
    "ReferenceNLL",
    "Role",
    "Step",
    "TokenKind",
    "build_method",
]
_registered = (dpo, gradient_ascent, mixed_sft, npo, po, rmu, rr, simnpo, undial)
