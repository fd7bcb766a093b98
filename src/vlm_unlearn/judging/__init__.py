"""Judges. A judge grades a response with one of four labels, a score, or neither if it fails."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_unlearn.judging.function import FunctionJudge as FunctionJudge
    from vlm_unlearn.judging.function import Judgment as Judgment
    from vlm_unlearn.judging.function import judge as judge

__all__ = ["FunctionJudge", "Judgment", "judge"]


def __getattr__(name: str) -> Any:
    """Imports a name when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vlm_unlearn.judging import function

    return getattr(function, name)
