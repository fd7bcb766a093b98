"""The speed figures in the docs equal the measured ones."""

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


def test_docs_have_the_figures_of_the_results_file(speed: Any) -> None:
    rows = json.loads(speed.RESULTS.read_text())["rows"]
    assert speed.table(rows) in (ROOT / "docs" / "performance.md").read_text(), (
        "paste what `python benchmarks/speed.py --table` prints"
    )
    readme = (ROOT / "README.md").read_text()
    for row in rows[: len(speed.MAIN)]:
        assert f"{row['speedup']:.1f} (`{row['method']}`)" in readme


def test_results_file_has_every_case(speed: Any) -> None:
    """A run of some cases only writes to another file, so this file always has all cases."""
    measured = json.loads(speed.RESULTS.read_text())["rows"]
    cases = [speed.asdict(case) for case in speed.cases()]
    assert [{name: row[name] for name in cases[0]} for row in measured] == cases
