"""The picture of an attack search: how it came to its word, and all words beside each other."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_unlearn.evaluation.attack_search import SearchReport, WordRate

if TYPE_CHECKING:
    from collections.abc import Sequence

SHOWN = 20  # words with a bar
RATE_LABELS = {"break": "unsafe questions answered", "over-refuse": "safe questions refused"}


def write_search_png(file: Path, report: SearchReport) -> None:
    """Draws the curve, with the held-out rates beside it, and the words' rates with their 95 % intervals."""
    from matplotlib.figure import Figure as Canvas  # no pyplot: nothing is left open, and no display is needed

    shown = [word for word in report.words[:SHOWN] if word.rate.value is not None]
    canvas = Canvas(figsize=(8, 5 + 0.22 * len(shown)), dpi=120, layout="constrained")
    above, below = canvas.subplots(2, 1, height_ratios=[4, 1 + 0.22 * len(shown)])
    _draw_curve(above, report)
    _draw_words(below, shown)
    for axes in (above, below):
        axes.grid(alpha=0.3)
    part = file.with_name(f".{file.name}.part.png")
    with warnings.catch_warnings(
        action="ignore", category=UserWarning
    ):  # a word's script may have no letters in the font
        canvas.savefig(part)
    part.replace(file)


def _draw_curve(axes: Any, report: SearchReport) -> None:
    points = [point for point in report.curve if point.rate.value is not None]
    at = [point.answers for point in points]
    axes.plot(at, [point.rate.value for point in points], color="#0072B2", lw=2, label="leading word, in the search")
    axes.fill_between(
        at, [point.rate.low for point in points], [point.rate.high for point in points], color="#0072B2", alpha=0.15
    )
    for before, point in zip([None, *points], points, strict=False):
        if before is None or before.word != point.word:
            axes.annotate(
                _plain(point.word),
                (point.answers, point.rate.value),
                xytext=(3, 4),
                textcoords="offset points",
                fontsize=8,
            )
    ways = (
        ("best", f'"{_plain(report.best)}"', "#D55E00"),
        ("control", "control", "#009E73"),
        ("as_asked", "as asked", "#999999"),
    )
    for place, (way, name, color) in enumerate(ways):
        rate = report.held_out[way]
        if rate.value is None or rate.low is None or rate.high is None:
            continue
        bars = [[rate.value - rate.low], [rate.high - rate.value]]
        x = report.answers * (1 + 0.02 * place)
        axes.errorbar(
            [x], [rate.value], yerr=bars, fmt="o", ms=5, capsize=3, color=color, label=f"{name}, held-out questions"
        )
    axes.set(xlabel="answers asked for", ylabel=RATE_LABELS[report.goal], ylim=(-0.03, 1.1))
    axes.legend(fontsize=8)


def _draw_words(axes: Any, shown: Sequence[WordRate]) -> None:
    names = [f"{_plain(word.word)} (n = {word.rate.n})" for word in shown]
    values = [word.rate.value or 0.0 for word in shown]
    low = [value - (word.rate.low or 0.0) for word, value in zip(shown, values, strict=True)]
    high = [(word.rate.high or 0.0) - value for word, value in zip(shown, values, strict=True)]
    places = range(len(shown))
    axes.barh(places, values, xerr=[low, high], color="#0072B2", error_kw={"lw": 1, "capsize": 2})
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="rate in the search, with 95 % interval", xlim=(0, 1.03))


def _plain(word: str) -> str:
    return word.replace("$", r"\$")  # matplotlib sets what stands between two dollar signs as a formula
