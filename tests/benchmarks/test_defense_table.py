"""The cost of defenses in the docs equals the measured one."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_docs_have_the_costs_of_the_results_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    defenses = importlib.import_module("defenses")
    rows = json.loads(defenses.RESULTS.read_text())["rows"]
    assert defenses.table(rows) in (ROOT / "docs" / "methods.md").read_text(), (
        "paste what `python benchmarks/defenses.py --table` prints"
    )
