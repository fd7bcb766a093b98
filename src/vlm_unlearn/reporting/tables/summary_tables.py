"""Every table that a summary can fill, and its files for papers and machines."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from vlm_unlearn.errors import UserError, nearest, quoted
from vlm_unlearn.records import LABELS, Comparison, Rate, Row, Summary
from vlm_unlearn.reporting.columns import case_title, columns, heading
from vlm_unlearn.reporting.formatting import SIGNIFICANT, judged_by, judges_of, significant
from vlm_unlearn.reporting.tables.csv_text import csv_text
from vlm_unlearn.reporting.tables.latex import latex
from vlm_unlearn.reporting.tables.markdown import markdown
from vlm_unlearn.reporting.tables.names import FORMS, NAMES, PRINTED
from vlm_unlearn.reporting.tables.paper_tables import (
    counted,
    failed_of,
    own_judges,
    safe_eraser,
    safety_mirage,
    safety_mirage_answers,
    shares,
    told,
)
from vlm_unlearn.reporting.tables.table import Cell, Column, Raw, Table, counts, rate_cell, rate_column, word, words
from vlm_unlearn.store import write_text

Costs = Mapping[str, Mapping[str, str]]  # model -> heading -> what it cost
ByKey = Mapping[str, Mapping[str, Rate]]  # metric -> category or number of shots -> rate
MOST_ACROSS = 8  # categories that stand beside each other


def write_tables(folder: Path, summary: Summary, costs: Costs) -> list[Path]:
    """Writes each table that the summary can fill as ``report/tables/NAME.csv``, ``.tex`` and ``.md``.

    Args:
        costs: what each model took, under headings such as "training time".

    Returns:
        The files.
    """
    below = folder / "report" / "tables"
    tables = summary_tables(summary, costs)
    files = []
    for name, table in tables.items():
        for form in FORMS:
            files.append(below / f"{name}.{form}")
            write_text(files[-1], written(table, form))
    return files


def delete_other_tables(folder: Path, kept: Collection[Path]) -> None:
    """Deletes the tables of an earlier summary that this one doesn't fill."""
    ours = {folder / "report" / "tables" / f"{name}.{form}" for name in NAMES for form in FORMS}
    for file in ours - set(kept):
        file.unlink(missing_ok=True)


def written(table: Table, form: str, intervals: bool = True) -> str:
    """The table as ``csv``, ``tex`` or ``md``; a CSV has its intervals as columns, always."""
    return (
        csv_text(table) if form == "csv" else latex(table, intervals) if form == "tex" else markdown(table, intervals)
    )


def named_table(summary: Summary, name: str) -> Table:
    """One of the tables that a summary can fill.

    Raises:
        UserError: there is no such table, or the summary has nothing for it.
    """
    tables = summary_tables(summary)
    if name not in PRINTED:
        raise UserError(f"no table {quoted(name)}{nearest(name, PRINTED)}; known: {', '.join(PRINTED)}")
    if name not in tables:
        raise UserError(f"nothing was measured that the table {name} shows; there is: {', '.join(tables) or 'none'}")
    return tables[name]


def summary_tables(summary: Summary, costs: Costs | None = None) -> dict[str, Table]:
    """The tables that a summary can fill, by name."""
    makers = (
        _rates,
        _comparisons,
        _published,
        _labels,
        _categories,
        _shots,
        safety_mirage,
        safety_mirage_answers,
        safe_eraser,
    )
    found = [table for maker in makers for table in maker(summary)]
    by_name = {table.name: table for table in (*found, *_cost(costs or {}))}
    return {name: by_name[name] for name in NAMES if name in by_name}


def _rates(summary: Summary) -> Iterable[Table]:
    """All metrics of all models, with the changes that are significant marked."""
    used = columns(summary.rows)
    if not used:
        return
    marked = {(one.model, one.metric) for one in summary.comparisons if significant(one)}
    lines = [
        [
            word("model", row.model),
            *(
                rate_cell(row.metrics.get(metric), "*" if (row.model, metric) in marked else "")
                for metric, _, _ in used
            ),
        ]
        for row in summary.rows
    ]
    shown = [rate_column(summary.rows, metric, title) for metric, title, _ in used]
    named = [(metric, title) for metric, title, _ in used]
    notes = [
        *judged_by(judges_of(summary.rows, [metric for metric, _ in named])),
        *told(summary.rows, named),
        *_marks(summary),
    ]
    yield Table("rates", "Rates in %.", [*words("model"), *shown], lines, "metric", notes)


