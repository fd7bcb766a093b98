"""Wrappers that change any method: prompt decoupling adds a term, and defenses change how the weights are trained.

A defense is one file with the name of the defense, which is imported when it is used.
"""

from vlm_unlearn.methods.wrappers.base import (
    DEFENSES,
    FORGET_ROLES,
    Defense,
    ForgetObjective,
    LatentObjective,
    Weights,
    build_defenses,
)

__all__ = [
    "DEFENSES",
    "FORGET_ROLES",
    "Defense",
    "ForgetObjective",
    "LatentObjective",
    "Weights",
    "build_defenses",
]
