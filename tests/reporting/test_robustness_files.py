"""Robustness results are found and belong to the model with the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import raises_code
from robustness_results import REMOVES, report, write_report_file
from vlm_unlearn.reporting.robustness.files import find_robustness, read_robustness
from vlm_unlearn.store import RunDirectory

A, B, C = ("a" * 64, "b" * 64, "c" * 64)


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Path]:
    """Three evaluations of a project: two with the digests of their weights, and one of a server's model."""
    folders = {}
    for name, weights in (("base", A), ("po+pd", B), ("server", "https://example.org")):
        folders[name] = tmp_path / "evaluations" / name
        RunDirectory(folders[name]).open({"kind": "evaluate", "model": weights})
    return folders


def test_results_next_to_the_evaluations_are_used(tmp_path: Path, runs: dict[str, Path]) -> None:
    assert find_robustness(runs).by_model == {}
    write_report_file(tmp_path / "robustness" / "po_pd", report(model="po_pd"), weights=B)  # another name
    write_report_file(tmp_path / "robustness" / "server", report(model="server"))  # unknown weights, the same name
    write_report_file(tmp_path / "robustness" / "other", report(model="other"), weights=C)  # of no row
    write_report_file(tmp_path / "robustness" / "base", report(model="base"), weights=C)  # stale
    (tmp_path / "robustness" / "empty").mkdir()
    files = find_robustness(runs)
    assert list(files.by_model) == ["po+pd", "server"]
    (left_out,) = files.left_out
    assert "base" in left_out


def test_results_that_the_user_passes_come_first(tmp_path: Path, runs: dict[str, Path]) -> None:
    write_report_file(tmp_path / "robustness" / "po_pd", report(model="po_pd"), weights=B)
    again = write_report_file(tmp_path / "again" / "po_pd", report(REMOVES, model="po_pd"), weights=B)
    write_report_file(tmp_path / "again" / "other", report(model="other"), weights=C)
    for folders in ([again.parent], [again, again.parent / "other"], [again.parent, again]):
        files = find_robustness(runs, folders)
        assert list(files.by_model) == ["po+pd", "other"]
        assert files.by_model["po+pd"] == report(REMOVES, model="po_pd")


def test_a_model_with_the_same_weights_and_name_is_preferred(tmp_path: Path, runs: dict[str, Path]) -> None:
    runs["base+prompt"] = tmp_path / "evaluations" / "base+prompt"
    RunDirectory(runs["base+prompt"]).open({"kind": "evaluate", "model": A})
    folder = write_report_file(tmp_path / "attacked" / "x", report(model="base+prompt"), weights=A)
    assert list(find_robustness(runs, [folder]).by_model) == ["base+prompt"]


def test_models_without_an_evaluation_have_unique_names(tmp_path: Path, runs: dict[str, Path]) -> None:
    first = write_report_file(tmp_path / "x", report(model="new"), weights=C)
    second = write_report_file(tmp_path / "y", report(model="new"), weights="d" * 64)
    assert list(find_robustness(runs, [first, second]).by_model) == ["new", str(second)]


def test_results_of_other_weights_are_an_error(tmp_path: Path, runs: dict[str, Path]) -> None:
    folder = write_report_file(tmp_path / "attacked", report(model="po+pd"), weights=C)
    with raises_code("weights-mismatch"):
        find_robustness(runs, [folder])


def test_two_results_of_a_model_are_an_error(tmp_path: Path, runs: dict[str, Path]) -> None:
    folders = [write_report_file(tmp_path / name, report(model="po+pd"), weights=B) for name in ("x", "y")]
    with raises_code("duplicate-id"):
        find_robustness(runs, folders)


def test_missing_and_invalid_files_are_errors(tmp_path: Path, runs: dict[str, Path]) -> None:
    with raises_code("file-not-found"):
        find_robustness(runs, [tmp_path / "nowhere"])
    with raises_code("file-not-found"):
        find_robustness(runs, [tmp_path])
    folder = write_report_file(tmp_path / "attacked", report())
    content = json.loads((folder / "robustness.json").read_text())
    for broken in ({**content, "more": 1}, {**content, "attacks": "none"}, []):
        (folder / "robustness.json").write_text(json.dumps(broken))
        with raises_code("invalid-field"):
            read_robustness(folder)
    content["attacks"][1]["recovered"]["high"] = float("inf")
    (folder / "robustness.json").write_text(json.dumps(content))
    with raises_code("invalid-field"):
        read_robustness(folder)
    (folder / "robustness.json").write_text("{")
    with raises_code("invalid-json"):
        read_robustness(folder)
