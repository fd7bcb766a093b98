"""The audit of a data file as one HTML page with bars: no script, nothing from any network."""

from __future__ import annotations

from pathlib import Path

from vlm_unlearn.data.audit import Audit
from vlm_unlearn.reporting.page import render_page
from vlm_unlearn.store import write_text

FEATURE_NAMES = {
    "first_word": "First word",
    "first_bigram": "First two words",
    "length": "Length in words",
    "image": "Has an image",
}


def write_audit_page(file: Path, audit: Audit, name: str) -> None:
    """Writes the page; everything that the data file said is escaped."""
    base = 100 * audit.refused / audit.n
    sides = [
        ("Words that go with an answer", "to attack with", audit.words["answer"], audit.triggers["answer"]),
        ("Words that go with refusal", "to test over-refusal with", audit.words["refuse"], audit.triggers["refuse"]),
    ]
    page = render_page("audit.html.j2", audit=audit, name=name, base=base, sides=sides, features=FEATURE_NAMES)
    write_text(file, page)
