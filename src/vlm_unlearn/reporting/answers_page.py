"""The page of all answers, beside the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vlm_unlearn.reporting.page import render_page
from vlm_unlearn.store import write_text


def write_answers(folder: Path, runs: Mapping[str, Path], title: str) -> Path:
    """Writes ``report/answers.html`` below `folder`; returns it."""
    file = folder / "report" / "answers.html"
    write_text(file, render_page("answers.html.j2", title=title, models=list(runs)))
    return file
