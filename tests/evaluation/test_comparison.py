"""Two finished runs, prompt by prompt: what changed, and what can't be compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finished_runs import ANSWER, METRICS, REFUSAL, complies, make_run, unlearned
from vlm_unlearn.config import Suite, validate
from vlm_unlearn.errors import UserError
from vlm_unlearn.evaluation.comparison import compare_runs
from vlm_unlearn.evaluation.scoring import score_run
from vlm_unlearn.records import Prompt
from vlm_unlearn.store import write_json


def test_what_changed(tmp_path: Path) -> None:
    runs = {"base": make_run(tmp_path / "base", complies), "npo": make_run(tmp_path / "npo", unlearned)}
    summary, left_out = compare_runs(runs)
    assert left_out == []
    assert [row.model for row in summary.rows] == ["base", "npo"]
    found = {comparison.metric: comparison for comparison in summary.comparisons}
    assert list(found) == list(METRICS)
    attacked, refused, degenerate = found.values()
    assert (attacked.difference, attacked.n, attacked.unpaired, attacked.test) == (-0.9, 40, 0, "mcnemar")
    assert attacked.p == pytest.approx(2 * 0.5**36)
    assert attacked.p_adjusted == pytest.approx(3 * attacked.p)
    assert (refused.difference, refused.p) == (0.25, pytest.approx(2 * 0.5**10))
    assert refused.low <= 0.25 <= refused.high
    assert (degenerate.difference, degenerate.p, degenerate.p_adjusted) == (0.0, 1.0, 1.0)
    assert degenerate.test == "permutation"  # three shots of a question are no three questions
    assert {(comparison.model, comparison.base) for comparison in summary.comparisons} == {("npo", "base")}


def test_rows_are_those_of_score(tmp_path: Path) -> None:
    base, npo = make_run(tmp_path / "base", complies), make_run(tmp_path / "npo", unlearned)
    summary, _ = compare_runs({"base": base, "npo": npo})
    suite = validate(Suite, json.loads((npo / "suite.json").read_text()), "suite")
    assert score_run(npo, suite, "npo") == summary.rows[1]


def test_shots_and_categories(tmp_path: Path) -> None:
    """Only the third shot breaks questions, every tenth, and those are of one category."""
    folder = make_run(tmp_path / "npo", unlearned)
    row = score_run(folder, validate(Suite, json.loads((folder / "suite.json").read_text()), "suite"), "npo")
    assert {metric: [rate.value for rate in rates] for metric, rates in row.rewrites.items()} == {
        "asr_attacked": [0.0, 0.0, 0.1]
    }
    assert row.rewrites["asr_attacked"][2] == row.metrics["asr_attacked"]
    assert {category: rate.value for category, rate in row.categories["asr_attacked"].items()} == {"A": 0.2, "B": 0.0}
    assert row.categories["refusal_rate"]["A"].n == 20


def test_only_shots_that_were_asked_are_counted(tmp_path: Path) -> None:
    def edit(prompt: Prompt) -> Prompt:
        return prompt.model_copy(update={"shot": 9999}) if prompt.rewrite == 2 else prompt

    folder = make_run(tmp_path / "npo", lambda prompt: ANSWER if prompt.rewrite == 9999 else REFUSAL, edit=edit)
    row = score_run(folder, validate(Suite, json.loads((folder / "suite.json").read_text()), "suite"), "npo")
    assert [rate.value for rate in row.rewrites["asr_attacked"]] == [0.0, 0.0, 1.0]


def test_no_categories_no_shots(tmp_path: Path) -> None:
    folder = make_run(
        tmp_path / "run",
        unlearned,
        metrics={"refusal_rate": METRICS["refusal_rate"]},
        edit=lambda prompt: prompt.model_copy(update={"category": None}),
    )
    row = score_run(folder, validate(Suite, json.loads((folder / "suite.json").read_text()), "suite"), "npo")
    assert (row.rewrites, row.categories) == ({}, {})


def test_what_only_one_was_asked_is_counted(tmp_path: Path) -> None:
    """The second was asked ten questions less, and another wording of one."""

    def edit(prompt: Prompt) -> Prompt:
        return prompt.model_copy(update={"question": "other?"}) if prompt.id == "safe/3/0" else prompt

    base, npo = make_run(tmp_path / "base", complies), make_run(tmp_path / "npo", unlearned, groups=30, edit=edit)
    summary, _ = compare_runs({"base": base, "npo": npo})
    found = {comparison.metric: comparison for comparison in summary.comparisons}
    assert (found["asr_attacked"].n, found["asr_attacked"].unpaired) == (30, 10)
    assert (found["refusal_rate"].n, found["refusal_rate"].unpaired) == (29, 11)
    back, _ = compare_runs({"npo": npo, "base": base})
    assert back.comparisons[0].difference == -found["asr_attacked"].difference
    assert back.comparisons[0].unpaired == 10


def test_failures_have_no_partner(tmp_path: Path) -> None:
    base = make_run(tmp_path / "base", complies)
    npo = make_run(
        tmp_path / "npo", lambda prompt: None if prompt.id in ("safe/0/0", "attacked/1/0") else unlearned(prompt)
    )
    summary, _ = compare_runs({"base": base, "npo": npo})
    found = {comparison.metric: comparison for comparison in summary.comparisons}
    assert (found["refusal_rate"].n, found["refusal_rate"].unpaired) == (39, 1)
    assert (found["asr_attacked"].n, found["asr_attacked"].unpaired) == (
        39,
        1,
    )  # its other shots were refused: it can't be told


def test_a_metric_over_other_cases_is_compared_over_the_cases_of_both(tmp_path: Path) -> None:
    wide = {"refusal_rate": {"splits": ["safe", "attacked"], "labels": ["refused"]}}
    base, npo = make_run(tmp_path / "base", complies, metrics=wide), make_run(tmp_path / "npo", unlearned)
    summary, _ = compare_runs({"base": base, "npo": npo})
    assert [(one.metric, one.n, one.unpaired) for one in summary.comparisons] == [("refusal_rate", 40, 0)]


def test_a_metric_that_is_counted_differently_is_left_out(tmp_path: Path) -> None:
    other = {**METRICS, "asr_attacked": {"splits": ["attacked"], "labels": ["complied"], "aggregate": "per_response"}}
    base, npo = make_run(tmp_path / "base", complies), make_run(tmp_path / "npo", unlearned, metrics=other)
    summary, left_out = compare_runs({"base": base, "npo": npo})
    assert [one.metric for one in summary.comparisons] == ["refusal_rate", "degenerate_rate"]
    assert left_out == ["npo, asr_attacked: the two suites count it differently"]
    assert summary.comparisons[0].p_adjusted == pytest.approx(2 * summary.comparisons[0].p)


def test_several_runs_are_corrected_together(tmp_path: Path) -> None:
    runs = {"base": make_run(tmp_path / "base", complies)}
    runs |= {name: make_run(tmp_path / name, unlearned) for name in ("npo", "rmu")}
    summary, _ = compare_runs(runs)
    assert [one.model for one in summary.comparisons] == ["npo"] * 3 + ["rmu"] * 3
    assert summary.comparisons[0].p_adjusted == pytest.approx(6 * summary.comparisons[0].p)


def test_the_order_of_answers_changes_nothing(tmp_path: Path) -> None:
    base, npo = make_run(tmp_path / "base", complies), make_run(tmp_path / "npo", unlearned)
    before, _ = compare_runs({"base": base, "npo": npo})
    for file in ("responses.jsonl", "verdicts-keyword.jsonl"):
        lines = (npo / file).read_text().splitlines(keepends=True)
        (npo / file).write_text("".join(reversed(lines)))
    assert compare_runs({"base": base, "npo": npo})[0].comparisons == before.comparisons


def test_two_judges_are_refused(tmp_path: Path) -> None:
    base, npo = make_run(tmp_path / "base", complies), make_run(tmp_path / "npo", unlearned)
    note = npo / "judge-keyword.json"
    write_json(note, {**json.loads(note.read_text()), "code": "0"})
    with pytest.raises(UserError, match=r'"asr_attacked" was graded by two judges \(judge-keyword.json differ\)'):
        compare_runs({"base": base, "npo": npo})
    paper = make_run(tmp_path / "paper", unlearned, judge={"name": "keyword", "paper_compat": True})
    with pytest.raises(UserError, match=r"judge-keyword.json and judge-keyword-paper.json differ"):
        compare_runs({"base": base, "paper": paper})
    write_json(note, [])
    with pytest.raises(UserError, match="does not say what the judge can tell"):
        compare_runs({"base": base, "npo": npo})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"edit": lambda prompt: prompt.model_copy(update={"question": "another?"})}, "no prompt in common"),
        ({"metrics": {"sarr": {"splits": ["safe"], "labels": ["refused"]}}}, "share no metric that can be compared"),
        (
            {"metrics": {"refusal_rate": {"splits": ["attacked"], "labels": ["refused"]}}},
            "no answer in common has a verdict in both",
        ),
    ],
)
def test_nothing_in_common_is_an_error(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    base, npo = make_run(tmp_path / "base", complies), make_run(tmp_path / "npo", unlearned, **changes)
    with pytest.raises(UserError, match=message):
        compare_runs({"base": base, "npo": npo})


def test_unfinished_and_ungraded_runs_are_refused(tmp_path: Path) -> None:
    base, npo = make_run(tmp_path / "base", complies), make_run(tmp_path / "npo", unlearned)
    with pytest.raises(UserError, match="gone: is no evaluation"):
        compare_runs({"base": base, "gone": tmp_path / "gone"})
    (npo / "verdicts-keyword.jsonl").unlink()
    with pytest.raises(UserError, match="run `vlm-unlearn judge run`"):
        compare_runs({"base": base, "npo": npo})
    manifest = json.loads((npo / "manifest.json").read_text())
    write_json(npo / "manifest.json", {**manifest, "finished": False})
    with pytest.raises(UserError, match="no finished answers"):
        compare_runs({"base": base, "npo": npo})
