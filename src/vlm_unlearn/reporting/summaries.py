"""Reads and joins the summaries of evaluations, demos and reports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.records import Row, Summary
from vlm_unlearn.store import SUMMARY, describe_validation_error, read_json


def read_summary(path: Path) -> Summary:
    """Reads a folder's summary.json.

    Args:
        path: A folder that `evaluate`, `compare --out`, `report` or `demo` wrote.

    Raises:
        UserError: The folder has no summary.json, or the file is not a valid summary.
    """
    file = path / SUMMARY
    if not file.is_file():
        raise UserError(
            f"no {SUMMARY} in this folder. Run `vlm-unlearn evaluate` or `vlm-unlearn score` first.",
            code="file-not-found",
            file=path,
        )
    try:
        return Summary.model_validate(read_json(file))
    except ValidationError as error:
        raise UserError(describe_validation_error(error), code="invalid-field", file=file) from None


def join_summaries(folders: Sequence[Path]) -> Summary:
    """Reads several summaries and joins their rows. Two rows of one model, from two suites, become one row.

    Comparisons refer to the base of their own summary. They are kept only if there is a single summary.

    Args:
        folders: The folders that contain the summaries.

    Raises:
        UserError: As in `read_summary`, and if two summaries contain the same metric or split of one model.
    """
    summaries = [read_summary(path) for path in folders]
    if len(summaries) == 1:
        return summaries[0]
    rows: dict[str, Row] = {}
    for path, summary in zip(folders, summaries, strict=True):
        for row in summary.rows:
            rows[row.model] = _join_rows(rows[row.model], row, path) if row.model in rows else row
    return Summary(rows=list(rows.values()))


def _join_rows(row: Row, addition: Row, path: Path) -> Row:
    duplicates = [
        key
        for field in ("metrics", "paper", "labels")
        for key in getattr(row, field).keys() & getattr(addition, field).keys()
    ]
    if duplicates:
        raise UserError(
            f"{quoted(min(duplicates))} of the model {quoted(row.model)} is in another summary too. "
            "Give one of the two models another name with `vlm-unlearn score RUN --name NAME`.",
            code="duplicate-key",
            file=path,
        )
    default = row.judge or addition.judge
    rows = (row, addition)
    judges = {metric: source.judge_of(metric) for source in rows for metric in source.metrics}
    paper_judges = {metric: source.paper_judges.get(metric, source.judge) for source in rows for metric in source.paper}
    failed = {
        judge: row.failed.get(judge, {}) | addition.failed.get(judge, {}) for judge in row.failed | addition.failed
    }
    joined = ("metrics", "paper", "labels", "categories", "rewrites")
    return row.model_copy(
        update={
            "judge": default,
            "judges": {metric: judge for metric, judge in judges.items() if judge != default},
            "paper_judges": {metric: judge for metric, judge in paper_judges.items() if judge != default},
            "failed": failed,
            **{field: getattr(row, field) | getattr(addition, field) for field in joined},
            "batching": row.batching or addition.batching,
            "assessment": None,
        }
    )
