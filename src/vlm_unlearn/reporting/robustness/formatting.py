"""Formats recovered shares, which are not limited to 0 to 100 %."""

from __future__ import annotations

from vlm_unlearn.robustness.results import Recovery


def recovered_percent(recovery: Recovery) -> str:
    """Returns ``"68\u00a0%"`` with a non-breaking space, or ``"undefined"``."""
    return "undefined" if recovery.value is None else f"{_rounded(recovery.value)}\u00a0%"


def recovered_interval(recovery: Recovery) -> str:
    """Returns the 95 % interval in percent, such as ``"[-5, 12]"``, or an empty string."""
    if recovery.low is None or recovery.high is None:
        return ""
    return f"[{_rounded(recovery.low)}, {_rounded(recovery.high)}]"


def _rounded(share: float) -> str:
    return f"{round(100 * share):,}"
