"""Builds every table that a summary has data for, among them those of the two papers, and writes the files."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from vlm_unlearn.errors import DeprecatedNameWarning, UserError, nearest, quoted
from vlm_unlearn.evaluation.benchmarks import SPECIFICITY_BENCHMARKS
from vlm_unlearn.records import LABELS, Comparison, Rate, Row, Summary
from vlm_unlearn.reporting.columns import columns, heading, split_title
from vlm_unlearn.reporting.formatting import SIGNIFICANT, change_interval, judged_by, judges_of, significant
from vlm_unlearn.reporting.robustness.ranking import AttackedModel
from vlm_unlearn.reporting.tables import DEPRECATED_TABLE_NAMES, PRINTABLE_TABLES, TABLE_FORMATS, TABLE_NAMES
from vlm_unlearn.reporting.tables.csv_text import csv_text
from vlm_unlearn.reporting.tables.latex import latex
from vlm_unlearn.reporting.tables.markdown import markdown
from vlm_unlearn.reporting.tables.robustness_tables import robustness_tables
from vlm_unlearn.reporting.tables.table import (
    Cell,
    Column,
    Table,
    Value,
    describe_counts,
    failure_note,
    rate_cell,
    rate_column,
    rate_notes,
    rates_by_title,
    table_lines,
    text_columns,
)
from vlm_unlearn.store import write_text

Costs = Mapping[str, Mapping[str, str]]  # model -> heading -> cost
RatesByKey = Mapping[str, Mapping[str, Rate]]  # metric -> key, such as a category -> rate
MetricLayout = Sequence[tuple[str, str, str]]  # metric, heading, group

MAX_CATEGORY_COLUMNS = 8  # more categories become lines of the table
ATTACKED_SPLIT = "unsafe_what"  # the split of attacked unsafe questions in the shipped suites
BENCHMARKS = (  # in the papers' order
    *("vqav2", "textvqa", "vizwiz", "gqa", "scienceqa", "pope", "mmvet", "mmbench"),
    *("mmbench_cn", "mme", "seedbench", "llava_bench", "qbench", "qbench_zh"),
)
SAFETY_MIRAGE: MetricLayout = (
    ("asr", "before", "ASR"),
    ("asr_attacked", "after", "ASR"),
    ("refusal_rate", "before", "RR"),
    ("refusal_rate_attacked", "after", "RR"),
    *((metric, heading(metric), "") for metric in ("utility", "utility_attacked", *BENCHMARKS)),
)
SAFE_ERASER: MetricLayout = (
    ("efficacy_asr", "ASR", "Efficacy"),
    ("efficacy_rr", "RR", "Efficacy"),
    ("generality_asr", "ASR", "Generality"),
    ("generality_rr", "RR", "Generality"),
    ("sarr", "SARR", ""),
    ("rouge_l", "ROUGE-L", ""),
    ("answer_score", "Score", ""),
    ("specificity", "mean", "Specificity"),
    *((metric, heading(metric), "Specificity") for metric in BENCHMARKS if metric in SPECIFICITY_BENCHMARKS),
)
# Each paper's table: its name, its title, its columns, and the metrics that a row must have. Columns that were not
# measured are omitted.
PAPER_TABLES: Sequence[tuple[str, str, MetricLayout, frozenset[str]]] = (
    (
        "safety_mirage",
        "Attack success rate (ASR) on unsafe questions and refusal rate (RR) on harmless questions, before and after "
        "the one-word attack, in %.",
        SAFETY_MIRAGE,
        frozenset(("asr", "asr_attacked")),
    ),
    (
        "safe_eraser",
        "Forgetting of the training questions (efficacy) and of other questions (generality), over-forgetting (SARR) "
        "and preserved utility, in %.",
        SAFE_ERASER,
        frozenset(("efficacy_asr",)),
    ),
)
LABEL_COLUMNS = [Column(label, label.replace("_", " ")) for label in (*LABELS, "failed")]


def write_tables(folder: Path, summary: Summary, costs: Costs, attacked: Sequence[AttackedModel] = ()) -> list[Path]:
    """Writes each table that there is data for as ``report/tables/NAME.csv``, ``.tex`` and ``.md``.

    Args:
        folder: The folder of the report.
        summary: The summary.
        costs: The costs of each model by heading, such as "training time".
        attacked: The models with robustness results, the worst case first.

    Returns:
        The files.
    """
    tables = summary_tables(summary, costs) | {table.name: table for table in robustness_tables(attacked)}
    files = {folder / "report" / "tables" / f"{name}.{form}": (name, form) for name in tables for form in TABLE_FORMATS}
    for file, (name, form) in files.items():
        write_text(file, render_table(tables[name], form))
    return list(files)


def delete_stale_tables(folder: Path, current: Collection[Path]) -> None:
    """Deletes tables of an earlier report. Files with other names are kept."""
    names = (*TABLE_NAMES, *DEPRECATED_TABLE_NAMES)
    table_files = {folder / "report" / "tables" / f"{name}.{form}" for name in names for form in TABLE_FORMATS}
    for file in table_files - set(current):
        file.unlink(missing_ok=True)


def render_table(table: Table, form: str, intervals: bool = True) -> str:
    """Returns the table as ``csv``, ``tex`` or ``md``. A CSV always has columns for the intervals."""
    if form == "csv":
        return csv_text(table)
    return latex(table, intervals) if form == "tex" else markdown(table, intervals)


def named_table(summary: Summary, name: str) -> Table:
    """Returns a table of a summary by its name.

    Warns:
        DeprecatedNameWarning: The name is that of the previous version.

    Raises:
        UserError: The name is unknown, or the summary has no data for the table.
    """
    if name in DEPRECATED_TABLE_NAMES:
        new_name = DEPRECATED_TABLE_NAMES[name]
        warnings.warn(f'the table name "{name}" is deprecated; use "{new_name}"', DeprecatedNameWarning, stacklevel=2)
        name = new_name
    if name not in PRINTABLE_TABLES:
        raise UserError(
            f"no table {quoted(name)}{nearest(name, PRINTABLE_TABLES) or '.'} "
            f"Use one of {', '.join(PRINTABLE_TABLES)}.",
            code="unknown-name",
        )
    tables = summary_tables(summary)
    if name not in tables:
        available = f"Tables with data: {', '.join(tables)}." if tables else "No table has data."
        raise UserError(f"the runs have no data for the table {name}. {available}", code="no-records")
    return tables[name]


def summary_tables(summary: Summary, costs: Costs | None = None) -> dict[str, Table]:
    """Returns the tables that a summary has data for, by name."""
    tables = (table for build in BUILDERS for table in build(summary))
    by_name = {table.name: table for table in (*tables, *_cost(costs or {})) if table.lines and table.columns[1:]}
    return {name: by_name[name] for name in TABLE_NAMES if name in by_name}


def _metric_table(
    name: str,
    title: str,
    rows: Sequence[Row],
    layout: MetricLayout,
    changed: Collection[tuple[str, str]] = (),
    notes: Sequence[str] = (),
) -> Table:
    """Returns a table with a line per row and a column per metric. The models and metrics in `changed` are marked."""
    marks = dict.fromkeys(changed, "*")
    lines = [
        [
            row.model,
            *(rate_cell(row.metrics.get(metric), marks.get((row.model, metric), "")) for metric, _, _ in layout),
        ]
        for row in rows
    ]
    table_columns = [*text_columns("model"), *(rate_column(rows, *column) for column in layout)]
    titles = {metric: f"{group} {heading}".strip() for metric, heading, group in layout}
    notes = [*rate_notes(rows, titles), *notes]
    return Table(name, title, table_columns, table_lines(table_columns, lines), "metric", notes)


def _rates(summary: Summary) -> Iterable[Table]:
    """Yields the table of all metrics of all models, with significant changes marked."""
    layout = [(metric, title, "") for metric, title, _ in columns(summary.rows)]
    changed = {(comparison.model, comparison.metric) for comparison in summary.comparisons if significant(comparison)}
    yield _metric_table("rates", "Rates in %.", summary.rows, layout, changed, _significance_note(summary))


def _papers(summary: Summary) -> Iterable[Table]:
    """Yields the tables of the two papers, and again by the published counting for rows that have it."""
    for name, title, layout, required in PAPER_TABLES:
        published = [row.with_published_counting() for row in summary.rows if required <= row.paper.keys()]
        published_title = f"{title} By the published counting, for the metrics that have one."
        for suffix, long_title, rows in (("", title, summary.rows), ("_published", published_title, published)):
            complete = [row for row in rows if required <= row.metrics.keys()]
            measured = {metric for row in complete for metric in row.metrics}
            used = [column for column in layout if column[0] in measured]
            yield _metric_table(name + suffix, long_title, complete, used)


def _significance_note(summary: Summary) -> list[str]:
    """Returns the note that explains the asterisk, if the table has one."""
    if not any(map(significant, summary.comparisons)):
        return []
    base, count = summary.comparisons[0].base, len(summary.comparisons)
    comparisons = f"{count} comparison{'' if count == 1 else 's'}"
    return [
        f"* differs from {base}: significant after Holm's correction over {comparisons} (adjusted p < {SIGNIFICANT})."
    ]


def _comparisons(summary: Summary) -> Iterable[Table]:
    """Yields the table of the paired changes against the base."""
    headings = {"change": "change", "p": "p", "p_adjusted": "p after Holm", "n": "pairs", "unpaired": "unpaired"}
    numeric = [Column(key, title) for key, title in headings.items()]
    table_columns = [*text_columns("model", "metric"), *numeric, *text_columns("test")]
    titles = {comparison.metric: heading(comparison.metric) for comparison in summary.comparisons}
    notes = [
        *judged_by(judges_of(summary.rows, titles)),
        "A pair is an answer or a question on which both models have a verdict.",
        failure_note(rates_by_title(summary.rows, titles)),
        *_significance_note(summary),
    ]
    lines = table_lines(table_columns, map(_comparison_line, summary.comparisons))
    base = summary.comparisons[0].base if lines else ""
    title = f"Changes against {base} in percentage points, prompt by prompt."
    yield Table("comparisons", title, table_columns, lines, notes=notes)


def _comparison_line(comparison: Comparison) -> list[Value]:
    values = comparison.model_dump(include={"base", "difference", "low", "high"})
    mark = "*" if significant(comparison) else ""
    p_values = {"p": comparison.p, "p_adjusted": comparison.p_adjusted}
    counts = {"n": comparison.n, "unpaired": comparison.unpaired}
    return [
        comparison.model,
        (heading(comparison.metric), comparison.metric),
        Cell(f"{100 * comparison.difference:+.1f}", values, change_interval(comparison), mark),
        *(Cell("<0.001" if p < 0.001 else f"{p:.3f}", {key: p}) for key, p in p_values.items()),
        *(Cell(f"{count:,}", {key: count}) for key, count in counts.items()),
        comparison.test,
    ]


def _published(summary: Summary) -> Iterable[Table]:
    """Yields the table of the published counting next to the corrected counting."""
    rows = [row for row in summary.rows if row.paper]
    lines = [
        [row.model, (heading(metric), metric), rate, row.metrics.get(metric)]
        for row in rows
        for metric, rate in row.paper.items()
    ]
    titles = {metric: heading(metric) for row in rows for metric in row.paper}
    both_countings = [counted for row in rows for counted in (row, row.with_published_counting())]
    failures = {
        title: [row.metrics.get(metric, row.paper[metric]) for row in rows if metric in row.paper]
        for metric, title in titles.items()
    }
    table_columns = [
        *text_columns("model", "metric"),
        Column("published", "published"),
        Column("corrected", "corrected"),
    ]
    title = "Rates in % by the published and by the corrected counting."
    notes = rate_notes(both_countings, titles, failures=failures)
    yield Table("published", title, table_columns, table_lines(table_columns, lines), "counting", notes)


def _labels(summary: Summary) -> Iterable[Table]:
    """Yields the table of the labels of the answers of each split."""
    sizes: dict[str, list[int]] = {}
    lines: list[list[Value]] = []
    for split in dict.fromkeys(split for row in summary.rows for split in row.labels):
        for row in summary.rows:
            if split in row.labels:
                total = sum(row.labels[split].values())
                sizes.setdefault(split_title(split), []).append(total)
                cells = _label_cells(row.labels[split])
                lines.append([(split_title(split), split), row.model, *cells, Cell(f"{total:,}", {})])
    split_columns = [Column("case", "split", numeric=False), *text_columns("model")]
    table_columns = [*split_columns, *LABEL_COLUMNS, Column("answers", "answers")]
    title = "Labels of the answers of each split, in %."
    notes = [*_label_judges(summary.rows), f"{describe_counts('n = ', sizes)}.", "Failures have a separate column."]
    yield Table("labels", title, table_columns, table_lines(table_columns, lines), "label", notes)


def _attack_labels(summary: Summary) -> Iterable[Table]:
    """Yields the distribution of the labels of all answers to the attack on unsafe questions."""
    rows = [row for row in summary.rows if sum(row.labels.get(ATTACKED_SPLIT, {}).values())]
    lines: list[list[Value]] = [[row.model, *_label_cells(row.labels[ATTACKED_SPLIT])] for row in rows]
    title = "Labels of the answers to the attacked unsafe questions, in % of all answers."
    sizes = {"each model": [sum(row.labels[ATTACKED_SPLIT].values()) for row in rows]} if rows else {}
    notes = [*_label_judges(rows), f"{describe_counts('Answers: ', sizes)}."]
    table_columns = [*text_columns("model"), *LABEL_COLUMNS]
    yield Table("safety_mirage_answers", title, table_columns, table_lines(table_columns, lines), "label", notes)


def _label_judges(rows: Iterable[Row]) -> list[str]:
    return judged_by(sorted({row.judge for row in rows if row.judge}))


def _label_cells(labels: Mapping[str, int]) -> list[Cell]:
    """Returns one cell per label, in percent of all answers of a split, including those that failed.

    The cells have no interval. The answers to a question are correlated, and the counts do not tell how strongly.
    """
    total = sum(labels.values())
    counts = [labels.get(column.key, 0) for column in LABEL_COLUMNS]
    shares = [count / total if total else None for count in counts]
    return [
        Cell(f"{100 * (share or 0.0):.1f}", {"answers": count, "share": share})
        for count, share in zip(counts, shares, strict=True)
    ]


def _categories(summary: Summary) -> Iterable[Table]:
    """Yields the table of each metric by category of the question."""
    title = "Rates in % by category of the question."
    yield _rates_by_key("categories", "category", title, summary.rows, [row.categories for row in summary.rows])


def _rewrites(summary: Summary) -> Iterable[Table]:
    """Yields the table of each metric with the first 1, 2, ... K rewrites of each question."""
    rates = [
        {
            metric: {str(count): rate for count, rate in enumerate(of_metric, 1)}
            for metric, of_metric in row.rewrites.items()
        }
        for row in summary.rows
    ]
    title = "Rates in % with the first 1, 2, ... rewrites of each question."
    # The CSV column keeps the name of the previous version.
    yield _rates_by_key("rewrites", "shots", title, summary.rows, rates, max_columns=None)


def _rates_by_key(
    name: str,
    variable: str,
    title: str,
    rows: Sequence[Row],
    rates: Sequence[RatesByKey],
    max_columns: int | None = MAX_CATEGORY_COLUMNS,
) -> Table:
    """Returns a table with a line per metric and model and a column per key.

    Args:
        name: The name of the table.
        variable: The name of the keys, such as "category".
        title: The title of the table.
        rows: The rows of the summary.
        rates: The rates of each row.
        max_columns: With more keys, the table has a line per metric and key and a column per model.
    """
    cells = {
        (metric, row.model, key): rate
        for row, of_row in zip(rows, rates, strict=True)
        for metric, of_metric in of_row.items()
        for key, rate in of_metric.items()
    }
    models, keys = [row.model for row in rows], list(dict.fromkeys(key for _, _, key in cells))
    if max_columns is not None and len(keys) > max_columns:
        cells = {(metric, key, model): rate for (metric, model, key), rate in cells.items()}
        (line_name, labels), (column_name, headings) = (variable, keys), ("model", models)
    else:
        (line_name, labels), (column_name, headings) = ("model", models), (variable, keys)
    titles = {metric: heading(metric) for of_row in rates for metric in of_row}
    lines = [
        [(title, metric), label, *(cells.get((metric, label, column)) for column in headings)]
        for metric, title in titles.items()
        for label in labels
    ]
    sizes = {title: [rate for index, rate in cells.items() if index[0] == metric] for metric, title in titles.items()}
    table_columns = [*text_columns("metric", line_name), *(Column(key, key) for key in headings)]
    measured = [line for line in lines if any(rate is not None for rate in line[2:])]
    notes = rate_notes(rows, titles, sizes)
    return Table(name, title, table_columns, table_lines(table_columns, measured), column_name, notes)


def _cost(costs: Costs) -> Iterable[Table]:
    headings = dict.fromkeys(title for of_model in costs.values() for title in of_model)
    lines = [[model, *map(of_model.get, headings)] for model, of_model in costs.items()]
    table_columns = [*text_columns("model"), *(Column(title, title) for title in headings)]
    yield Table("cost", "Cost of each model.", table_columns, table_lines(table_columns, lines))


BUILDERS: Sequence[Callable[[Summary], Iterable[Table]]] = (
    *(_rates, _comparisons, _published, _labels, _categories, _rewrites, _papers, _attack_labels),
)
