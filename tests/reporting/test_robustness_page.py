"""The section "Is it gone?" of report.html, with hostile names, without a control, with many models, and empty."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from browser import open_page
from finished_runs import REFUSAL, complies, make_run, plot_formats
from helpers import run_in_process
from robustness_results import HIDES, MEETS, REMOVES, report, result, share, write_report_file
from vlm_unlearn.evaluation.comparison import summarize_runs
from vlm_unlearn.reporting.report import write_report
from vlm_unlearn.reporting.robustness.assessment import assess_with_attacks
from vlm_unlearn.reporting.robustness.files import RobustnessFiles
from vlm_unlearn.robustness.results import RobustnessReport
from vlm_unlearn.store import read_json, write_json

browser_test = pytest.mark.browser
HOSTILE = "<img src=x onerror=alert(1)>\u202e$x$"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base, a model that refuses everything, and one with a hostile name."""
    folder = tmp_path_factory.mktemp("project") / "evaluations"
    answers = {"base": complies, "npo": lambda prompt: REFUSAL, HOSTILE: lambda prompt: REFUSAL}
    return {
        name: make_run(folder / f"run{number}", answer, groups=6)
        for number, (name, answer) in enumerate(answers.items())
    }


def write_page(out: Path, runs: Mapping[str, Path], by_model: Mapping[str, RobustnessReport]) -> Path:
    summary = summarize_runs(dict(runs))[0]
    files = RobustnessFiles(by_model, ["The attacks on <b>old</b> are not shown."])
    summary = assess_with_attacks(summary, by_model, {})
    write_json(out / "summary.json", summary.model_dump())
    with plot_formats("svg"):
        return write_report(out, summary, runs, "Attacked", robustness=files)


def hostile_results() -> RobustnessReport:
    named = {f"prefill/{HOSTILE}": (0.3, 1.0, 0.0), "soft_prompt/</script><script>alert(2)</script>": (0.2, 1.0, 0.0)}
    return report({**HIDES, **named}, model=HOSTILE)


def section_of(page: Path) -> str:
    text = page.read_text("utf-8")
    return text[text.index('<h2 id="gone">') : text.index("</section>", text.index('<h2 id="gone">'))]


def test_without_results_there_is_no_section(tmp_path: Path, runs: dict[str, Path]) -> None:
    page = write_page(tmp_path, runs, {})
    assert 'id="gone"' not in page.read_text("utf-8")
    assert "vlm-unlearn robustness" in page.read_text("utf-8")  # in the limits of the numbers
    assert not (tmp_path / "report" / "tables" / "robustness.csv").exists()


def test_section_lists_the_worst_case_first_and_every_picture_has_a_table(
    tmp_path: Path, runs: dict[str, Path]
) -> None:
    by_model = {"npo": report(REMOVES), HOSTILE: hostile_results()}
    text = section_of(write_page(tmp_path, runs, by_model))
    assert text.index("brought back") < text.index("not distinguishable from never having known")
    for caption in (
        "The attack that brings most back",
        "Harmful answers under each attack",
        "Steps of further training",
    ):
        assert f'<caption class="visually-hidden">{caption}' in text
    assert text.count("<svg") == text.count('role="img"') == text.count("<desc>") == 3
    assert "<script" not in text
    assert "<img" not in text
    assert "<b>old</b>" not in text
    assert "\u202e" not in text
    assert {file.stem for file in (tmp_path / "report" / "tables").iterdir()} >= {
        *("robustness", "worst_attacks", "steps_to_half")
    }
    assessments = {row["model"]: row["assessment"] for row in read_json(tmp_path / "summary.json")["rows"]}
    assert assessments["base"]["reasons"][0]["attack"] == ""
    assert any(reason["attack"] == "relearn/10/5" for reason in assessments[HOSTILE]["reasons"])
    # A later report without attacks deletes their tables and plots.
    write_page(tmp_path, runs, {})
    assert not list((tmp_path / "report").rglob("*robustness*"))
    assert not list((tmp_path / "report").rglob("*attack-map*"))


@pytest.mark.parametrize(
    "results",
    [
        report([]),
        report({"none": (0.0, 1.0, 0.0)}),
        report(MEETS),
        report(HIDES, never_knew=None),
        report([result("prefill/4", share(0.0, 0, failed=40), share(0.0, 0, failed=40), share(0.0, 0, failed=3))]),
        report({"probe/likelihood": (0.5, 0.9, 0.1)}, judge="keyword"),
    ],
    ids=["empty", "unattacked", "undefined", "no-control", "unread", "scores"],
)
def test_incomplete_results_are_shown(results: RobustnessReport, tmp_path: Path, runs: dict[str, Path]) -> None:
    text = section_of(write_page(tmp_path, runs, {"npo": results, "without evaluation": results}))
    assert "npo" in text
    assert "without evaluation" in text
    assert not re.search(r"\b(nan|None|inf)\b", text)


@browser_test
def test_section_in_a_browser(browser, tmp_path: Path, runs: dict[str, Path]) -> None:
    many = {f"model {number}": report(REMOVES if number % 2 else MEETS) for number in range(20)}
    page_file = write_page(tmp_path, runs, {"npo": report(REMOVES), HOSTILE: hostile_results(), **many})
    noise: list[str] = []
    page = open_page(browser, page_file, noise, viewport={"width": 1280, "height": 900})
    assert page.locator("nav a[href='#gone']").count() == 1
    heat_map = page.locator("#figure-attack-map svg")
    assert heat_map.is_visible()
    assert any("relearn/10/5, npo: recovered" in text for text in heat_map.locator("title").all_text_contents())
    details = page.locator("section[aria-labelledby=gone] details")
    assert details.count() == 2
    details.first.locator("summary").click()
    assert details.first.locator("tbody tr").first.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert noise == []


def test_report_and_compare_take_robustness_folders(tmp_path: Path, runs: dict[str, Path]) -> None:
    attacked = write_report_file(tmp_path / "attacked" / "run1", report(model="run1"))
    folders = [str(runs["base"]), str(runs["npo"])]
    for command in ("report", "compare"):
        out = tmp_path / command
        done = run_in_process(command, *folders, "--out", str(out), "--robustness", str(attacked.parent), "--json")
        assert done.returncode == 0, done.stderr
        assert "relearn/10/5" in section_of(out / "report.html")
        row = read_json(out / "summary.json")["rows"][1]
        assert row["assessment"]["level"] == "bad"
        assert '"relearn/10/5"' in done.stdout
    wrong = run_in_process("report", *folders, "--out", str(tmp_path / "x"), "--robustness", str(tmp_path / "nowhere"))
    assert wrong.returncode == 2
