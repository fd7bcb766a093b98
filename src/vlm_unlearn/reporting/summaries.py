"""Reads the summaries that evaluations, demos and reports have left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from vlm_unlearn.errors import RequestError, shown
from vlm_unlearn.records import Summary
from vlm_unlearn.store import read_json


def read_summary(folder: Path) -> Summary:
    """A folder's summary.json.

    Raises:
        RequestError: there is none, or it isn't one; the field is named.
    """
    file = folder / "summary.json"
    if not file.is_file():
        raise RequestError(f"{folder}: has no summary.json; run `vlm-unlearn evaluate` or `score` first")
    try:
        return Summary.model_validate(read_json(file))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(shown(part)[1:-1] for part in first["loc"])
        raise RequestError(f"{file}: {where + ': ' if where else ''}{first['msg']}") from None


def join_summaries(folders: Sequence[Path]) -> Summary:
    """The rows of several summaries below each other; the comparisons only of a single one, for they are against one base.

    Raises:
        RequestError: as `read_summary`; also for two models of one name.
    """
    summaries = [read_summary(folder) for folder in folders]
    if len(summaries) == 1:
        return summaries[0]
    found: dict[str, Path] = {}
    for folder, summary in zip(folders, summaries, strict=True):
        for row in summary.rows:
            if row.model in found:
                where = f"{found[row.model]} and {folder}"
                raise RequestError(
                    f"{where}: both call a model {shown(row.model)}; give one another name with `vlm-unlearn score RUN --name`"
                )
            found[row.model] = folder
    return Summary(rows=[row for summary in summaries for row in summary.rows])
