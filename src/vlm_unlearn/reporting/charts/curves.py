"""Loss curves of a training run, as PNG for the run's folder and as charts for the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlm_unlearn.records import PROBE_PREFIX
from vlm_unlearn.reporting.charts.chart import Chart, Lines, Series, style_of

NOT_A_LOSS = ("step", "grad_norm", "learning_rate", "epoch")
DRAWABLE = 1e30  # numbers beyond are more than axes and their ticks can bear, and NaN is not below it
DRAWN = 500  # steps of a line, at most about twice as many


def read_log(run: Path) -> list[dict[str, float | None]]:
    """The numbers of each step in a training run's log.jsonl; none where there is no such file.

    A line that a kill left half-written or that has no step is passed over; a number that no chart can draw, such as NaN, is None.
    """
    file = run / "log.jsonl"
    lines = file.read_bytes().splitlines() if file.is_file() else []
    return [found for line in lines if (found := _numbers(line)).get("step") is not None]


def _numbers(line: bytes) -> dict[str, float | None]:
    try:
        read = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    values = read.items() if isinstance(read, dict) else ()
    return {name: value if abs(value) < DRAWABLE else None for name, value in values if type(value) in (int, float)}


def write_loss_png(run: Path) -> Path | None:
    """Draws the total loss, its parts and the probes of a training run into ``loss.png``; None where nothing was logged."""
    log = read_log(run)
    steps = [line for line in log if "loss" in line]
    if not steps:
        return None
    from matplotlib.figure import Figure as Canvas  # no pyplot: nothing is left open, and no display is needed

    probes = [line for line in log if any(name.startswith(PROBE_PREFIX) for name in line)]
    canvas = Canvas(figsize=(8, 7 if probes else 4.5), dpi=120, layout="constrained")
    axes = canvas.subplots(2 if probes else 1, 1, squeeze=False)[:, 0]
    for part in _parts(steps):
        axes[0].plot(
            [line["step"] for line in steps],
            [line.get(part) for line in steps],
            label=part,
            lw=2.2 if part == "loss" else 1.2,
        )
    axes[0].set(xlabel="optimizer step", ylabel="loss")
    if probes:
        for name in dict.fromkeys(name for line in probes for name in line if name.startswith(PROBE_PREFIX)):
            axes[1].plot([line["step"] for line in probes], [line.get(name) for line in probes], "o-", ms=3, label=name)
        axes[1].set(xlabel="optimizer step", ylabel="rate", ylim=(-0.03, 1.03))
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    file = run / "loss.png"
    part_file = run / ".loss.part.png"
    canvas.savefig(part_file)
    part_file.replace(file)
    return file


def loss_charts(runs: Mapping[str, Path], models: Sequence[str]) -> dict[str, Chart]:
    """The total loss of each run, then each part of it, one line a model; none where no run has a log.

    Args:
        models: all models of the report, whose places decide how their lines look.
    """
    logs = {
        model: steps for model, run in runs.items() if (steps := [line for line in read_log(run) if "loss" in line])
    }
    charts: dict[str, Chart] = {}
    for part in dict.fromkeys(part for steps in logs.values() for part in _parts(steps)):
        series = []
        for model, steps in logs.items():
            known = [
                (step, value)
                for line in steps
                if (value := line.get(part)) is not None and (step := line["step"]) is not None
            ]
            drawn = known[:: max(1, len(known) // DRAWN)]
            if drawn:
                style = style_of(models.index(model))
                series.append(Series(model, [value for _, value in drawn], (), (), style, [step for step, _ in drawn]))
        name = "the whole loss" if part == "loss" else f"its part: {part.replace('_', ' ')}"
        if series:
            charts[f"loss-{len(charts) + 1}"] = Lines(
                f"Training: {name}", series, "optimizer step", "loss", percent=False, markers=False
            )
    return charts


def _parts(steps: Sequence[Mapping[str, float | None]]) -> list[str]:
    found = dict.fromkeys(name for line in steps for name in line if name not in NOT_A_LOSS)
    return ["loss", *(name for name in found if name != "loss")]
