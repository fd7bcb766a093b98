"""The unlearning methods, one file each. A file has the name of its method and is imported when that is used."""

from vlm_unlearn.methods.base import (
    METHODS,
    ForwardRequirements,
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
    method_name,
)

__all__ = [
    "METHODS",
    "ForwardRequirements",
    "LossOutput",
    "Method",
    "ReferenceHidden",
    "ReferenceLogits",
    "ReferenceNLL",
    "ReferenceRequirement",
    "Role",
    "Step",
    "TokenKind",
    "build_method",
    "method_name",
]
