"""``vlm-unlearn compare`` on finished runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finished_runs import complies, make_run, unlearned
from helpers import run
from vlm_unlearn.records import Summary


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [make_run(tmp_path / "base", complies), make_run(tmp_path / "npo", unlearned)]


def test_table_files_and_json(runs: list[Path], tmp_path: Path) -> None:
    done = run("compare", *runs, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "asr_attacked" in line)
    assert line.split() == ["npo", "asr_attacked", "-90.0", "*", "-97.5,", "-80.0", "8.7e-11", "mcnemar", "40", "0"]
    assert "degenerate_rate" in done.stdout
    assert "significant after Holm's correction over 3 comparisons" in " ".join(done.stdout.split())
    document = json.loads((tmp_path / "out" / "summary.json").read_text())
    summary = Summary.model_validate(document)
    assert [row.model for row in summary.rows] == ["base", "npo"]
    assert [one.metric for one in summary.comparisons] == ["asr_attacked", "refusal_rate", "degenerate_rate"]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert ">-90.0 *</small>" in page
    printed = run("compare", *runs, "--json")
    assert printed.returncode == 0, printed.stderr
    assert json.loads(printed.stdout) == document
    assert not (tmp_path / "summary.json").exists()


def test_runs_of_one_name_are_told_apart_by_path(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "later").mkdir()
    other = make_run(tmp_path / "later" / "base", unlearned)
    printed = run("compare", runs[0], other, "--json")
    assert [row["model"] for row in json.loads(printed.stdout)["rows"]] == [str(runs[0]), str(other)]


def test_wrong_requests(runs: list[Path], tmp_path: Path) -> None:
    for arguments, message in (
        ([runs[0], runs[0]], "is given twice"),
        ([*runs, "--out", runs[1]], "[output-exists]"),
        ([runs[0], tmp_path], "suite.json is missing"),
    ):
        done = run("compare", *arguments)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert message in done.stderr
        assert done.stdout == ""


def test_what_is_not_compared_is_said(runs: list[Path], tmp_path: Path) -> None:
    metrics = {
        "asr_attacked": {"splits": ["attacked"], "labels": ["refused"]},
        "refusal_rate": {"splits": ["safe"], "labels": ["refused"]},
    }
    other = make_run(tmp_path / "other", unlearned, metrics=metrics)
    done = run("compare", runs[0], other, "--json")
    assert [one["metric"] for one in json.loads(done.stdout)["comparisons"]] == ["refusal_rate"]
    assert "not compared: other, asr_attacked: the two suites count it differently" in done.stderr
