"""Rates, differences and agreement, each with a 95 % interval, and the metrics of evaluations as objects."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_unlearn.metrics.named import ASR as ASR
    from vlm_unlearn.metrics.named import SARR as SARR
    from vlm_unlearn.metrics.named import DegenerateRate as DegenerateRate
    from vlm_unlearn.metrics.named import LabelRate as LabelRate
    from vlm_unlearn.metrics.named import MeanScore as MeanScore
    from vlm_unlearn.metrics.named import RefusalRate as RefusalRate

__all__ = ["ASR", "SARR", "DegenerateRate", "LabelRate", "MeanScore", "RefusalRate"]


def __getattr__(name: str) -> Any:
    """Imports a name when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vlm_unlearn.metrics import named

    return getattr(named, name)