def _marks(summary: Summary) -> list[str]:
    """What the asterisk says."""
    if not any(significant(one) for one in summary.comparisons):
        return []
    base, count = summary.comparisons[0].base, len(summary.comparisons)
    several = f"{count} comparison{'' if count == 1 else 's'}"
    return [f"* differs from {base}: significant after Holm's correction over {several} (adjusted p < {SIGNIFICANT})."]


def _comparisons(summary: Summary) -> Iterable[Table]:
    """What changed from the base, prompt by prompt."""
    if not summary.comparisons:
        return
    numbers = (
        ("change", "change"),
        ("p", "p"),
        ("p_adjusted", "p after Holm"),
        ("n", "pairs"),
        ("unpaired", "unpaired"),
    )
    shown = [*words("model", "metric"), *(Column(key, title) for key, title in numbers), *words("test")]
    base = summary.comparisons[0].base
    title = f"Changes against {base} in percentage points, prompt by prompt."
    metrics = {one.metric for one in summary.comparisons}
    notes = [*judged_by(judges_of(summary.rows, metrics)), *_compared_failures(summary, metrics), *_marks(summary)]
    yield Table("comparisons", title, shown, [_compared(one) for one in summary.comparisons], notes=notes)


def _compared_failures(summary: Summary, metrics: Collection[str]) -> list[str]:
    rates = [
        (heading(metric), [row.metrics[metric] for row in summary.rows if metric in row.metrics])
        for metric in dict.fromkeys(metrics)
    ]
    return ["Pairs: what both models have a verdict on.", *failed_of(dict(rates))]


def _compared(one: Comparison) -> list[Cell]:
    change: dict[str, Raw] = {"base": one.base, "difference": one.difference, "low": one.low, "high": one.high}
    interval = f"[{100 * one.low:+.1f}, {100 * one.high:+.1f}]"
    return [
        word("model", one.model),
        word("metric", heading(one.metric), one.metric),
        Cell(f"{100 * one.difference:+.1f}", change, interval, "*" if significant(one) else ""),
        Cell(_p(one.p), {"p": one.p}),
        Cell(_p(one.p_adjusted), {"p_adjusted": one.p_adjusted}),
        Cell(f"{one.n:,}", {"n": one.n}),
        Cell(f"{one.unpaired:,}", {"unpaired": one.unpaired}),
        word("test", one.test),
    ]


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _published(summary: Summary) -> Iterable[Table]:
    """The published counting beside the corrected."""
    lines = [
        [
            word("model", row.model),
            word("metric", heading(metric), metric),
            rate_cell(rate),
            rate_cell(row.metrics.get(metric)),
        ]
        for row in summary.rows
        for metric, rate in row.paper.items()
    ]
    if lines:
        shown = [*words("model", "metric"), Column("published", "published"), Column("corrected", "corrected")]
        metrics = dict.fromkeys(metric for row in summary.rows for metric in row.paper)
        both = [row for one in summary.rows if one.paper for row in (one, one.with_published_counting())]
        rates = {heading(metric): [row.metrics[metric] for row in both if metric in row.metrics] for metric in metrics}
        once = {
            heading(metric): [row.metrics.get(metric, row.paper[metric]) for row in summary.rows if metric in row.paper]
            for metric in metrics
        }
        notes = [*judged_by(judges_of(both, metrics)), *counted(rates, once)]
        yield Table(
            "published", "Rates in % by the published counting and by the corrected.", shown, lines, "counting", notes
        )


def _labels(summary: Summary) -> Iterable[Table]:
    """Where the answers of each case went."""
    cases = dict.fromkeys(case for row in summary.rows for case in row.labels)
    lines = [
        [
            word("case", case_title(case), case),
            word("model", row.model),
            *shares(row.labels[case]),
            _total(row.labels[case]),
        ]
        for case in cases
        for row in summary.rows
        if case in row.labels
    ]
    if lines:
        shown = [Column(label, label.replace("_", " ")) for label in (*LABELS, "failed", "answers")]
        title = "Where the answers of each case went, in % of them."
        behind = {
            case_title(case): [sum(row.labels[case].values()) for row in summary.rows if case in row.labels]
            for case in cases
        }
        notes = [
            *judged_by(own_judges(summary.rows)),
            f"{counts('n = ', behind)}; what failed is in a column of its own.",
        ]
        yield Table("labels", title, [*words("case", "model"), *shown], lines, "label", notes)


