"""The tables of a report as files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vlm_unlearn.records import Summary
from vlm_unlearn.store import write_text


def write_tables(folder: Path, summary: Summary, costs: Mapping[str, Mapping[str, str]]) -> list[Path]:
    """Writes ``report/tables/NAME.csv``, ``.tex`` and ``.md`` below `folder`; returns them."""
    files = [folder / "report" / "tables" / f"rates.{kind}" for kind in ("csv", "tex", "md")]
    for file in files:
        write_text(file, "".join(f"{row.model}\n" for row in summary.rows))
    return files
