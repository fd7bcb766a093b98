"""Reads the summaries that evaluations, demos and reports have left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.records import Row, Summary
from vlm_unlearn.store import describe_validation_error, read_json


def read_summary(folder: Path) -> Summary:
    """A folder's summary.json.

    Raises:
        UserError: there is none, or it isn't one; the field is named.
    """
    file = folder / "summary.json"
    if not file.is_file():
        raise UserError(f"{folder}: has no summary.json; run `vlm-unlearn evaluate` or `score` first")
    try:
        return Summary.model_validate(read_json(file))
    except ValidationError as error:
        raise UserError(f"{file}: {describe_validation_error(error)}") from None


def join_summaries(folders: Sequence[Path]) -> Summary:
    """The rows of several summaries below each other; what two suites measured on one model in one row.

    Comparisons are against one base: they stay where there is a single summary, and else go.

    Raises:
        UserError: as `read_summary`; also for a metric or case that two summaries have of one model.
    """
    summaries = [read_summary(folder) for folder in folders]
    if len(summaries) == 1:
        return summaries[0]
    rows: dict[str, Row] = {}
    for folder, summary in zip(folders, summaries, strict=True):
        for row in summary.rows:
            rows[row.model] = _joined(rows[row.model], row, folder) if row.model in rows else row
    return Summary(rows=list(rows.values()))


def _joined(row: Row, other: Row, folder: Path) -> Row:
    twice = [
        key
        for kind in ("metrics", "paper", "labels")
        for key in getattr(row, kind).keys() & getattr(other, kind).keys()
    ]
    if twice:
        raise UserError(
            f"{folder}: {quoted(min(twice))} of {quoted(row.model)} is in another summary too; "
            "give one of the two models another name with `vlm-unlearn score RUN --name`"
        )
    judge = row.judge or other.judge
    both = (row, other)
    judges = {metric: its for one in both for metric in one.metrics if (its := one.judge_of(metric)) != judge}
    published = {
        metric: its for one in both for metric in one.paper if (its := one.paper_judges.get(metric, one.judge)) != judge
    }
    failed = {name: row.failed.get(name, {}) | other.failed.get(name, {}) for name in row.failed | other.failed}
    return row.model_copy(
        update={
            "judge": judge,
            "judges": judges,
            "paper_judges": published,
            "failed": failed,
            **{
                name: getattr(row, name) | getattr(other, name)
                for name in ("metrics", "paper", "labels", "categories", "rewrites")
            },
            "batching": row.batching or other.batching,
        }
    )
