"""The report of a summary: the page to open first, and what it links to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote, urlencode

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from vlm_unlearn.errors import UserError, printable, quoted
from vlm_unlearn.evaluation.generate import OnDone
from vlm_unlearn.records import LABELS, Comparison, Row, Summary
from vlm_unlearn.reporting.answers.answers_page import write_answers
from vlm_unlearn.reporting.assessment import assess
from vlm_unlearn.reporting.caveats import caveats
from vlm_unlearn.reporting.charts.chart import COLORS, style_of
from vlm_unlearn.reporting.charts.curves import loss_charts
from vlm_unlearn.reporting.charts.matplotlib_charts import FORMATS, delete_stale_plots, write_plots
from vlm_unlearn.reporting.charts.plotly_charts import SHAPES, plotly_figure
from vlm_unlearn.reporting.charts.summary_charts import summary_charts
from vlm_unlearn.reporting.columns import columns, heading, split_title
from vlm_unlearn.reporting.demo_findings import demo_findings
from vlm_unlearn.reporting.formatting import (
    bounds,
    change,
    count_failures,
    notes,
    percent,
    published,
    rule_of_three_note,
    significant,
)
from vlm_unlearn.reporting.metric_roles import Link, MetricRoles, answers_link, assign_roles, changes_link
from vlm_unlearn.reporting.page import render_page, template_text
from vlm_unlearn.reporting.provenance import (
    COSTS,
    ModelProvenance,
    describe_evaluation,
    list_digests,
    package_versions,
    read_costs,
    read_provenance,
    reproduction_commands,
)
from vlm_unlearn.reporting.tables.summary_tables import delete_stale_tables, write_tables
from vlm_unlearn.store import write_text

OWN = ("report.html", "report", "summary.json")  # what a report's folder holds
BELOW = ("answers.html", "images", "tables", "plots")


def write_report(
    folder: Path,
    summary: Summary,
    runs: Mapping[str, Path],
    title: str,
    training: Mapping[str, Path] | None = None,
    left_out: Sequence[str] = (),
    on_done: OnDone | None = None,
) -> Path:
    """Writes the report of a summary: ``report.html`` in a folder, and what it links to in ``report/`` beside it.

    Args:
        runs: evaluation folder of each model.
        training: training run of each model that has one, where it isn't the one that the evaluation's suite names.
        left_out: what was not compared, with the reason.
        on_done: told how far it is: stage, done, all.

    Returns:
        The page to open.

    Raises:
        UserError: a run's files are broken, or the folder can't be written to.
    """
    sources = read_provenance(runs, training or {})
    roles = assign_roles(summary.rows, {model: source.suite for model, source in sources.items()})
    trained = {model: source.training for model, source in sources.items() if source.training is not None}
    costs = read_costs(sources)
    charts = summary_charts(summary, roles)
    charts["loss"] = loss_charts(trained, [row.model for row in summary.rows])
    drawn = {name: chart for section in charts.values() for name, chart in section.items()}
    plots = write_plots(folder / "report" / "plots", drawn, on_done)
    write_answers(folder, runs, title, on_done)
    tables = write_tables(folder, summary, costs)
    page = render_page(
        "report.html.j2",
        scripts=[str(get_plotlyjs()), "report.js"],
        data={name: plotly_figure(chart) for name, chart in drawn.items()},
        title=printable(title),
        own_style=Markup(template_text("report.css")),
        charts=charts,
        formats=FORMATS,
        tables=_by_name(tables),
        costs=costs,
        cost_headings=[kind for kind in COSTS if any(kind in spent for spent in costs.values())],
        **_in_words(summary, roles, sources, left_out),
    )
    write_text(folder / "report.html", page)
    delete_stale_plots(folder / "report" / "plots", plots)  # no sooner: until now the page of before linked to them
    delete_stale_tables(folder, tables)
    return folder / "report.html"


def _in_words(
    summary: Summary, roles: MetricRoles, sources: Mapping[str, ModelProvenance], left_out: Sequence[str]
) -> dict[str, object]:
    """What the page says, and the functions that it says numbers with."""
    rows = summary.rows
    used = columns(rows)
    first = next(iter(sources), None)  # the page of answers compares with this one

    def answers(model: str, metric: str) -> str:
        return _address(answers_link(model, metric, sources[model].suite)) if model in sources else ""

    def changes(comparison: Comparison) -> str:
        model = comparison.model
        known = comparison.base == first and model in sources
        return _address(changes_link(model, comparison.metric, sources[model].suite)) if known else ""

    return {
        "done": describe_evaluation(rows, sources),
        "verdicts": [assess(row, roles) for row in rows],
        "looks": [(COLORS[style.color], SHAPES[style.shape]) for style in map(style_of, range(len(rows)))],
        "sentences": demo_findings(rows),
        "columns": used,
        "rows": rows,
        "comparisons": summary.comparisons,
        "significant_changes": sum(map(significant, summary.comparisons)),
        "compared": {(comparison.model, comparison.metric): comparison for comparison in summary.comparisons},
        "counts": {metric: count for metric, _, _ in used if (count := _one_count(rows, metric))},
        "notes": notes(summary, [metric for metric, _, _ in used]),
        "limits": caveats(rows, roles, sources, left_out),
        "failed": count_failures(rows),
        "commands": reproduction_commands(sources),
        "digests": list_digests(sources),
        "versions": package_versions(sources),
        "labels": (*LABELS, "failed"),
        "cases": list(dict.fromkeys(case for row in rows for case in row.labels)),
        "answers": answers,
        "changes": changes,
        "answers_at": lambda **filters: _address(list(filters.items())),
        **{
            word.__name__: word
            for word in (percent, bounds, rule_of_three_note, change, significant, published, heading, split_title)
        },
    }


def _one_count(rows: Sequence[Row], metric: str) -> int | None:
    """What all models' rates of a metric are of, where that is the same number."""
    counts = {row.metrics[metric].n for row in rows if metric in row.metrics}
    return counts.pop() if len(counts) == 1 else None


def _address(filters: Link) -> str:
    """The page of answers, filtered; empty where nothing says how."""
    return f"report/answers.html#{urlencode(filters, quote_via=quote, errors='replace')}" if filters else ""


def _by_name(files: Sequence[Path]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for file in files:
        found.setdefault(file.stem, []).append(file)
    return found


def validate_report_folder(folder: Path) -> None:
    """Looks before a report is written that the folder holds nothing else.

    Raises:
        UserError: it holds a run, something that is no report's, or a link, which would lead out of the folder.
    """
    if folder.is_symlink() and not folder.exists():
        raise UserError(f"{folder}: is a link to nothing; choose another folder for the report")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, not a folder; choose another folder for the report")
    if (folder / "manifest.json").exists():
        raise UserError(f"{folder}: holds a run; choose another folder for the report")
    for below, own in ((folder, OWN), (folder / "report", BELOW)):
        entries = sorted(entry.name for entry in below.iterdir()) if below.is_dir() else []
        link = next((name for name in entries if name in own and (below / name).is_symlink()), None)
        if link is not None:
            raise UserError(f"{below / link}: is a link; delete it, or choose another folder for the report")
        foreign = next((name for name in entries if name not in own and not name.startswith(".")), None)
        if foreign is not None:
            raise UserError(
                f"{below}: holds {quoted(foreign)}, which is no report's; choose another folder for the report"
            )
