"""Evaluation of a model in three steps: generate, judge, score. `evaluate` runs them on objects in memory."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_unlearn.evaluation.in_memory import evaluate as evaluate
    from vlm_unlearn.evaluation.result import EvaluationResult as EvaluationResult

_MODULES = {"evaluate": "in_memory", "EvaluationResult": "result"}
__all__ = ["EvaluationResult", "evaluate"]


def __getattr__(name: str) -> Any:
    """Imports a name when it is first used, since torch takes seconds to import."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
