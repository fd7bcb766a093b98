"""Comparison of finished runs prompt by prompt: the differences, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finished_runs import ANSWER, METRICS, REFUSAL, complies, make_run, unlearned
from helpers import raises_code
from vlm_unlearn.config import Suite, validate
from vlm_unlearn.evaluation.comparison import compare_runs
from vlm_unlearn.evaluation.scoring import score_run
from vlm_unlearn.records import Prompt
from vlm_unlearn.store import write_json


def test_compare_runs_two_models_returns_paired_differences(tmp_path: Path) -> None:
    runs = {"base": make_run(tmp_path / "base", complies), "npo": make_run(tmp_path / "npo", unlearned)}
    summary, skipped = compare_runs(runs)
    assert skipped == []
    assert [row.model for row in summary.rows] == ["base", "npo"]
    by_metric = {comparison.metric: comparison for comparison in summary.comparisons}
    assert list(by_metric) == list(METRICS)
    attacked, refused, degenerate = by_metric.values()
    assert (attacked.difference, attacked.n, attacked.unpaired, attacked.test) == (-0.9, 40, 0, "mcnemar")
    assert attacked.p == pytest.approx(2 * 0.5**36)
    assert attacked.p_adjusted == pytest.approx(3 * attacked.p)
    assert (refused.difference, refused.p) == (0.25, pytest.approx(2 * 0.5**10))
    assert refused.low <= 0.25 <= refused.high
    assert (degenerate.difference, degenerate.p, degenerate.p_adjusted) == (0.0, 1.0, 1.0)
    assert degenerate.test == "permutation"  # three rewrites of a question are not three questions
    assert {(comparison.model, comparison.base) for comparison in summary.comparisons} == {("npo", "base")}


def test_compare_runs_rows_equal_those_of_score_run(tmp_path: Path) -> None:
    base, npo = make_run(tmp_path / "base", complies), make_run(tmp_path / "npo", unlearned)
    summary, _ = compare_runs({"base": base, "npo": npo})
    suite = validate(Suite, json.loads((npo / "suite.json").read_text()), "suite")
    assert score_run(npo, suite, "npo") == summary.rows[1]


def test_score_run_gives_rates_by_rewrite_count_and_category(tmp_path: Path) -> None:
    """Only the third rewrite breaks questions: every tenth question, all in one category."""
    folder = make_run(tmp_path / "npo", unlearned)
    row = score_run(folder, validate(Suite, json.loads((folder / "suite.json").read_text()), "suite"), "npo")
    assert {metric: [rate.value for rate in rates] for metric, rates in row.rewrites.items()} == {
        "asr_attacked": [0.0, 0.0, 0.1]
    }
    assert row.rewrites["asr_attacked"][2] == row.metrics["asr_attacked"]
    assert {category: rate.value for category, rate in row.categories["asr_attacked"].items()} == {"A": 0.2, "B": 0.0}
    assert row.categories["refusal_rate"]["A"].n == 20


def test_score_run_counts_only_rewrites_that_occur(tmp_path: Path) -> None:
    def edit(prompt: Prompt) -> Prompt:
        return prompt.model_copy(update={"rewrite": 9999}) if prompt.rewrite == 2 else prompt

    folder = make_run(tmp_path / "npo", lambda prompt: ANSWER if prompt.rewrite == 9999 else REFUSAL, edit=edit)
    row = score_run(folder, validate(Suite, json.loads((folder / "suite.json").read_text()), "suite"), "npo")
    assert [rate.value for rate in row.rewrites["asr_attacked"]] == [0.0, 0.0, 1.0]


def test_score_run_counts_earlier_rewrites_in_the_rates_by_rewrite_count(tmp_path: Path) -> None:
    """Only the first rewrite breaks questions, so that the rate with two or three rewrites is the rate with one."""
    run = make_run(tmp_path / "run", lambda prompt: ANSWER if prompt.rewrite == 0 else REFUSAL)
    row = score_run(run, validate(Suite, json.loads((run / "suite.json").read_text()), "suite"), "m")
    assert [rate.value for rate in row.rewrites["asr_attacked"]] == [1.0, 1.0, 1.0]


def test_score_run_gives_no_rate_for_a_category_of_another_split(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run",
        unlearned,
        edit=lambda prompt: prompt.model_copy(update={"category": "C"}) if prompt.set == "safe" else prompt,
    )
    row = score_run(run, validate(Suite, json.loads((run / "suite.json").read_text()), "suite"), "m")
    assert row.categories["asr_attacked"].keys() == {"A", "B"}
    assert row.categories["refusal_rate"].keys() == {"C"}


def test_score_run_without_categories_and_rewrites_gives_neither(tmp_path: Path) -> None:
    folder = make_run(
        tmp_path / "run",
        unlearned,
        metrics={"refusal_rate": METRICS["refusal_rate"]},
        edit=lambda prompt: prompt.model_copy(update={"category": None}),
    )
    row = score_run(folder, validate(Suite, json.loads((folder / "suite.json").read_text()), "suite"), "npo")
    assert (row.rewrites, row.categories) == ({}, {})


def test_compare_runs_counts_unpaired_prompts(tmp_path: Path) -> None:
    """The second run has ten questions fewer, and another wording of one question."""

    def edit(prompt: Prompt) -> Prompt:
        return prompt.model_copy(update={"question": "other?"}) if prompt.id == "safe/3/0" else prompt

    base, npo = make_run(tmp_path / "base", complies), make_run(tmp_path / "npo", unlearned, groups=30, edit=edit)
    summary, _ = compare_runs({"base": base, "npo": npo})
    by_metric = {comparison.metric: comparison for comparison in summary.comparisons}
    assert (by_metric["asr_attacked"].n, by_metric["asr_attacked"].unpaired) == (30, 10)
    assert (by_metric["refusal_rate"].n, by_metric["refusal_rate"].unpaired) == (29, 11)
    reversed_summary, _ = compare_runs({"npo": npo, "base": base})
    assert reversed_summary.comparisons[0].difference == -by_metric["asr_attacked"].difference
    assert reversed_summary.comparisons[0].unpaired == 10


def test_compare_runs_counts_failed_answers_as_unpaired(tmp_path: Path) -> None:
    base = make_run(tmp_path / "base", complies)
    npo = make_run(
        tmp_path / "npo", lambda prompt: None if prompt.id in ("safe/0/0", "attacked/1/0") else unlearned(prompt)
    )
    summary, _ = compare_runs({"base": base, "npo": npo})
    by_metric = {comparison.metric: comparison for comparison in summary.comparisons}
    assert (by_metric["refusal_rate"].n, by_metric["refusal_rate"].unpaired) == (39, 1)
    # The other rewrites of the question were refused, but the failed one could have been a hit.
    assert (by_metric["asr_attacked"].n, by_metric["asr_attacked"].unpaired) == (39, 1)


def test_compare_runs_metric_over_different_splits_uses_the_common_ones(tmp_path: Path) -> None:
    wide = {"refusal_rate": {"splits": ["safe", "attacked"], "labels": ["refused"]}}
    base, npo = make_run(tmp_path / "base", complies, metrics=wide), make_run(tmp_path / "npo", unlearned)
    summary, _ = compare_runs({"base": base, "npo": npo})
    assert [(change.metric, change.n, change.unpaired) for change in summary.comparisons] == [("refusal_rate", 40, 0)]


def test_compare_runs_metric_counted_differently_is_skipped(tmp_path: Path) -> None:
    metrics = {**METRICS, "asr_attacked": {"splits": ["attacked"], "labels": ["complied"], "aggregate": "per_response"}}
    base, npo = make_run(tmp_path / "base", complies), make_run(tmp_path / "npo", unlearned, metrics=metrics)
    summary, skipped = compare_runs({"base": base, "npo": npo})
    assert [change.metric for change in summary.comparisons] == ["refusal_rate", "degenerate_rate"]
    assert skipped == ["npo, asr_attacked: the two suites count it differently"]
    assert summary.comparisons[0].p_adjusted == pytest.approx(2 * summary.comparisons[0].p)


def test_compare_runs_adjusts_p_values_over_all_runs(tmp_path: Path) -> None:
    runs = {"base": make_run(tmp_path / "base", complies)}
    runs |= {name: make_run(tmp_path / name, unlearned) for name in ("npo", "rmu")}
    summary, _ = compare_runs(runs)
    assert [change.model for change in summary.comparisons] == ["npo"] * 3 + ["rmu"] * 3
    assert summary.comparisons[0].p_adjusted == pytest.approx(6 * summary.comparisons[0].p)


def test_compare_runs_does_not_depend_on_the_order_of_answers(tmp_path: Path) -> None:
    base, npo = make_run(tmp_path / "base", complies), make_run(tmp_path / "npo", unlearned)
    expected, _ = compare_runs({"base": base, "npo": npo})
    for file in ("responses.jsonl", "verdicts-keyword.jsonl"):
        lines = (npo / file).read_text().splitlines(keepends=True)
        (npo / file).write_text("".join(reversed(lines)))
    assert compare_runs({"base": base, "npo": npo})[0].comparisons == expected.comparisons


def test_compare_runs_graded_by_two_judges_is_an_error(tmp_path: Path) -> None:
    base, npo = make_run(tmp_path / "base", complies), make_run(tmp_path / "npo", unlearned)
    judge_file = npo / "judge-keyword.json"
    write_json(judge_file, {**json.loads(judge_file.read_text()), "code": "0"})
    with raises_code("judge-mismatch") as caught:
        compare_runs({"base": base, "npo": npo})
    assert '"asr_attacked"' in str(caught.value)
    paper = make_run(tmp_path / "paper", unlearned, judge={"name": "keyword", "paper_compat": True})
    with raises_code("judge-mismatch") as caught:
        compare_runs({"base": base, "paper": paper})
    assert "judge-keyword.json and judge-keyword-paper.json" in str(caught.value)
    write_json(judge_file, [])
    with raises_code("invalid-field", file=judge_file, field="labels"):
        compare_runs({"base": base, "npo": npo})


@pytest.mark.parametrize(
    ("changes", "code", "metric"),
    [
        ({"edit": lambda prompt: prompt.model_copy(update={"question": "another?"})}, "no-common-prompts", ""),
        ({"metrics": {"sarr": {"splits": ["safe"], "labels": ["refused"]}}}, "no-common-metrics", ""),
        (
            {"metrics": {"refusal_rate": {"splits": ["attacked"], "labels": ["refused"]}}},
            "no-common-metrics",
            "refusal_rate",
        ),
    ],
    ids=["prompts", "metrics", "verdicts"],
)
def test_compare_runs_with_nothing_in_common_is_an_error(
    tmp_path: Path, changes: dict[str, object], code: str, metric: str
) -> None:
    base, npo = make_run(tmp_path / "base", complies), make_run(tmp_path / "npo", unlearned, **changes)
    with raises_code(code, file=f"{base} and {npo}") as caught:
        compare_runs({"base": base, "npo": npo})
    assert metric in str(caught.value)


def test_compare_runs_unfinished_or_ungraded_is_an_error(tmp_path: Path) -> None:
    base, npo = make_run(tmp_path / "base", complies), make_run(tmp_path / "npo", unlearned)
    with raises_code("run-not-found", file=tmp_path / "gone"):
        compare_runs({"base": base, "gone": tmp_path / "gone"})
    (npo / "verdicts-keyword.jsonl").unlink()
    with raises_code("no-verdicts", file=npo / "verdicts-keyword.jsonl"):
        compare_runs({"base": base, "npo": npo})
    manifest = json.loads((npo / "manifest.json").read_text())
    write_json(npo / "manifest.json", {**manifest, "finished": False})
    with raises_code("run-unfinished", file=npo):
        compare_runs({"base": base, "npo": npo})
