"""Writes the report of a summary: report.html, and the answers, tables and plots that it links to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote, urlencode

from markupsafe import Markup

from vlm_unlearn.config import Suite
from vlm_unlearn.errors import UserError, printable, quoted
from vlm_unlearn.evaluation.assessment import assess
from vlm_unlearn.evaluation.generate import OnDone
from vlm_unlearn.records import LABELS, Comparison, Row, Summary
from vlm_unlearn.reporting import formatting, provenance
from vlm_unlearn.reporting.answers.answers_page import write_answers
from vlm_unlearn.reporting.assessment_text import MARKS, reason_text
from vlm_unlearn.reporting.caveats import caveats, common_attacks
from vlm_unlearn.reporting.charts.curves import loss_charts
from vlm_unlearn.reporting.charts.inline_svg import inline_svg
from vlm_unlearn.reporting.charts.matplotlib_charts import FORMATS, delete_stale_plots, write_plots
from vlm_unlearn.reporting.charts.robustness_charts import robustness_charts
from vlm_unlearn.reporting.charts.summary_charts import summary_charts
from vlm_unlearn.reporting.columns import columns, heading, split_title
from vlm_unlearn.reporting.metric_roles import AnswerFilter, MetricRoles, answers_link, assign_roles, changes_link
from vlm_unlearn.reporting.page import render_page, template_text
from vlm_unlearn.reporting.provenance import COSTS, ModelProvenance, read_costs, read_provenance
from vlm_unlearn.reporting.robustness.files import RobustnessFiles
from vlm_unlearn.reporting.robustness.ranking import AttackedModel, rank_models
from vlm_unlearn.reporting.robustness.text import VERDICT_MARKS, explain, limits, verdict
from vlm_unlearn.reporting.seeds import seed_groups, seed_rates
from vlm_unlearn.reporting.tables.robustness_tables import robustness_tables
from vlm_unlearn.reporting.tables.summary_tables import delete_stale_tables, write_tables
from vlm_unlearn.store import SUMMARY, RunDirectory, read_json, write_text

REPORT_FILES = ("report.html", "report", SUMMARY)  # the contents of a report's folder
LINKED_FILES = ("answers.html", "images", "tables", "plots")  # the contents of its folder report/
GENERATOR = b'<meta name="generator" content="vlm-unlearn">'  # marks a page as a report


def write_report(
    report_dir: Path,
    summary: Summary,
    runs: Mapping[str, Path],
    title: str,
    training: Mapping[str, Path] | None = None,
    left_out: Sequence[str] = (),
    on_done: OnDone | None = None,
    remarks: Sequence[str] = (),
    robustness: RobustnessFiles | None = None,
    processes: int = 1,
) -> Path:
    """Writes ``report.html`` and the folder ``report/`` with the files that it links to.

    Args:
        report_dir: The folder of the report.
        summary: The rates and comparisons to show.
        runs: The evaluation folder of each model.
        training: The training run of a model, if it is not the one that the evaluation's suite names.
        left_out: The reasons for which comparisons were left out.
        on_done: Called with the stage, the number of finished steps and their total.
        remarks: Paragraphs about the models, which the page shows below the rates.
        robustness: The results of attacks on the models. The summary's assessments should count them already, see
            `assess_with_attacks`.
        processes: The number of plots that are drawn at the same time.

    Returns:
        The path of ``report.html``.

    Raises:
        UserError: A file of a run is invalid, or the folder is not writable.
    """
    sources = read_provenance(runs, training or {})
    roles = assign_roles(summary.rows, {model: source.suite for model, source in sources.items()})
    training_runs = {model: source.training for model, source in sources.items() if source.training is not None}
    costs = read_costs(sources)
    charts = summary_charts(summary, roles)
    attacked = rank_models(robustness.by_model) if robustness is not None else []
    charts |= robustness_charts(attacked)
    charts["loss"] = loss_charts(training_runs, [row.model for row in summary.rows])
    all_charts = {name: chart for section in charts.values() for name, chart in section.items()}
    plots = write_plots(report_dir / "report" / "plots", all_charts, on_done, processes)
    svg_files = {file.stem: file for file in plots if file.suffix == ".svg"}
    write_answers(report_dir, runs, title, on_done)
    tables = write_tables(report_dir, summary, costs, attacked)
    tables_by_name: dict[str, list[Path]] = {}
    for file in tables:
        tables_by_name.setdefault(file.stem, []).append(file)
    page = render_page(
        "report.html.j2",
        scripts=["report.js"],
        title=printable(title),
        page_style=Markup(template_text("report.css")),
        charts=charts,
        svgs={name: inline_svg(file.read_text("utf-8"), name, all_charts[name]) for name, file in svg_files.items()},
        formats=FORMATS,
        remarks=remarks,
        tables=tables_by_name,
        costs=costs,
        cost_headings=[kind for kind in COSTS if any(kind in values for values in costs.values())],
        **_template_values(summary, roles, sources, left_out, attacked),
        **_robustness_values(attacked, robustness, len(summary.rows), [source.suite for source in sources.values()]),
    )
    write_text(report_dir / "report.html", page)
    # Only now, because until here the previous report.html linked to these files.
    delete_stale_plots(report_dir / "report" / "plots", plots)
    delete_stale_tables(report_dir, tables)
    return report_dir / "report.html"


def _template_values(
    summary: Summary,
    roles: MetricRoles,
    sources: Mapping[str, ModelProvenance],
    left_out: Sequence[str],
    attacked: Sequence[AttackedModel],
) -> dict[str, object]:
    """Returns the texts and numbers of the page, and the functions with which the template formats them."""
    rows = summary.rows
    table_columns = columns(rows)
    metrics = [metric for metric, _, _ in table_columns]
    base = next(iter(sources), None)  # the answers page compares with the first model

    def answers(model: str, metric: str) -> str:
        return _answers_address(answers_link(model, metric, sources[model].suite)) if model in sources else ""

    def changes(comparison: Comparison) -> str:
        if comparison.base != base or comparison.model not in sources:
            return ""
        suite = sources[comparison.model].suite
        return _answers_address(changes_link(comparison.model, comparison.metric, suite))

    return {
        "evaluation": provenance.describe_evaluation(rows, sources),
        "assessments": [
            (row.model, row.assessment or assess(row, sources[row.model].suite if row.model in sources else None))
            for row in rows
        ],
        "marks": MARKS,
        "columns": table_columns,
        "rows": rows,
        "comparisons": summary.comparisons,
        "seed_rates": seed_rates(seed_groups(sources), rows),
        "significant_changes": sum(map(formatting.significant, summary.comparisons)),
        "comparison_of": {(comparison.model, comparison.metric): comparison for comparison in summary.comparisons},
        "counts": {metric: count for metric in metrics if (count := _common_count(rows, metric))},
        "notes": formatting.notes(summary, metrics),
        "caveats": caveats(rows, roles, sources, left_out, attacked),
        "failed": formatting.count_failures(rows),
        "commands": provenance.reproduction_commands(sources),
        "digests": provenance.list_digests(sources),
        "versions": provenance.package_versions(sources),
        "labels": (*LABELS, "failed"),
        "splits": list(dict.fromkeys(split for row in rows for split in row.labels)),
        "answers": answers,
        "changes": changes,
        "answers_with": lambda **filters: _answers_address(list(filters.items())),
        "formatting": formatting,
        "heading": heading,
        "split_title": split_title,
        "reason_text": reason_text,
    }


def _robustness_values(
    attacked: Sequence[AttackedModel], robustness: RobustnessFiles | None, num_rows: int, suites: Sequence[Suite]
) -> dict[str, object]:
    """Returns the tables and sentences of the section about attacks on the models."""
    left_out = robustness.left_out if robustness is not None else ()
    return {
        "attacked": attacked,
        "attacked_left_out": left_out,
        "attack_tables": {table.name: table for table in robustness_tables(attacked)},
        "explain": explain,
        "verdict_marks": VERDICT_MARKS,
        "verdict": verdict,
        "attack_limits": limits(attacked, num_rows, common_attacks(suites)) if attacked else [],
    }


def _common_count(rows: Sequence[Row], metric: str) -> int | None:
    """Returns n of a metric if it is the same for all models."""
    counts = {row.metrics[metric].n for row in rows if metric in row.metrics}
    return counts.pop() if len(counts) == 1 else None


def _answers_address(filters: AnswerFilter) -> str:
    """Returns the address of the answers page with a filter, or an empty string for an empty filter."""
    return f"report/answers.html#{urlencode(filters, quote_via=quote, errors='replace')}" if filters else ""


def _validate_earlier_report(report_dir: Path, fix: str) -> None:
    """Checks that report.html and summary.json are missing, empty, or of an earlier report."""
    page, summary = report_dir / "report.html", report_dir / SUMMARY
    try:
        if summary.is_file() and summary.stat().st_size:
            Summary.model_validate(read_json(summary))
            return  # the page next to it can be of an earlier version, whose pages have no generator
    except ValueError:  # a UserError is one too
        raise UserError(f"exists and is not of a report. {fix}", code="output-exists", file=summary) from None
    if page.is_file() and page.stat().st_size:
        with page.open("rb") as handle:
            is_report = GENERATOR in handle.read(65536)
        if not is_report:
            raise UserError(f"exists and is not a report. {fix}", code="output-exists", file=page)


def validate_report_folder(report_dir: Path) -> None:
    """Checks that a folder is missing or contains nothing but an earlier report.

    Raises:
        UserError: The folder contains a run or other files, also with the names of a report's files, or a link in place
            of a report's file, which would lead out of the folder.
    """
    fix = "Choose another folder for the report."
    if report_dir.exists() and not report_dir.is_dir():
        raise UserError(f"a file, not a folder. {fix}", code="not-a-folder", file=report_dir)
    if report_dir.is_symlink() and not report_dir.exists():
        raise UserError(f"a link to a missing folder. {fix}", code="not-a-folder", file=report_dir)
    if RunDirectory(report_dir).exists():
        raise UserError(f"the folder contains a run. {fix}", code="output-exists", file=report_dir)
    _validate_earlier_report(report_dir, fix)
    for directory, names in ((report_dir, REPORT_FILES), (report_dir / "report", LINKED_FILES)):
        for entry in sorted(directory.iterdir()) if directory.is_dir() else ():
            if entry.name in names and entry.is_symlink():
                raise UserError(
                    f"a link in place of a report's file. Delete it, or c{fix[1:]}", code="output-exists", file=entry
                )
            if entry.name not in names and not entry.name.startswith("."):
                raise UserError(
                    f"the folder contains {quoted(entry.name)}, which is not a report's file. {fix}",
                    code="output-exists",
                    file=directory,
                )
