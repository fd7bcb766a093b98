"""Loss curves of a training run, as PNG for the run's folder and as a figure for the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_unlearn.reporting.plots import Figure, layout
from vlm_unlearn.training.watching import PROBE

NOT_A_LOSS = ("step", "grad_norm", "learning_rate", "epoch")


def read_log(run: Path) -> list[dict[str, Any]]:
    """The lines of a training run's log.jsonl; none where there is no such file."""
    file = run / "log.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def write_loss_png(run: Path) -> Path | None:
    """Draws the total loss, its parts and the probes of a training run into ``loss.png``; None where nothing was logged."""
    log = read_log(run)
    steps = [line for line in log if "loss" in line]
    if not steps:
        return None
    from matplotlib.figure import Figure as Canvas  # no pyplot: nothing is left open, and no display is needed

    probes = [line for line in log if any(name.startswith(PROBE) for name in line)]
    canvas = Canvas(figsize=(8, 7 if probes else 4.5), dpi=120, layout="constrained")
    axes = canvas.subplots(2 if probes else 1, 1, squeeze=False)[:, 0]
    for part in _parts(steps):
        axes[0].plot([line["step"] for line in steps], [line.get(part) for line in steps], label=part, lw=2.2 if part == "loss" else 1.2)
    axes[0].set(xlabel="optimizer step", ylabel="loss")
    if probes:
        for name in dict.fromkeys(name for line in probes for name in line if name.startswith(PROBE)):
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


def loss_figure(runs: Mapping[str, Path]) -> Figure | None:
    """The total loss of each run, one line a model; None where no run has a log."""
    traces = []
    for model, run in runs.items():
        steps = [line for line in read_log(run) if "loss" in line]
        if steps:
            x, y = [line["step"] for line in steps], [line["loss"] for line in steps]
            traces.append({"type": "scatter", "mode": "lines", "name": model, "x": x, "y": y})
    if not traces:
        return None
    own = {"yaxis": {}, "xaxis": {"title": {"text": "optimizer step"}, "automargin": True}, "legend": {}, "showlegend": True}
    return {"data": traces, "layout": layout("Training loss") | own}


def _parts(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    found = dict.fromkeys(name for line in steps for name in line if name not in NOT_A_LOSS)
    return ["loss", *(name for name in found if name != "loss")]
