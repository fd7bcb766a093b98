"""``vlm-unlearn table`` on finished runs."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from finished_runs import complies, make_run, unlearned
from helpers import error_code
from helpers import run_in_process as run
from vlm_unlearn.evaluation.generate import saved_suite
from vlm_unlearn.evaluation.scoring import score_run


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    folders = [make_run(tmp_path / "base", complies), make_run(tmp_path / "npo", unlearned)]
    for folder in folders:
        score_run(folder, saved_suite(folder), folder.name)
    return folders


def test_table_prints_several_runs(runs: list[Path]) -> None:
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


def test_table_joins_two_suites_of_a_model(runs: list[Path], tmp_path: Path) -> None:
    rate = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 100, "failed": 0}
    (tmp_path / "utility").mkdir()
    file = tmp_path / "utility" / "summary.json"
    file.write_text(json.dumps({"schema": 1, "rows": [{"model": "npo", "judge": "other", "metrics": {"vqav2": rate}}]}))
    done = run("table", runs[1], tmp_path / "utility", "--no-intervals")
    assert done.stdout.splitlines()[2:3] == ["| npo | 10.0 | 25.0 | 0.0 | 50.0 |"]
    assert "Judged by keyword and other." in done.stdout
    repeated = run("table", runs[1], runs[1])
    assert repeated.returncode == 2
    assert error_code(repeated) == "duplicate-key"
    assert '"npo"' in repeated.stderr


def test_invalid_requests_print_nothing(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "summary.json").write_text('{"schema": 1, "rows": [{"model": 3}]}')
    for arguments, tokens in (
        ([tmp_path], [str(tmp_path), "summary.json", "`vlm-unlearn evaluate`"]),
        ([tmp_path / "broken"], ["summary.json", "rows.0.model"]),
        ([runs[0], "--table", "lables"], ['"lables"', '"labels"']),
        ([*runs, "--table", "comparisons"], ["comparisons", "rates"]),
    ):
        done = run("table", *arguments)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert not [token for token in tokens if token not in done.stderr], done.stderr
    assert error_code(run("table", runs[0], "--format", "json")) == "unknown-name"
    done = run("table", runs[0], "--format", "latex")
    assert error_code(done) == "unknown-name"
    assert not [token for token in ('"latex"', '"tex"', "csv, tex, md") if token not in done.stderr]
