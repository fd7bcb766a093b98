"""The figures of speed that the docs give are those that were measured."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("speed")


def test_docs_give_the_figures_of_the_file(speed: Any) -> None:
    rows = json.loads(speed.RESULTS.read_text())["rows"]
    assert speed.table(rows) in (ROOT / "docs" / "performance.md").read_text(), (
        "paste what `python benchmarks/speed.py --table` prints"
    )
    readme = (ROOT / "README.md").read_text()
    for row in rows[: len(speed.MAIN)]:
        assert f"{row['speedup']:.1f} (`{row['method']}`)" in readme


def test_every_case_is_in_the_file(speed: Any) -> None:
    """A part of the benchmark goes to a file of its own."""
    measured = json.loads(speed.RESULTS.read_text())["rows"]
    cases = [speed.asdict(case) for case in speed.cases()]
    assert [{name: row[name] for name in cases[0]} for row in measured] == cases