def _total(labels: Mapping[str, int]) -> Cell:
    return Cell(f"{sum(labels.values()):,}", {})


def _categories(summary: Summary) -> Iterable[Table]:
    """Each metric by the questions' category."""
    title = "Rates in % by the category of the question."
    found = [row.categories for row in summary.rows]
    categories = dict.fromkeys(category for of_row in found for of_metric in of_row.values() for category in of_metric)
    maker = _by_key if len(categories) > MOST_ACROSS else _by_metric
    yield from maker(summary.rows, "categories", "category", title, found)


def _shots(summary: Summary) -> Iterable[Table]:
    """Each metric with the first 1, 2, ... K rewrites of each question."""
    numbered = [
        {
            metric: {str(shots): rate for shots, rate in enumerate(rates, start=1)}
            for metric, rates in row.rewrites.items()
        }
        for row in summary.rows
    ]
    yield from _by_metric(
        summary.rows, "shots", "shots", "Rates in % with the first 1, 2, ... rewrites of each question.", numbered
    )


def _by_metric(rows: Sequence[Row], name: str, across: str, title: str, rates: Sequence[ByKey]) -> Iterable[Table]:
    """A line a metric and model, a column each of what the rates are by.

    Args:
        rates: of each row by metric, then by what the columns are.
    """
    metrics, keys = _metrics_and_keys(rates)
    lines = [
        [
            word("metric", heading(metric), metric),
            word("model", row.model),
            *(rate_cell(of_row[metric].get(key)) for key in keys),
        ]
        for metric in metrics
        for row, of_row in zip(rows, rates, strict=True)
        if metric in of_row
    ]
    if lines:
        shown = [*words("metric", "model"), *(Column(key, key) for key in keys)]
        yield Table(name, title, shown, lines, across, _behind(rows, metrics, rates))


def _by_key(rows: Sequence[Row], name: str, across: str, title: str, rates: Sequence[ByKey]) -> Iterable[Table]:
    """The same with a line a metric and key, a column a model: for more keys than a page is wide."""
    metrics, keys = _metrics_and_keys(rates)
    lines = [
        [
            *(word("metric", heading(metric), metric), word(across, key)),
            *(rate_cell(of_row.get(metric, {}).get(key)) for of_row in rates),
        ]
        for metric in metrics
        for key in keys
        if any(key in of_row.get(metric, {}) for of_row in rates)
    ]
    shown = [*words("metric", across), *(Column(row.model, row.model) for row in rows)]
    yield Table(name, title, shown, lines, "model", _behind(rows, metrics, rates))


def _metrics_and_keys(rates: Sequence[ByKey]) -> tuple[list[str], list[str]]:
    metrics = dict.fromkeys(metric for of_row in rates for metric in of_row)
    return list(metrics), list(
        dict.fromkeys(key for of_row in rates for of_metric in of_row.values() for key in of_metric)
    )


def _behind(rows: Sequence[Row], metrics: Sequence[str], rates: Sequence[ByKey]) -> list[str]:
    """Judges, counts and failures of a table by category or shots."""
    found = {
        heading(metric): [rate for of_row in rates for rate in of_row.get(metric, {}).values()] for metric in metrics
    }
    whole = {heading(metric): [row.metrics[metric] for row in rows if metric in row.metrics] for metric in metrics}
    return [*judged_by(judges_of(rows, metrics)), *counted(found, whole)]


def _cost(costs: Costs) -> Iterable[Table]:
    headings = dict.fromkeys(title for cost in costs.values() for title in cost)
    if headings:
        lines = [
            [word("model", model), *(word(title, cost[title]) if title in cost else None for title in headings)]
            for model, cost in costs.items()
        ]
        yield Table(
            "cost", "What each model took.", [*words("model"), *(Column(title, title) for title in headings)], lines
        )
