"""Builds every table that a summary has data for, and writes the files."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from vlm_unlearn.errors import DeprecatedNameWarning, UserError, nearest, quoted
from vlm_unlearn.records import LABELS, Comparison, Rate, Row, Summary
from vlm_unlearn.reporting.columns import columns, heading, split_title
from vlm_unlearn.reporting.formatting import SIGNIFICANT, judged_by, judges_of, significant
from vlm_unlearn.reporting.tables.csv_text import csv_text
from vlm_unlearn.reporting.tables.latex import latex
from vlm_unlearn.reporting.tables.markdown import markdown
from vlm_unlearn.reporting.tables.names import DEPRECATED_TABLE_NAMES, PRINTABLE_TABLES, TABLE_FORMATS, TABLE_NAMES
from vlm_unlearn.reporting.tables.notes import describe_counts, failure_note, metric_notes, rate_notes, rates_by_title
from vlm_unlearn.reporting.tables.paper_tables import (
    label_cells,
    label_judges,
    safe_eraser,
    safety_mirage,
    safety_mirage_answers,
)
from vlm_unlearn.reporting.tables.table import (
    Cell,
    Column,
    Table,
    rate_cell,
    rate_column,
    text_cell,
    text_columns,
)
from vlm_unlearn.store import write_text

Costs = Mapping[str, Mapping[str, str]]  # model -> heading -> cost
RatesByKey = Mapping[str, Mapping[str, Rate]]  # metric -> key, such as a category -> rate
MAX_CATEGORY_COLUMNS = 8  # more categories become lines of the table


def write_tables(folder: Path, summary: Summary, costs: Costs) -> list[Path]:
    """Writes each table that the summary has data for as ``report/tables/NAME.csv``, ``.tex`` and ``.md``.

    Args:
        folder: The folder of the report.
        summary: The summary.
        costs: The costs of each model by heading, such as "training time".

    Returns:
        The files.
    """
    table_folder = folder / "report" / "tables"
    files = []
    for name, table in summary_tables(summary, costs).items():
        for form in TABLE_FORMATS:
            files.append(table_folder / f"{name}.{form}")
            write_text(files[-1], render_table(table, form))
    return files


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
    builders = (
        _rates,
        _comparisons,
        _published,
        _labels,
        _categories,
        _rewrites,
        safety_mirage,
        safety_mirage_answers,
        safe_eraser,
    )
    tables = [table for build in builders for table in build(summary)]
    by_name = {table.name: table for table in (*tables, *_cost(costs or {}))}
    return {name: by_name[name] for name in TABLE_NAMES if name in by_name}


def _rates(summary: Summary) -> Iterable[Table]:
    """Yields the table of all metrics of all models, with significant changes marked."""
    titles = {metric: title for metric, title, _ in columns(summary.rows)}
    if not titles:
        return
    changed = {(comparison.model, comparison.metric) for comparison in summary.comparisons if significant(comparison)}
    lines = [
        [
            text_cell("model", row.model),
            *(rate_cell(row.metrics.get(metric), "*" if (row.model, metric) in changed else "") for metric in titles),
        ]
        for row in summary.rows
    ]
    rate_columns = [rate_column(summary.rows, metric, title) for metric, title in titles.items()]
    notes = [
        *judged_by(judges_of(summary.rows, list(titles))),
        *metric_notes(summary.rows, titles),
        *_significance_note(summary),
    ]
    yield Table("rates", "Rates in %.", [*text_columns("model"), *rate_columns], lines, "metric", notes)


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
    if not summary.comparisons:
        return
    headings = {"change": "change", "p": "p", "p_adjusted": "p after Holm", "n": "pairs", "unpaired": "unpaired"}
    numeric = [Column(key, title) for key, title in headings.items()]
    table_columns = [*text_columns("model", "metric"), *numeric, *text_columns("test")]
    base = summary.comparisons[0].base
    title = f"Changes against {base} in percentage points, prompt by prompt."
    titles = {comparison.metric: heading(comparison.metric) for comparison in summary.comparisons}
    notes = [
        *judged_by(judges_of(summary.rows, titles)),
        "A pair is an answer or a question on which both models have a verdict.",
        failure_note(rates_by_title(summary.rows, titles)),
        *_significance_note(summary),
    ]
    lines = [_comparison_line(comparison) for comparison in summary.comparisons]
    yield Table("comparisons", title, table_columns, lines, notes=notes)


def _comparison_line(comparison: Comparison) -> list[Cell]:
    p, p_adjusted = comparison.p, comparison.p_adjusted
    change = comparison.model_dump(include={"base", "difference", "low", "high"})
    interval = f"[{100 * comparison.low:+.1f}, {100 * comparison.high:+.1f}]"
    return [
        text_cell("model", comparison.model),
        text_cell("metric", heading(comparison.metric), comparison.metric),
        Cell(f"{100 * comparison.difference:+.1f}", change, interval, "*" if significant(comparison) else ""),
        Cell("<0.001" if p < 0.001 else f"{p:.3f}", {"p": p}),
        Cell("<0.001" if p_adjusted < 0.001 else f"{p_adjusted:.3f}", {"p_adjusted": p_adjusted}),
        Cell(f"{comparison.n:,}", {"n": comparison.n}),
        Cell(f"{comparison.unpaired:,}", {"unpaired": comparison.unpaired}),
        text_cell("test", comparison.test),
    ]


def _published(summary: Summary) -> Iterable[Table]:
    """Yields the table of the published counting next to the corrected counting."""
    rows = [row for row in summary.rows if row.paper]
    lines = [
        [
            text_cell("model", row.model),
            text_cell("metric", heading(metric), metric),
            rate_cell(rate),
            rate_cell(row.metrics.get(metric)),
        ]
        for row in rows
        for metric, rate in row.paper.items()
    ]
    if lines:
        countings = [Column(counting, counting) for counting in ("published", "corrected")]
        table_columns = [*text_columns("model", "metric"), *countings]
        titles = {metric: heading(metric) for row in rows for metric in row.paper}
        both_countings = [counted for row in rows for counted in (row, row.with_published_counting())]
        once = {
            title: [row.metrics.get(metric, row.paper[metric]) for row in rows if metric in row.paper]
            for metric, title in titles.items()
        }
        rates = rates_by_title(both_countings, titles)
        notes = [*judged_by(judges_of(both_countings, titles)), *rate_notes(rates, once)]
        title = "Rates in % by the published and by the corrected counting."
        yield Table("published", title, table_columns, lines, "counting", notes)


def _labels(summary: Summary) -> Iterable[Table]:
    """Yields the table of the labels of the answers of each split."""
    splits = dict.fromkeys(split for row in summary.rows for split in row.labels)
    lines = [
        [
            text_cell("case", split_title(split), split),
            text_cell("model", row.model),
            *label_cells(row.labels[split]),
            Cell(f"{sum(row.labels[split].values()):,}", {}),
        ]
        for split in splits
        for row in summary.rows
        if split in row.labels
    ]
    if lines:
        table_columns = [
            Column("case", "split", numeric=False),
            *text_columns("model"),
            *(Column(label, label.replace("_", " ")) for label in (*LABELS, "failed", "answers")),
        ]
        sizes = {
            split_title(split): [sum(row.labels[split].values()) for row in summary.rows if split in row.labels]
            for split in splits
        }
        notes = [
            *judged_by(label_judges(summary.rows)),
            f"{describe_counts('n = ', sizes)}.",
            "Failures have a separate column.",
        ]
        yield Table("labels", "Labels of the answers of each split, in %.", table_columns, lines, "label", notes)


def _categories(summary: Summary) -> Iterable[Table]:
    """Yields the table of each metric by category of the question."""
    rates = [row.categories for row in summary.rows]
    many = len({key for of_row in rates for of_metric in of_row.values() for key in of_metric}) > MAX_CATEGORY_COLUMNS
    yield from _rates_by_key(
        summary.rows, "categories", "category", "Rates in % by category of the question.", rates, keys_as_lines=many
    )


def _rewrites(summary: Summary) -> Iterable[Table]:
    """Yields the table of each metric with the first 1, 2, ... K rewrites of each question."""
    rates = [
        {
            metric: {str(count): rate for count, rate in enumerate(of_metric, start=1)}
            for metric, of_metric in row.rewrites.items()
        }
        for row in summary.rows
    ]
    title = "Rates in % with the first 1, 2, ... rewrites of each question."
    # The CSV column keeps the name of the previous version.
    yield from _rates_by_key(summary.rows, "rewrites", "shots", title, rates)


def _rates_by_key(
    rows: Sequence[Row],
    name: str,
    variable: str,
    title: str,
    rates: Sequence[RatesByKey],
    keys_as_lines: bool = False,
) -> Iterable[Table]:
    """Yields a table with a line per metric and model and a column per key.

    Args:
        rows: The rows of the summary.
        name: The name of the table.
        variable: The name of the keys, such as "category".
        title: The title of the table.
        rates: The rates of each row.
        keys_as_lines: Writes a line per metric and key and a column per model instead.
    """
    metrics = list(dict.fromkeys(metric for of_row in rates for metric in of_row))
    keys = list(dict.fromkeys(key for of_row in rates for of_metric in of_row.values() for key in of_metric))
    models = [row.model for row in rows]
    inner, outer = (keys, models) if keys_as_lines else (models, keys)
    lines = []
    for metric in metrics:
        of_metric = [of_row.get(metric, {}) for of_row in rates]
        table_cells = [[rate_cell(of_model.get(key)) for key in keys] for of_model in of_metric]
        present = [bool(of_model) for of_model in of_metric]
        if keys_as_lines:
            table_cells = [list(cells) for cells in zip(*table_cells, strict=True)]
            present = [any(key in of_model for of_model in of_metric) for key in keys]
        label = variable if keys_as_lines else "model"
        lines += [
            [text_cell("metric", heading(metric), metric), text_cell(label, inner_name), *cells]
            for inner_name, cells, measured in zip(inner, table_cells, present, strict=True)
            if measured
        ]
    titles = {metric: heading(metric) for metric in metrics}
    of_keys = {
        title: [rate for of_row in rates for rate in of_row.get(metric, {}).values()]
        for metric, title in titles.items()
    }
    notes = [*judged_by(judges_of(rows, metrics)), *rate_notes(of_keys, rates_by_title(rows, titles))]
    if lines:
        table_columns = text_columns("metric", variable if keys_as_lines else "model")
        table_columns += [Column(key, key) for key in outer]
        yield Table(name, title, table_columns, lines, "model" if keys_as_lines else variable, notes)


def _cost(costs: Costs) -> Iterable[Table]:
    headings = dict.fromkeys(title for of_model in costs.values() for title in of_model)
    if headings:
        lines = [
            [
                text_cell("model", model),
                *(text_cell(title, of_model[title]) if title in of_model else None for title in headings),
            ]
            for model, of_model in costs.items()
        ]
        table_columns = [*text_columns("model"), *(Column(title, title) for title in headings)]
        yield Table("cost", "Cost of each model.", table_columns, lines)
