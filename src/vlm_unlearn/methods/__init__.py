"""The unlearning methods, one file each. A file has the name of its method and is imported when that is used."""

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
    "ReferenceHidden",
    "ReferenceLogits",
    "ReferenceNLL",
    "ReferenceRequirement",
    "Role",
    "Step",
    "TokenKind",
    "build_method",
]
