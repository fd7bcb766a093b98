"""``vlm-unlearn table`` on finished runs."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from finished_runs import complies, make_run, unlearned
from helpers import run
from vlm_unlearn.evaluation.generate import saved_suite
from vlm_unlearn.evaluation.scoring import score_run


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    made = [make_run(tmp_path / "base", complies), make_run(tmp_path / "npo", unlearned)]
    for folder in made:
        score_run(folder, saved_suite(folder), folder.name)
    return made


def test_a_table_of_several_runs(runs: list[Path]) -> None:
    done = run("table", *runs)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "| model | ASR attacked | Refusals | Degenerate |"
    assert lines[3] == "| npo | **10.0** [4.0, 23.1] | 25.0 [14.2, 40.2] | **0.0** [0.0, 4.6] |"
    assert "Judged by keyword. " in done.stdout
    bare = run("table", *runs, "--format", "tex", "--no-intervals").stdout
    assert r"npo & \textbf{10.0} & 25.0 & \textbf{0.0} \\" in bare
    assert "[4.0" not in bare
    sheet = list(csv.DictReader(io.StringIO(run("table", *runs, "--table", "rewrites", "--format", "csv").stdout)))
    assert [(line["model"], line["shots"], line["value"]) for line in sheet[3:]] == [
        ("npo", "1", "0.0"),
        ("npo", "2", "0.0"),
        ("npo", "3", "0.1"),
    ]


def test_two_suites_on_one_model_are_one_row(runs: list[Path], tmp_path: Path) -> None:
    rate = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 100, "failed": 0}
    (tmp_path / "utility").mkdir()
    file = tmp_path / "utility" / "summary.json"
    file.write_text(json.dumps({"schema": 1, "rows": [{"model": "npo", "judge": "other", "metrics": {"vqav2": rate}}]}))
    done = run("table", runs[1], tmp_path / "utility", "--no-intervals")
    assert done.stdout.splitlines()[2:3] == ["| npo | 10.0 | 25.0 | 0.0 | 50.0 |"]
    assert "Judged by keyword and other." in done.stdout
    twice = run("table", runs[1], runs[1])
    assert twice.returncode == 2
    assert "[duplicate-key]" in twice.stderr


def test_wrong_requests(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "summary.json").write_text('{"schema": 1, "rows": [{"model": 3}]}')
    for arguments, message in (
        ([tmp_path], "[file-not-found]"),
        ([tmp_path / "broken"], "summary.json: rows.0.model: "),
        ([runs[0], "--table", "lables"], 'no table "lables"; did you mean "labels"'),
        ([runs[0], "--format", "json"], "writes no JSON; all numbers are in the runs' summary.json"),
        ([runs[0], "--format", "latex"], 'no format "latex"; did you mean "tex"?; known: csv, tex, md'),
        ([*runs, "--table", "comparisons"], "comparisons. Tables with data: rates, "),
    ):
        done = run("table", *arguments)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert message in done.stderr
        assert done.stdout == ""
