"""The chart of an attack search: the rate of the leading word during the search, and the rates of all words."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_unlearn.evaluation.attack_search import SearchReport, WordRate

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_WORDS = 20  # in the chart; search.json has all words
RATE_LABELS = {"break": "unsafe questions answered", "over-refuse": "safe questions refused"}


def write_search_png(file: Path, report: SearchReport) -> None:
    """Draws the chart into a file.

    The upper plot shows the rate of the leading word during the search and the rates on held-out questions. The lower
    plot shows the rates of the words. All rates have 95 % intervals.
    """
    import matplotlib
    from matplotlib.figure import Figure as Canvas  # without pyplot, which keeps figures open and may need a display

    words = [word for word in report.words[:MAX_WORDS] if word.rate.value is not None]
    temporary_file = file.with_name(f".{file.name}.part.png")
    with (
        matplotlib.rc_context({"text.parse_math": False}),  # dollar signs in a word do not enclose a formula
        warnings.catch_warnings(action="ignore", category=UserWarning),  # the font may lack the letters of a word
    ):
        canvas = Canvas(figsize=(8, 5 + 0.22 * len(words)), dpi=120, layout="constrained")
        curve_axes, word_axes = canvas.subplots(2, 1, height_ratios=[4, 1 + 0.22 * len(words)])
        _draw_curve(curve_axes, report)
        _draw_words(word_axes, words)
        canvas.savefig(temporary_file)
    temporary_file.replace(file)


def _draw_curve(axes: Any, report: SearchReport) -> None:
    points = [point for point in report.curve if point.rate.value is not None]
    answers = [point.answers for point in points]
    low, value, high = ([getattr(point.rate, end) for point in points] for end in ("low", "value", "high"))
    axes.plot(answers, value, color="#0072B2", lw=2, label="leading word, during the search")
    axes.fill_between(answers, low, high, color="#0072B2", alpha=0.15)
    for previous, point in zip([None, *points], points, strict=False):
        if previous is None or previous.word != point.word:
            position = point.answers, point.rate.value
            axes.annotate(point.word, position, xytext=(3, 4), textcoords="offset points", fontsize=8)
    conditions = (
        ("best", f'"{report.best}"', "#D55E00"),
        ("control", "control", "#009E73"),
        ("as_asked", "original wording", "#999999"),
    )
    for index, (condition, name, color) in enumerate(conditions):
        rate = report.held_out[condition]
        if rate.value is None or rate.low is None or rate.high is None:
            continue
        bars = [[rate.value - rate.low], [rate.high - rate.value]]
        appearance = {"fmt": "o", "ms": 5, "capsize": 3, "color": color, "label": f"{name}, held-out questions"}
        axes.errorbar([report.answers * (1 + 0.02 * index)], [rate.value], yerr=bars, **appearance)
    axes.set(xlabel="generated answers", ylabel=RATE_LABELS[report.goal], ylim=(-0.03, 1.1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _draw_words(axes: Any, words: Sequence[WordRate]) -> None:
    values = [word.rate.value or 0.0 for word in words]
    low = [value - (word.rate.low or 0.0) for word, value in zip(words, values, strict=True)]
    high = [(word.rate.high or 0.0) - value for word, value in zip(words, values, strict=True)]
    positions = range(len(words))
    axes.barh(positions, values, xerr=[low, high], color="#0072B2", error_kw={"lw": 1, "capsize": 2})
    axes.set_yticks(positions, [f"{word.word} (n = {word.rate.n})" for word in words], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="rate in the search, with its 95 % interval", xlim=(0, 1.03))
    axes.grid(alpha=0.3)
