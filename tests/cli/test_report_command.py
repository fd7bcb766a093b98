"""``vlm-unlearn report`` on finished runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from finished_runs import complies, make_run, unlearned
from helpers import error_code, raises_code
from helpers import run_in_process as run
from vlm_unlearn.cli.report import save_report
from vlm_unlearn.evaluation.comparison import summarize_runs
from vlm_unlearn.records import Prompt, Summary
from vlm_unlearn.reporting import report
from vlm_unlearn.reporting.provenance import training_run
from vlm_unlearn.store import RunDirectory, digest_model, lock_folder, write_json


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [
        make_run(tmp_path / "evaluations" / "base", complies),
        make_run(tmp_path / "evaluations" / "npo", unlearned),
    ]


@pytest.mark.usefixtures("empty_plots")
def test_report_writes_page_plots_tables_answers_and_summary(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("report", *runs, "--out", out, "--title", "A & B")
    assert done.returncode == 0, done.stderr
    assert f"Report: {out / 'report.html'}" in done.stdout
    assert "-90.0 *" in done.stdout
    assessments = [line for line in done.stdout.splitlines() if line.startswith(("base is ", "npo is "))]
    assert [line.split()[0] for line in assessments] == ["npo", "base"]  # the safer model first
    summary = Summary.model_validate(json.loads((out / "summary.json").read_text()))
    assert [row.model for row in summary.rows] == ["base", "npo"]
    assert len(summary.comparisons) == 3
    assert "<h1><bdi>A &amp; B</bdi></h1>" in (out / "report.html").read_text(encoding="utf-8")
    assert (out / "report" / "answers.html").exists()
    assert (out / "report" / "tables" / "rates.csv").exists()
    assert len(list((out / "report" / "plots").glob("tradeoff-refusals.*"))) == 3
    assert sorted(entry.name for entry in out.iterdir() if entry.name != ".lock") == [
        "report",
        "report.html",
        "summary.json",
    ]
    again = run("report", runs[1], "--out", out, "--json")  # replaces its previous output
    assert again.returncode == 0, again.stderr
    assert [row["model"] for row in json.loads(again.stdout)["rows"]] == ["npo"]
    assert "<h1><bdi>vlm-unlearn: npo</bdi></h1>" in (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("empty_plots")
def test_interrupted_report_leaves_the_previous_one(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted before the page is written: the old page, its numbers and all linked files exist."""
    out = tmp_path / "out"
    assert run("report", *runs, "--out", out).returncode == 0
    previous = {name: (out / name).read_bytes() for name in ("report.html", "summary.json")}
    linked = set((out / "report").rglob("*"))

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "render_page", interrupt)
    folders = {"npo": runs[1]}
    with pytest.raises(KeyboardInterrupt):
        save_report(out, summarize_runs(folders)[0], folders, "interrupted", [], lambda *_: None)
    assert {name: (out / name).read_bytes() for name in previous} == previous
    assert linked <= set((out / "report").rglob("*"))


@pytest.mark.usefixtures("empty_plots")
def test_demo_folder_stands_for_its_evaluations(runs: list[Path], tmp_path: Path) -> None:
    write_json(tmp_path / "summary.json", {"rows": [{"model": "npo"}, {"model": "base"}]})
    done = run("report", tmp_path, "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert [row["model"] for row in json.loads(done.stdout)["rows"]] == ["npo", "base"]


@pytest.mark.usefixtures("empty_plots")
def test_skipped_comparisons_are_printed_and_shown_on_the_page(runs: list[Path], tmp_path: Path) -> None:
    def others(prompt: Prompt) -> Prompt:
        return prompt.model_copy(update={"id": f"other/{prompt.id}"})

    other = make_run(tmp_path / "other", complies, edit=others)
    done = run("report", *runs, other, "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [row["model"] for row in document["rows"]] == ["base", "npo", "other"]
    assert {comparison["model"] for comparison in document["comparisons"]} == {"npo"}
    (note,) = [line.partition("not compared: ")[2] for line in done.stderr.splitlines() if "not compared: " in line]
    assert "other" in note
    assert note[-20:] in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_report_does_not_write_into_other_folders(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "paper.tex").write_text("")
    (tmp_path / "notes" / "report").mkdir(parents=True)
    (tmp_path / "notes" / "report" / "chapter.txt").write_text("")
    (tmp_path / "file").write_text("")
    for out, code, name in (
        (runs[0], "output-exists", ""),
        (tmp_path / "paper", "output-exists", "paper.tex"),
        (tmp_path / "notes", "output-exists", "chapter.txt"),
        (tmp_path / "file", "not-a-folder", ""),
    ):
        done = run("report", *runs, "--out", out)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert str(out) in done.stderr
        assert name in done.stderr
        assert error_code(done) == code
    missing = run("report", tmp_path / "paper", "--out", tmp_path / "out")
    assert (missing.returncode, error_code(missing)) == (2, "run-not-found")
    assert str(tmp_path / "paper") in missing.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    ["report.html", "summary.json", "report", "report/answers.html", "report/images", "report/tables", "report/plots"],
)
def test_report_does_not_follow_links_in_its_folder(name: str, tmp_path: Path) -> None:
    link, elsewhere = tmp_path / "out" / name, tmp_path / "elsewhere"
    link.parent.mkdir(parents=True)
    if "." in name:
        elsewhere.write_text("mine")
    else:
        elsewhere.mkdir()
    link.symlink_to(elsewhere)
    with raises_code("output-exists", file=link):
        report.validate_report_folder(tmp_path / "out")


def test_report_folder_can_not_be_a_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with raises_code("not-a-folder", file=tmp_path / "out"):
        report.validate_report_folder(tmp_path / "out")


@pytest.mark.usefixtures("empty_plots")
def test_long_path_is_printed_on_one_line(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / ("long " * 40).strip()
    done = run("compare", *runs, "--out", out)
    assert f"Report: {out / 'report.html'}" in done.stdout.splitlines()


def test_report_folder_is_locked_while_it_is_written(runs: list[Path], tmp_path: Path) -> None:
    folders = {"npo": runs[1]}
    with lock_folder(tmp_path / "out"), raises_code("run-locked", file=tmp_path / "out"):
        save_report(tmp_path / "out", summarize_runs(folders)[0], folders, "second", [], lambda *_: None)


def test_training_run_of_an_evaluation_is_found_also_after_a_move(tmp_path: Path) -> None:
    trained = tmp_path / "work" / "runs" / "npo"
    RunDirectory(trained).open({"kind": "train"})
    (trained / "model").mkdir()
    evaluation = tmp_path / "work" / "evaluations" / "npo"
    for model in (trained, trained / "model"):
        assert training_run(str(model), evaluation) == trained
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "work", moved)
    assert training_run(str(trained / "model"), moved / "evaluations" / "npo") == moved / "runs" / "npo"
    write_json(moved / "runs" / "npo" / "model" / "config.json", {})
    other = tmp_path / "moved" / "evaluations" / "other"
    RunDirectory(other).open({"kind": "evaluate", "model": "d" * 64})
    assert training_run(str(trained / "model"), other) is None  # the same path, other weights
    same = tmp_path / "moved" / "evaluations" / "same"
    RunDirectory(same).open({"kind": "evaluate", "model": digest_model(moved / "runs" / "npo" / "model")})
    assert training_run(str(trained / "model"), same) == moved / "runs" / "npo"
    RunDirectory(tmp_path / "evaluated").open({"kind": "evaluate"})
    assert training_run(str(tmp_path / "evaluated"), evaluation) is None
    assert training_run("org/model", evaluation) is None
