"""Writes the audit of a data file as one HTML page without scripts or network access."""

from __future__ import annotations

from pathlib import Path

from vlm_unlearn.data_tools.audit import Audit
from vlm_unlearn.reporting.page import render_page
from vlm_unlearn.store import write_text

FEATURE_NAMES = {
    "first_word": "First word",
    "first_bigram": "First two words",
    "length": "Length in words",
    "image": "Has an image",
}


def write_audit_page(file: Path, audit: Audit, name: str) -> None:
    """Writes the audit page. All text from the data file is escaped.

    Args:
        file: The HTML file to write.
        audit: The audit to show.
        name: The name of the data file, for the title.
    """
    sections = [
        ("First words of answered questions", "for attacks", audit.words["answer"], audit.triggers["answer"]),
        ("First words of refused questions", "for over-refusal tests", audit.words["refuse"], audit.triggers["refuse"]),
    ]
    page = render_page(
        "audit.html.j2",
        audit=audit,
        name=name,
        refused_percent=100 * audit.refused / audit.n,
        sections=sections,
        features=FEATURE_NAMES,
    )
    write_text(file, page)
