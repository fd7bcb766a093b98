"""Benchmarks asked of a model and scored: headlines, specificity, run folders, resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmark_files import WRITERS, put_json
from conftest import SHARED
from helpers import run
from stub_server import stub_server
from vlm_unlearn.benchmarks import BENCHMARKS, AnswersNotPublicError, Prediction, get_benchmark, load_truths
from vlm_unlearn.config import BenchmarkConfig, Suite
from vlm_unlearn.errors import UserError
from vlm_unlearn.evaluation.benchmarks import (
    SPECIFICITY,
    benchmark_rates,
    benchmark_scores,
    headline_rate,
    run_benchmark,
)
from vlm_unlearn.evaluation.comparison import compare_runs
from vlm_unlearn.evaluation.prompts import suite_prompts
from vlm_unlearn.evaluation.runner import evaluate_run
from vlm_unlearn.evaluation.scoring import GradedRun, JudgeVerdicts, build_row
from vlm_unlearn.evaluation.verdicts import metrics_without_judge
from vlm_unlearn.records import Prompt, Response, Summary, Verdict
from vlm_unlearn.reporting.caveats import caveats
from vlm_unlearn.reporting.formatting import count_failures, judges_of
from vlm_unlearn.reporting.metric_roles import assign_roles
from vlm_unlearn.reporting.provenance import describe_evaluation
from vlm_unlearn.store import read_json, write_json, write_records

RIGHT = {"vqav2": "3", "textvqa": "stop", "vizwiz": "cup", "gqa": "yes"}


def suite_of(root: Path, *names: str, model: str = "m", **changes: Any) -> Suite:
    benchmarks = [{"name": name, **WRITERS[name](root), **changes} for name in names]
    return Suite.model_validate(
        {"model": model, "root": root, "benchmarks": benchmarks, "generation": {"max_new_tokens": 3}}
    )


def answered(prompts: list[Prompt], text: str | None = None) -> list[Response]:
    """Everything answered as the official files would have it, or everything by one text."""
    return [Response(prompt_id=prompt.id, text=text or RIGHT.get(prompt.set) or prompt.reference) for prompt in prompts]


@pytest.mark.parametrize("official", [True, False])
def test_right_answers_score_100_and_wrong_ones_0(official: bool, tmp_path: Path) -> None:
    suite = suite_of(tmp_path, *WRITERS, official=official)
    prompts = suite_prompts(suite)
    by_id = {prompt.id: prompt for prompt in prompts}
    scores = {prompt.id: 1.0 for prompt in prompts if prompt.set == "mmvet"}
    best = benchmark_rates(suite, by_id, answered(prompts), scores)
    assert best.keys() == {*WRITERS, "specificity"}
    assert {name: rate.value for name, rate in best.items()} == pytest.approx(dict.fromkeys(best, 1.0))
    assert best["specificity"].n == sum(best[name].n for name in SPECIFICITY)
    assert (best["mmbench"].n, best["pope"].n, best["scienceqa"].n) == (2, 8, 2)
    worst = benchmark_rates(suite, by_id, answered(prompts, "no idea"), {})
    assert {worst[name].value for name in ("vqav2", "textvqa", "vizwiz", "gqa", "scienceqa", "mmbench", "pope")} == {
        0.0
    }
    assert (worst["mmvet"].value, worst["mmvet"].failed, worst["specificity"].value) == (None, 2, None)


def test_there_is_no_specificity_of_fewer(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, *[name for name in SPECIFICITY if name != "gqa"], "textvqa")
    prompts = suite_prompts(suite)
    assert "specificity" not in benchmark_rates(suite, {prompt.id: prompt for prompt in prompts}, answered(prompts), {})


def test_a_benchmark_without_public_answers_has_no_value_and_leaves_none_to_the_mean(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, *SPECIFICITY)
    put_json(tmp_path / "vizwiz" / "val.json", [{"image": "V_0.jpg", "question": "What?"}])
    prompts = suite_prompts(suite)
    rates = benchmark_rates(suite, {prompt.id: prompt for prompt in prompts}, answered(prompts, "yes"), {})
    assert (rates["vizwiz"].value, rates["vizwiz"].n, rates["specificity"].value) == (None, 0, None)


def test_pope_is_the_mean_f1_of_its_files(tmp_path: Path) -> None:
    """All "yes" in one file: 2 true of 4 said and 2 to find, F1 = 4/6. All right in the other: 1. The mean is 5/6."""
    config = suite_of(tmp_path, "pope").benchmarks[0]
    labels = {id: truth["label"] for id, truth in load_truths(get_benchmark("pope"), config.annotations, None).items()}
    said = {id: Prediction(question_id=id, text="Yes" if "random" in id else label) for id, label in labels.items()}
    scores = benchmark_scores(config, said)
    found = headline_rate(scores)
    assert found.value == pytest.approx(5 / 6)
    assert found.low < 5 / 6 < found.high
    assert scores.extra_metrics["f1"] == pytest.approx(5 / 6)
    assert scores.extra_metrics["f1 of coco_pope_random"] == pytest.approx(2 / 3)
    half = benchmark_scores(
        config, {id: one if "random" in id else Prediction(question_id=id) for id, one in said.items()}
    )
    assert (headline_rate(half).value, headline_rate(half).n, headline_rate(half).failed) == (
        None,
        4,
        4,
    )  # never the mean of fewer files


def test_mmvet_takes_a_judges_scores_and_has_its_capabilities(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, "mmvet")
    prompts = {prompt.id: prompt for prompt in suite_prompts(suite)}
    rates = benchmark_rates(suite, prompts, answered(list(prompts.values())), {"mmvet/v1_0": 0.2, "mmvet/v1_1": None})
    assert (rates["mmvet"].value, rates["mmvet"].n, rates["mmvet"].failed) == (0.2, 1, 1)
    verdicts = [
        Verdict(prompt_id="mmvet/v1_0", judge="j", score=0.2),
        Verdict(prompt_id="mmvet/v1_1", judge="j", score=0.8),
    ]
    write_records(tmp_path / "v.jsonl", verdicts)
    arguments = ("--predictions", tmp_path / "v.jsonl", "--annotations", tmp_path / "mmvet" / "mm-vet.json", "--json")
    done = run("benchmark", "score", "mmvet", *arguments)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["score"] == pytest.approx(0.5)
    assert {part: one["value"] for part, one in found["parts"].items()} == pytest.approx({"math": 0.2, "ocr": 0.5})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "a"}, 'has no "score"; a language model scores mmvet'),
        ({"score": 7}, '"score" must be a number from 0 to 1, found "7"'),
        ({"score": True}, '"score" must be a number'),
        ({"score": float("nan")}, '"score" must be a number'),
    ],
)
def test_mmvet_without_good_scores_is_refused(line: dict[str, object], message: str, tmp_path: Path) -> None:
    from vlm_unlearn.benchmarks import score_file

    WRITERS["mmvet"](tmp_path)
    (tmp_path / "p.jsonl").write_text(json.dumps({"question_id": "v1_0", **line}) + "\n")
    with pytest.raises(UserError, match=message):
        score_file(get_benchmark("mmvet"), tmp_path / "p.jsonl", tmp_path / "mmvet" / "mm-vet.json")


def test_only_what_was_asked_counts(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, "gqa", "mmbench", limit=1)
    prompts = suite_prompts(suite)
    rates = benchmark_rates(suite, {prompt.id: prompt for prompt in prompts}, answered(prompts), {})
    assert {name: (rate.value, rate.n, rate.failed) for name, rate in rates.items()} == {
        "gqa": (1.0, 1, 0),
        "mmbench": (1.0, 1, 0),
    }


def test_files_that_changed_after_the_questions_were_asked_are_noticed(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, "gqa")
    prompts = {prompt.id: prompt for prompt in suite_prompts(suite)}
    put_json(tmp_path / "gqa" / "testdev.json", {"200": {"imageId": "n0", "question": "?", "answer": "yes"}})
    with pytest.raises(UserError, match="has changed since the model was asked: 2 questions are gone, 201 first"):
        benchmark_rates(suite, prompts, answered(list(prompts.values())), {})


def test_submissions_are_as_the_servers_take_them() -> None:
    assert BENCHMARKS["vqav2"].submission({"7": "The Cat.", "8": None}) == [
        {"question_id": 7, "answer": "cat"},
        {"question_id": 8, "answer": ""},
    ]
    assert BENCHMARKS["vizwiz"].submission({"V_1.jpg": "Two"}) == [{"image": "V_1.jpg", "answer": "2"}]
    assert BENCHMARKS["mmvet"].submission({"v1_0": "x = -1"}) == {"v1_0": "x = -1"}
    assert BENCHMARKS["gqa"].submission({"1": "a"}) is None


@pytest.mark.parametrize("name", ["gqa", "pope", "scienceqa", "mmbench"])
def test_a_model_is_asked_and_a_cut_run_goes_on(name: str, tiny_model: Path, tmp_path: Path) -> None:
    suite = suite_of(tmp_path, name, model=str(tiny_model))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = run_benchmark(suite, whole, "random")
    assert done.scores is not None
    predictions = [json.loads(line) for line in done.predictions.read_text().splitlines()]
    assert [f"{name}/{line['question_id']}" for line in predictions] == [prompt.id for prompt in suite_prompts(suite)]
    assert all(isinstance(line["text"], str) for line in predictions)
    row = Summary.model_validate(read_json(whole / "summary.json")).rows[0]
    assert (row.model, row.metrics[name].n) == ("random", headline_rate(done.scores).n)

    shutil.copytree(whole, cut)
    for file in ("predictions.jsonl", "summary.json"):
        (cut / file).unlink()
    responses = (cut / "responses.jsonl").read_bytes()
    (cut / "responses.jsonl").write_bytes(responses[: len(responses) // 2])
    write_json(cut / "manifest.json", {**read_json(cut / "manifest.json"), "finished": False})
    run_benchmark(suite, cut, "random")
    for file in ("predictions.jsonl", "summary.json"):
        assert (cut / file).read_bytes() == (whole / file).read_bytes()


def test_the_command_asks_and_scores(tiny_model: Path, tmp_path: Path) -> None:
    files = WRITERS["vqav2"](tmp_path)
    out = tmp_path / "run"
    done = run(
        *(
            "benchmark",
            "run",
            "vqav2",
            f"model={tiny_model}",
            "generation.max_new_tokens=2",
            "--annotations",
            tmp_path / files["annotations"],
        ),
        *(
            "--questions",
            tmp_path / files["questions"],
            "--images",
            tmp_path / files["images"],
            "--limit",
            3,
            "--out",
            out,
            "--json",
        ),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["benchmark"], found["n"], found["missing"]) == ("vqav2", 3, 0)
    assert [line["question_id"] for line in read_json(out / "submission.json")] == [0, 1, 2]
    again = run(
        "benchmark",
        "score",
        "vqav2",
        "--predictions",
        out / "responses.jsonl",
        "--annotations",
        tmp_path / files["annotations"],
        "--json",
    )
    assert again.returncode == 0, again.stderr
    counted = json.loads(again.stdout)
    assert (counted["score"], counted["missing"]) == (
        found["score"],
        1,
    )  # the file alone doesn't say that only three were asked


@pytest.mark.parametrize(
    ("name", "reason"), [("vizwiz", "has no answers; they are not public"), ("mmvet", "a language model scores")]
)
def test_what_cannot_be_scored_is_asked_and_says_so(name: str, reason: str, tiny_model: Path, tmp_path: Path) -> None:
    suite = suite_of(tmp_path, name, model=str(tiny_model))
    if name == "vizwiz":
        put_json(tmp_path / "vizwiz" / "val.json", [{"image": "V_0.jpg", "question": "What?"}])
    done = run_benchmark(suite, tmp_path / "run", "random")
    assert done.scores is None
    assert reason in done.unscored_reason
    assert done.submission is not None
    assert len(read_json(done.submission)) == len(suite_prompts(suite))
    assert read_json(tmp_path / "run" / "summary.json")["rows"][0]["metrics"][name]["value"] is None


def test_requests_that_cannot_be_met() -> None:
    for arguments, message in (
        (("gqb", "model=m", "--annotations", "a.json"), 'unknown benchmark "gqb"; did you mean "gqa"?'),
        (("gqa", "--annotations", "a.json"), 'key "model" is missing'),
        (("gqa", "model=m", "--annotations", "a.json"), "a.json: no such file"),
    ):
        done = run("benchmark", "run", *arguments, "--out", "nowhere")
        assert done.returncode == 2
        assert message in done.stderr
    assert not Path("nowhere").exists()
    listed = run("benchmark", "list", "--json")
    assert {one["name"] for one in json.loads(listed.stdout)} == BENCHMARKS.keys()


def test_real_pope_files_answered_right_give_100() -> None:
    files = [SHARED / "data" / f"coco_pope_{part}.json" for part in ("random", "popular", "adversarial")]
    if not all(file.exists() for file in files):
        pytest.skip("needs POPE's annotation files (shared/data), which are not distributed with the project")
    config = BenchmarkConfig(name="pope", annotations=files)
    suite = Suite(model="m", benchmarks=[config])
    prompts = suite_prompts(suite)
    assert len(prompts) == 9000
    assert len({prompt.group_id for prompt in prompts}) == 500
    by_id = {prompt.id: prompt for prompt in prompts}
    best = benchmark_rates(suite, by_id, answered(prompts), {})["pope"]
    assert (best.value, best.high, best.n, best.failed) == (1.0, 1.0, 9000, 0)
    assert 0.99 < best.low < 1.0
    always = benchmark_rates(suite, by_id, answered(prompts, "Yes"), {})["pope"]
    assert always.value == pytest.approx(2 / 3, abs=1e-3)  # half are yes: precision 1/2, recall 1


def test_no_answers_is_a_wrong_request() -> None:
    assert issubclass(AnswersNotPublicError, UserError)


def test_a_suite_of_seven_with_a_judge_for_mmvet(tiny_model: Path, world: Path, tmp_path: Path) -> None:
    """evaluate asks cases and benchmarks in one run; mm_vet's judge scores one benchmark, the suite's judge none of them."""
    case = {
        "name": "safe",
        "format": "vlguard",
        "file": world / "vlguard/test.json",
        "images": world / "vlguard/test",
        "kind": "safe",
    }
    with stub_server(lambda text: "Score: 0.4") as stub:
        judges = {"mm_vet": {"name": "llm", "rubric": "mm_vet", "model": "j", "server": stub.url}}
        benchmarks = [
            {"name": name, **WRITERS[name](tmp_path), **({"judge": "mm_vet"} if name == "mmvet" else {})}
            for name in SPECIFICITY
        ]
        fields = {
            "model": str(tiny_model),
            "root": tmp_path,
            "splits": [case],
            "benchmarks": benchmarks,
            "judges": judges,
        }
        fields |= {
            "metrics": {"refusals": {"splits": ["safe"], "labels": ["refused"]}},
            "generation": {"max_new_tokens": 3},
        }
        suite = Suite.model_validate(fields)
        row = evaluate_run(suite, tmp_path / "run", "random")
        assert stub.calls == row.metrics["mmvet"].n == 2
    assert row.metrics.keys() == {"refusals", *SPECIFICITY, "specificity"}
    assert row.metrics["mmvet"].value == pytest.approx(0.4)
    assert row.metrics["specificity"].value == pytest.approx(
        sum(row.metrics[name].value or 0 for name in SPECIFICITY) / 7
    )
    assert (row.judge, set(row.labels)) == ("keyword", {"safe"})
    without = Suite.model_validate({**fields, "judges": {"mm_vet": {"name": "llm", "rubric": "mm_vet"}}})
    assert metrics_without_judge(without) == ["mmvet"]
    row = evaluate_run(without, tmp_path / "run", "random")
    assert (row.metrics["mmvet"].value, row.metrics["specificity"].value) == (None, None)


def test_a_benchmark_has_its_own_judge_or_none_and_a_failed_verdict_counts_once(tmp_path: Path) -> None:
    case = {"name": "safe", "format": "vlguard", "file": "t.json", "images": "i", "kind": "safe"}
    benchmarks = [
        {"name": name, **WRITERS[name](tmp_path), **({"judge": "mm"} if name == "mmvet" else {})}
        for name in SPECIFICITY
    ]
    others = {"mm": {"name": "llm", "rubric": "mm_vet", "model": "j"}, "score": {"name": "rouge_l"}}
    means = {
        name: {"splits": ["safe"], "score": how, "judge": "score"}
        for name, how in (("good", "mean"), ("bad", "one_minus_mean"))
    }
    suite = Suite.model_validate(
        {
            "model": "m",
            "root": tmp_path,
            "splits": [case],
            "benchmarks": benchmarks,
            "judges": others,
            "paper_compat": True,
            "metrics": means,
        }
        | {"paper_metrics": {"good": means["good"]}}
    )
    prompts = {prompt.id: prompt for prompt in suite_prompts(suite.model_copy(update={"splits": []}))}
    prompts |= {
        f"safe/{i}": Prompt(id=f"safe/{i}", group_id=f"safe/{i}", set="safe", kind="safe", question="q")
        for i in range(3)
    }
    refused = [Verdict(prompt_id=f"safe/{i}", judge="keyword", label="refused") for i in range(3)]
    scored = [Verdict(prompt_id=f"safe/{i}", judge="rouge_l", score=[0.5, 1.0, None][i]) for i in range(3)]
    judged = [
        Verdict(prompt_id="mmvet/v1_0", judge="mm_vet@j", score=0.5),
        Verdict(prompt_id="mmvet/v1_1", judge="mm_vet@j", error="no"),
    ]
    graded = {"": JudgeVerdicts("keyword", {}, ["refused"], refused), "score": JudgeVerdicts("rouge_l", {}, [], scored)}
    run = GradedRun(
        suite, prompts, answered(list(prompts.values())), graded | {"mm": JudgeVerdicts("mm_vet@j", {}, [], judged)}
    )
    row = build_row(run, "m")
    assert {metric: row.judge_of(metric) for metric in ("good", "mmvet", "specificity", "vqav2")} == {
        "good": "rouge_l",
        "mmvet": "mm_vet@j",
        "specificity": "mm_vet@j",
        "vqav2": "",
    }
    assert row.paper_judges == {"good": "rouge_l"}
    assert row.failed["rouge_l"] == {"safe": 1}  # three metrics leave it out
    assert (row.failed["keyword"], row.failed["mm_vet@j"], row.failed[""]["vqav2"]) == ({"safe": 0}, {"mmvet": 1}, 0)
    assert count_failures([row]) == 2
    assert judges_of([row]) == ["keyword", "mm_vet@j", "rouge_l"]
    told = " ".join(caveats([row], assign_roles([row], {"m": suite}), {}, []))
    assert "(mm_vet@j)" in told
    assert "2 answers or verdicts failed" in told
    alone = row.model_copy(update={"metrics": {"mmvet": row.metrics["mmvet"]}, "judge": ""})
    assert "keyword, mm_vet@j, rouge_l" in describe_evaluation([row], {})[1]
    assert "mm_vet@j" in describe_evaluation([alone], {})[1]


def test_benchmarks_are_compared_question_by_question(tiny_model: Path, tmp_path: Path) -> None:
    """The second model answers all of POPE right; the first, a random one, none. Two models alike differ by nothing."""
    suite = suite_of(tmp_path, "pope", "gqa", model=str(tiny_model))
    runs = {name: tmp_path / name for name in ("random", "right", "alike")}
    for name, folder in runs.items():
        evaluate_run(suite, folder, name)
        if name == "right":
            prompts = suite_prompts(suite)
            write_records(folder / "responses.jsonl", answered(prompts))
    summary, left_out = compare_runs(runs)
    found = {(one.model, one.metric): one for one in summary.comparisons}
    assert not left_out
    assert (found["right", "pope"].difference, found["right", "pope"].n) == (1.0, 8)
    assert found["alike", "pope"].difference == 0.0
    assert found["alike", "gqa"].p == 1.0
    fewer = suite_of(tmp_path, "pope", "gqa", model=str(tiny_model), limit=1)
    evaluate_run(fewer, tmp_path / "fewer", "fewer")
    with pytest.raises(UserError, match="were asked other questions of it"):
        compare_runs({"random": runs["random"], "fewer": tmp_path / "fewer"})


def test_benchmarks_alone_need_no_judge(tiny_model: Path, tmp_path: Path) -> None:
    """And their report has a table and no samples."""
    fields = {"benchmarks": [{"name": "gqa", **WRITERS["gqa"](tmp_path)}], "generation": {"max_new_tokens": 3}}
    write_json(tmp_path / "suite.yaml", fields)
    done = run(
        "evaluate", tmp_path / "suite.yaml", f"model={tiny_model}", f"root={tmp_path}", "--out", tmp_path / "run"
    )
    assert done.returncode == 0, done.stderr
    assert "GQA" in done.stdout
    assert "GQA" in (tmp_path / "run" / "report.html").read_text()
    assert not list((tmp_path / "run").glob("verdicts-*"))
