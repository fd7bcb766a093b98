"""Writes the report of a sweep: the front, the settings of the trials, and the chosen recipes."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from filelock import FileLock
from markupsafe import Markup

from vlm_unlearn.config import Sweep
from vlm_unlearn.errors import printable
from vlm_unlearn.reporting.charts.inline_svg import inline_svg
from vlm_unlearn.reporting.charts.matplotlib_charts import FORMATS, delete_stale_plots, write_plots
from vlm_unlearn.reporting.page import render_page, template_text
from vlm_unlearn.reporting.sweeps.charts import seed_value, short, sweep_charts
from vlm_unlearn.store import write_text
from vlm_unlearn.sweeps.records import SweepResult, Trial


def write_sweep_report(out: Path, sweep: Sweep, result: SweepResult) -> Path:
    """Writes ``report.html`` and the folder ``report/plots`` of a sweep.

    Args:
        out: The folder of the sweep.
        sweep: The sweep.
        result: Its trials.

    Returns:
        The path of ``report.html``.
    """
    with FileLock(out / ".report.lock"):  # workers of other commands may finish at the same moment
        return _write(out, sweep, result)


def _write(out: Path, sweep: Sweep, result: SweepResult) -> Path:
    charts = sweep_charts(sweep, result)
    plots = write_plots(out / "report" / "plots", charts)
    svgs = {file.stem: file.read_text("utf-8") for file in plots if file.suffix == ".svg"}
    page = render_page(
        "sweep.html.j2",
        scripts=["report.js"],
        title=printable(f"Sweep {result.name}"),
        page_style=Markup(template_text("report.css")),
        charts=charts,
        svgs={name: inline_svg(text, name, charts[name]) for name, text in svgs.items()},
        formats=FORMATS,
        sweep=sweep,
        result=result,
        rows=[_row(sweep, result, trial) for trial in result.trials],
        keys=list(sweep.space),
        objectives=list(sweep.objectives.items()),
        seeds=_seed_table(sweep, result),
        summary=_summary(result),
        caveats=_caveats(sweep, result),
    )
    write_text(out / "report.html", page)
    delete_stale_plots(out / "report" / "plots", plots)
    return out / "report.html"


def _row(sweep: Sweep, result: SweepResult, trial: Trial) -> dict[str, Any]:
    """Returns the texts and the sort values of a trial's row in the table."""
    settings = []
    for key, parameter in sweep.space.items():
        value = trial.params.get(key)
        texts = [str(choice) for choice in parameter.choices or []]
        order = texts.index(str(value)) if str(value) in texts else value if isinstance(value, int | float) else ""
        settings.append({"text": "–" if value is None else short(value), "order": "" if value is None else order})
    values = []
    for name in sweep.objectives:
        reported, selected = trial.reported.get(name), trial.values.get(name)
        values.append(
            {
                "text": _percent(reported),
                "selected": _percent(selected),
                "interval": _interval(trial, name),
                "order": "" if reported is None else reported,
            }
        )
    return {
        "trial": trial,
        "front": trial.number in result.front,
        "state": trial.state if trial.feasible else "outside of the constraints",
        "settings": settings,
        "values": values,
    }


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}\u00a0%"


def _interval(trial: Trial, name: str) -> str:
    """Returns the 95 % interval of a single model, or the smallest and the largest value of several."""
    if len(trial.seeds) == 1:
        rate = trial.seeds[0].reported.get(name)
        if rate is None or rate.low is None or rate.high is None:
            return ""
        return f"[{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
    points = [value for seed in trial.seeds if (value := seed_value(seed, name)) is not None]
    return f"{100 * min(points):.1f} to {100 * max(points):.1f}" if points else ""


def _seed_table(sweep: Sweep, result: SweepResult) -> list[dict[str, Any]]:
    """Returns the mean, the standard deviation and every single value of the trials on the front."""
    rows = []
    for trial in map(result.trial, result.front):
        for name in sweep.objectives if len(trial.seeds) > 1 else ():
            points = [(seed.seed, seed_value(seed, name)) for seed in trial.seeds]
            measured = [value for _, value in points if value is not None]
            if len(measured) < 2:
                continue
            rows.append(
                {
                    "trial": trial.number,
                    "metric": name,
                    "mean": _percent(statistics.fmean(measured)),
                    "spread": f"{100 * statistics.stdev(measured):.1f}",
                    "points": ", ".join(f"seed {seed}: {_percent(value)}" for seed, value in points),
                }
            )
    return rows


def _summary(result: SweepResult) -> str:
    states = [trial.state for trial in result.trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    configurations = len({trial.configuration for trial in result.trials if trial.state == "complete"})
    volume = f" Hypervolume {result.hypervolume[-1]:.4f}." if result.hypervolume else ""
    return (
        f"{len(result.trials)} trials ({counts}) with {configurations} distinct configurations that are complete. "
        f"{len(result.front)} of them are on the front.{volume}"
    )


def _caveats(sweep: Sweep, result: SweepResult) -> list[str]:
    """Returns the limits of the numbers in sentences."""
    lines = []
    if sweep.select_on == "half":
        lines.append(
            "Trials were compared by one half of the questions. The plots and the large numbers of the table are rates "
            "on the other half, so a trial of the front can look dominated. Benchmarks and attacks are not divided."
        )
    else:
        lines.append(
            "Trials were compared and are reported by the same questions. The best of many trials looks better than it "
            "is. Set select_on: half."
        )
    if len(sweep.seeds) < 2:
        lines.append("Each model was trained with one seed. The spread between seeds is not included.")
    else:
        lines.append(f"Each configuration was trained with {len(sweep.seeds)} seeds. Values are means over the seeds.")
    if any(trial.state in ("running", "waiting") for trial in result.trials):
        lines.append("Trials are still running or waiting.")
    failed = sum(trial.state == "failed" for trial in result.trials)
    if failed:
        lines.append(f"{failed} trials have failed and have no rates.")
    return lines
