"""Loss curves of a training run, as a PNG in the run folder and as charts in the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlm_unlearn.records import PROBE_PREFIX
from vlm_unlearn.reporting.charts.chart import Chart, Lines, Series, style_of
from vlm_unlearn.store import RunDirectory

NOT_A_LOSS = ("step", "grad_norm", "learning_rate", "epoch")
MAX_DRAWABLE = 1e30  # axes and ticks fail for larger numbers
MAX_POINTS = 500  # a line with at least twice as many points is thinned out


def read_log(run: Path) -> list[dict[str, float | None]]:
    """Returns the numbers of each step in a run's ``log.jsonl``, or an empty list if the file does not exist.

    Invalid lines, such as a truncated last line, and lines without a step are skipped. A number that cannot be drawn,
    such as NaN, becomes None.
    """
    file = RunDirectory(run).log_file
    lines = file.read_bytes().splitlines() if file.is_file() else []
    return [numbers for line in lines if (numbers := _numbers(line)).get("step") is not None]


def _numbers(line: bytes) -> dict[str, float | None]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    items = record.items() if isinstance(record, dict) else ()
    # NaN is not less than anything, so it becomes None as well.
    return {name: value if abs(value) < MAX_DRAWABLE else None for name, value in items if type(value) in (int, float)}


def write_loss_png(run: Path) -> Path | None:
    """Draws the total loss, its terms and the probes of a training run into ``loss.png``.

    Returns:
        The file, or None if the run logged no loss.
    """
    log = read_log(run)
    steps = [line for line in log if "loss" in line]
    if not steps:
        return None
    from matplotlib.figure import Figure as Canvas  # without pyplot, which keeps figures open and may need a display

    names = dict.fromkeys(name for line in log for name in line if name.startswith(PROBE_PREFIX))
    probes = [line for line in log if names.keys() & line.keys()]
    canvas = Canvas(figsize=(8, 7 if probes else 4.5), dpi=120, layout="constrained")
    axes = canvas.subplots(2 if probes else 1, 1, squeeze=False)[:, 0]
    for term in _loss_terms(steps):
        width = 2.2 if term == "loss" else 1.2
        axes[0].plot([line["step"] for line in steps], [line.get(term) for line in steps], label=term, lw=width)
    axes[0].set(xlabel="optimizer step", ylabel="loss")
    for name in names:
        axes[1].plot([line["step"] for line in probes], [line.get(name) for line in probes], "o-", ms=3, label=name)
        axes[1].set(xlabel="optimizer step", ylabel="rate", ylim=(-0.03, 1.03))
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    file = RunDirectory(run).loss_plot_file
    temporary_file = file.with_name(f".{file.stem}.part.png")
    canvas.savefig(temporary_file)
    temporary_file.replace(file)
    return file


def loss_charts(runs: Mapping[str, Path], models: Sequence[str]) -> dict[str, Chart]:
    """Returns a chart of the total loss, then one of each loss term, with one line per model.

    Args:
        runs: The training run of each model. Models whose run has no log are skipped.
        models: All models of the report. The position of a model determines its style.
    """
    logs = {
        model: steps for model, run in runs.items() if (steps := [line for line in read_log(run) if "loss" in line])
    }
    charts: dict[str, Chart] = {}
    for term in dict.fromkeys(term for steps in logs.values() for term in _loss_terms(steps)):
        series = []
        for model, steps in logs.items():
            points = [(line["step"], line[term]) for line in steps if line.get(term) is not None]
            points = points[:: max(1, len(points) // MAX_POINTS)]
            if points:
                x, values = zip(*points, strict=True)
                series.append(Series(model, values, (), (), style_of(models.index(model)), x))
        title = "total loss" if term == "loss" else f"loss term {term.replace('_', ' ')}"
        if series:
            charts[f"loss-{len(charts) + 1}"] = Lines(
                f"Training: {title}", series, "optimizer step", "loss", percent=False, markers=False
            )
    return charts


def _loss_terms(steps: Sequence[Mapping[str, float | None]]) -> list[str]:
    """Returns the logged names of the total loss, which is the first, and of the loss terms."""
    names = dict.fromkeys(name for line in steps for name in line if name not in NOT_A_LOSS)
    return ["loss", *(name for name in names if name != "loss")]
