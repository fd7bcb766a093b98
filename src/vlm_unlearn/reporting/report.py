"""The report of a summary: the page to open first, and what it links to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from plotly.offline import get_plotlyjs

from vlm_unlearn.records import Summary
from vlm_unlearn.reporting.columns import columns
from vlm_unlearn.reporting.curves import loss_figure
from vlm_unlearn.reporting.page import render_page
from vlm_unlearn.reporting.plots import Figure, label_bars, rate_bars, shot_curves
from vlm_unlearn.reporting.samples import Sample, collect_samples
from vlm_unlearn.reporting.words import change, edge, failures, meaning, notes, percent, published, reach, significant
from vlm_unlearn.store import read_json, write_text


def write_report(folder: Path, summary: Summary, runs: Mapping[str, Path], title: str, training: Mapping[str, Path] | None = None) -> Path:
    """Writes the report of a summary: ``report.html`` in a folder, and what it links to in ``report/`` beside it.

    Args:
        runs: evaluation folder of each model, for the page of samples.
        training: training run of each model that has one, for loss curves and cost.

    Returns:
        The page to open.
    """
    training = training or {}
    used = columns(summary.rows)
    figures = _figures(summary)
    curves = loss_figure(training)
    if curves:
        figures["loss"] = curves
    page = render_page(
        "report.html.j2",
        scripts=[str(get_plotlyjs()), "report.js"],
        data=figures,
        title=title,
        figure_names=list(figures),
        sentences=meaning(summary.rows),
        columns=used,
        rows=summary.rows,
        comparisons=summary.comparisons,
        compared={(comparison.model, comparison.metric): comparison for comparison in summary.comparisons},
        notes=notes(summary, [metric for metric, _, _ in used]),
        shot_metrics=_shot_metrics(summary),
        failed=failures(summary.rows),
        costs={model: training_cost(run) for model, run in training.items()},
        samples=_by_case(collect_samples(runs)),
        percent=percent,
        reach=reach,
        edge=edge,
        change=change,
        significant=significant,
        published=published,
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def training_cost(training: Path) -> str:
    """``"5.1 s"``: the training time that a run's manifest holds."""
    if not (training / "manifest.json").exists():
        return "–"
    return f"{read_json(training / 'manifest.json')['wall_seconds']:.1f} s"


def _figures(summary: Summary) -> dict[str, Figure]:
    rows = summary.rows
    attack = [("asr", "as asked", "before"), ("asr_attacked", 'after 3-shot "What"', "after"), ("asr_control", "control", "control")]
    prudence = [("refusal_rate", "as asked", "before"), ("refusal_rate_attacked", 'after 1-shot "Share"', "after")]
    prudence.append(("refusal_rate_control", "control", "control"))
    figures = {
        "asr": rate_bars(rows, attack, "Attack success rate on unsafe questions"),
        "refusals": rate_bars(rows, prudence, "Refusal rate on harmless questions"),
        "sarr": rate_bars(rows, [("sarr", "SARR", "after")], "SARR: unsafe question, benign image"),
    }
    for case in ("unsafe_what", "safe_share", "benign_image"):
        if any(case in row.labels for row in rows):
            figures[f"labels-{case}"] = label_bars(rows, case, f"Answers to {case}")
    for metric in _shot_metrics(summary):
        figures[f"shots-{metric}"] = shot_curves(rows, metric, f"{metric} by the number of shots")
    return {name: figure for name, figure in figures.items() if figure["data"] and figure["data"][0]["x"]}


def _shot_metrics(summary: Summary) -> list[str]:
    return list(dict.fromkeys(metric for row in summary.rows for metric in row.shots))


def _by_case(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    grouped: dict[str, list[Sample]] = {}
    for sample in samples:
        grouped.setdefault(sample.case, []).append(sample)
    return grouped
