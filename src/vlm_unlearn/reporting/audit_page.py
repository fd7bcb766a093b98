"""The audit of a data file as one HTML page with bars: no script, nothing from any network."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from jinja2 import Environment

from vlm_unlearn.data.audit import Audit
from vlm_unlearn.store import write_text

FEATURE_NAMES = {"first_word": "First word", "first_bigram": "First two words", "length": "Length in words", "image": "Has an image"}


def write_audit_page(file: Path, audit: Audit, name: str) -> None:
    """Writes the page; everything that the data file said is escaped."""
    template = (files("vlm_unlearn.reporting") / "templates" / "audit.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    base = 100 * audit.refused / audit.n
    sides = [
        ("Words that go with an answer", "to attack with", audit.words["answer"], audit.triggers["answer"]),
        ("Words that go with refusal", "to test over-refusal with", audit.words["refuse"], audit.triggers["refuse"]),
    ]
    page = environment.from_string(template).render(audit=audit, name=name, base=base, sides=sides, features=FEATURE_NAMES)
    write_text(file, page)
