"""Utility benchmarks in a suite: headlines, specificity, run folders, resuming, judges and comparison."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmark_files import WRITERS, put_json
from conftest import SHARED
from helpers import raises_code, run_in_process
from stub_server import stub_server
from vlm_unlearn.benchmarks import BENCHMARKS, AnswersNotPublicError, Prediction, get_benchmark, load_truths, score_file
from vlm_unlearn.config import BenchmarkConfig, Suite
from vlm_unlearn.errors import UserError
from vlm_unlearn.evaluation.benchmarks import (
    SPECIFICITY_BENCHMARKS,
    benchmark_rates,
    benchmark_scores,
    headline_rate,
    run_benchmark,
)
from vlm_unlearn.evaluation.comparison import compare_runs, summarize_runs
from vlm_unlearn.evaluation.prompts import suite_prompts
from vlm_unlearn.evaluation.runner import evaluate_run
from vlm_unlearn.evaluation.scoring import GradedRun, JudgeVerdicts, build_row
from vlm_unlearn.evaluation.verdicts import judge_run, metrics_without_judge
from vlm_unlearn.records import Prompt, Response, Summary, Verdict
from vlm_unlearn.reporting.caveats import caveats
from vlm_unlearn.reporting.formatting import count_failures, judges_of
from vlm_unlearn.reporting.metric_roles import assign_roles
from vlm_unlearn.reporting.provenance import describe_evaluation
from vlm_unlearn.store import RunDirectory, read_json, write_json, write_records

RIGHT = {"vqav2": "3", "textvqa": "stop", "vizwiz": "cup", "gqa": "yes"}


def suite_of(root: Path, *names: str, model: str = "m", **changes: Any) -> Suite:
    benchmarks = [{"name": name, **WRITERS[name](root), **changes} for name in names]
    return Suite.model_validate(
        {"model": model, "root": root, "benchmarks": benchmarks, "generation": {"max_new_tokens": 3}}
    )


def answered(prompts: list[Prompt], text: str | None = None) -> list[Response]:
    """Returns the right answer to every prompt, or one text for all."""
    return [Response(prompt_id=prompt.id, text=text or RIGHT.get(prompt.set) or prompt.reference) for prompt in prompts]


@pytest.mark.parametrize("official", [True, False])
def test_benchmark_rates_are_1_for_right_and_0_for_wrong_answers(official: bool, tmp_path: Path) -> None:
    suite = suite_of(tmp_path, *WRITERS, official=official)
    prompts = suite_prompts(suite)
    by_id = {prompt.id: prompt for prompt in prompts}
    verdicts = {
        prompt.id: Verdict(prompt_id=prompt.id, judge="j", score=1.0, numbers={"reference": 8.0, "answer": 8.0})
        for prompt in prompts
        if prompt.set in ("mmvet", "llava_bench")
    }
    best = benchmark_rates(suite, by_id, answered(prompts), verdicts)
    assert best.keys() == {*WRITERS, "specificity"}
    assert {name: rate.value for name, rate in best.items()} == pytest.approx(dict.fromkeys(best, 1.0))
    assert best["specificity"].n == sum(best[name].n for name in SPECIFICITY_BENCHMARKS)
    assert (best["mmbench"].n, best["pope"].n, best["scienceqa"].n) == (2, 8, 2)
    worst = benchmark_rates(suite, by_id, answered(prompts, "no idea"), {})
    names = ("vqav2", "textvqa", "vizwiz", "gqa", "scienceqa", "mmbench", "mmbench_cn", "pope", "seedbench", "qbench")
    assert {worst[name].value for name in names} == {0.0}
    # "no idea" is read as no, which is right for one question of each image: accuracy 1/2, accuracy+ 0, mean 1/4.
    assert worst["mme"].value == 0.25
    assert (worst["llava_bench"].value, worst["llava_bench"].failed) == (None, 3)
    assert (worst["mmvet"].value, worst["mmvet"].failed, worst["specificity"].value) == (None, 2, None)


def test_benchmark_rates_have_no_specificity_of_fewer_benchmarks(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, *[name for name in SPECIFICITY_BENCHMARKS if name != "gqa"], "textvqa")
    prompts = suite_prompts(suite)
    assert "specificity" not in benchmark_rates(suite, {prompt.id: prompt for prompt in prompts}, answered(prompts), {})


def test_benchmark_rates_without_public_answers_have_no_value_and_no_specificity(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, *SPECIFICITY_BENCHMARKS)
    put_json(tmp_path / "vizwiz" / "val.json", [{"image": "V_0.jpg", "question": "What?"}])
    prompts = suite_prompts(suite)
    rates = benchmark_rates(suite, {prompt.id: prompt for prompt in prompts}, answered(prompts, "yes"), {})
    assert (rates["vizwiz"].value, rates["vizwiz"].n, rates["specificity"].value) == (None, 0, None)


def test_pope_headline_is_the_mean_f1_of_its_files(tmp_path: Path) -> None:
    """One file is answered with 4 "yes", of which 2 are right: F1 = 4/6. The other is answered right: 1. Mean 5/6."""
    config = suite_of(tmp_path, "pope").benchmarks[0]
    labels = {id: truth["label"] for id, truth in load_truths(get_benchmark("pope"), config.annotations, None).items()}
    predictions = {
        id: Prediction(question_id=id, text="Yes" if "random" in id else label) for id, label in labels.items()
    }
    scores = benchmark_scores(config, predictions)
    headline = headline_rate(scores)
    assert headline.value == pytest.approx(5 / 6)
    assert headline.low < 5 / 6 < headline.high
    assert scores.extra_metrics["f1"] == pytest.approx(5 / 6)
    assert scores.extra_metrics["f1 of coco_pope_random"] == pytest.approx(2 / 3)
    one_file = {
        id: prediction if "random" in id else Prediction(question_id=id) for id, prediction in predictions.items()
    }
    headline = headline_rate(benchmark_scores(config, one_file))
    assert (headline.value, headline.n, headline.failed) == (None, 4, 4)  # never the mean of fewer files


def test_mmvet_uses_judge_scores_and_reports_capabilities(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, "mmvet")
    prompts = {prompt.id: prompt for prompt in suite_prompts(suite)}
    verdicts = [
        Verdict(prompt_id="mmvet/v1_0", judge="j", score=0.2),
        Verdict(prompt_id="mmvet/v1_1", judge="j", error="no reply"),
    ]
    by_id = {verdict.prompt_id: verdict for verdict in verdicts}
    rates = benchmark_rates(suite, prompts, answered(list(prompts.values())), by_id)
    assert (rates["mmvet"].value, rates["mmvet"].n, rates["mmvet"].failed) == (0.2, 1, 1)
    verdicts = [
        Verdict(prompt_id="mmvet/v1_0", judge="j", score=0.2),
        Verdict(prompt_id="mmvet/v1_1", judge="j", score=0.8),
    ]
    write_records(tmp_path / "v.jsonl", verdicts)
    arguments = ("--predictions", tmp_path / "v.jsonl", "--annotations", tmp_path / "mmvet" / "mm-vet.json", "--json")
    done = run_in_process("benchmark", "score", "mmvet", *arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["score"] == pytest.approx(0.5)
    assert {name: rate["value"] for name, rate in result["parts"].items()} == pytest.approx({"math": 0.2, "ocr": 0.5})


@pytest.mark.parametrize(
    ("line", "code", "record"),
    [
        ({"text": "a"}, "missing-field", None),
        ({"score": 7}, "invalid-field", '"v1_0"'),
        ({"score": True}, "invalid-field", '"v1_0"'),
        ({"score": float("nan")}, "invalid-field", '"v1_0"'),
    ],
)
def test_mmvet_without_valid_scores_is_an_error(
    line: dict[str, object], code: str, record: str | None, tmp_path: Path
) -> None:
    WRITERS["mmvet"](tmp_path)
    (tmp_path / "p.jsonl").write_text(json.dumps({"question_id": "v1_0", **line}) + "\n")
    with raises_code(code, record=record, field="score"):
        score_file(get_benchmark("mmvet"), tmp_path / "p.jsonl", tmp_path / "mmvet" / "mm-vet.json")


def test_benchmark_rates_with_a_limit_count_the_asked_questions_only(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, "gqa", "mmbench", limit=1)
    prompts = suite_prompts(suite)
    rates = benchmark_rates(suite, {prompt.id: prompt for prompt in prompts}, answered(prompts), {})
    assert {name: (rate.value, rate.n, rate.failed) for name, rate in rates.items()} == {
        "gqa": (1.0, 1, 0),
        "mmbench": (1.0, 1, 0),
    }


def test_benchmark_rates_after_a_change_of_the_files_is_an_error(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, "gqa")
    prompts = {prompt.id: prompt for prompt in suite_prompts(suite)}
    put_json(tmp_path / "gqa" / "testdev.json", {"200": {"imageId": "n0", "question": "?", "answer": "yes"}})
    with raises_code("run-mismatch", file=tmp_path / "gqa" / "testdev.json") as caught:
        benchmark_rates(suite, prompts, answered(list(prompts.values())), {})
    assert '"201"' in str(caught.value)


def test_submission_has_the_format_of_the_server() -> None:
    assert BENCHMARKS["vqav2"].submission({"7": "The Cat.", "8": None}) == [
        {"question_id": 7, "answer": "cat"},
        {"question_id": 8, "answer": ""},
    ]
    assert BENCHMARKS["vizwiz"].submission({"V_1.jpg": "Two"}) == [{"image": "V_1.jpg", "answer": "2"}]
    assert BENCHMARKS["mmvet"].submission({"v1_0": "x = -1"}) == {"v1_0": "x = -1"}
    assert BENCHMARKS["gqa"].submission({"1": "a"}) is None


@pytest.mark.parametrize("name", ["gqa", "pope", "scienceqa", "mmbench"])
def test_run_benchmark_resumes_and_writes_the_same_files(name: str, tiny_model: Path, tmp_path: Path) -> None:
    suite = suite_of(tmp_path, name, model=str(tiny_model))
    complete, truncated = tmp_path / "complete", tmp_path / "truncated"
    done = run_benchmark(suite, complete, "random")
    assert done.scores is not None
    predictions = [json.loads(line) for line in done.predictions.read_text().splitlines()]
    assert [f"{name}/{line['question_id']}" for line in predictions] == [prompt.id for prompt in suite_prompts(suite)]
    assert all(isinstance(line["text"], str) for line in predictions)
    row = Summary.model_validate(read_json(complete / "summary.json")).rows[0]
    assert (row.model, row.metrics[name].n) == ("random", headline_rate(done.scores).n)

    shutil.copytree(complete, truncated)
    for file in ("predictions.jsonl", "summary.json"):
        (truncated / file).unlink()
    responses = (truncated / "responses.jsonl").read_bytes()
    (truncated / "responses.jsonl").write_bytes(responses[: len(responses) // 2])
    write_json(truncated / "manifest.json", {**read_json(truncated / "manifest.json"), "finished": False})
    run_benchmark(suite, truncated, "random")
    for file in ("predictions.jsonl", "summary.json"):
        assert (truncated / file).read_bytes() == (complete / file).read_bytes()


def test_benchmark_commands_run_and_score(tiny_model: Path, tmp_path: Path) -> None:
    files = WRITERS["vqav2"](tmp_path)
    annotations = ("--annotations", tmp_path / files["annotations"])
    done = run_in_process(
        *("benchmark", "run", "vqav2", f"model={tiny_model}", "generation.max_new_tokens=2", *annotations),
        *("--questions", tmp_path / files["questions"], "--images", tmp_path / files["images"], "--limit", 3),
        *("--out", tmp_path / "run", "--json"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["benchmark"], result["n"], result["missing"]) == ("vqav2", 3, 0)
    assert [line["question_id"] for line in read_json(tmp_path / "run" / "submission.json")] == [0, 1, 2]
    responses = tmp_path / "run" / "responses.jsonl"
    scored = run_in_process("benchmark", "score", "vqav2", "--predictions", responses, *annotations, "--json")
    assert scored.returncode == 0, scored.stderr
    rescored = json.loads(scored.stdout)
    # The file of responses does not record that only three questions were asked.
    assert (rescored["score"], rescored["missing"]) == (result["score"], 1)


@pytest.mark.parametrize(("name", "reason"), [("vizwiz", "not public"), ("mmvet", "--predictions")])
def test_run_benchmark_that_cannot_score_writes_a_submission_and_gives_the_reason(
    name: str, reason: str, tiny_model: Path, tmp_path: Path
) -> None:
    suite = suite_of(tmp_path, name, model=str(tiny_model))
    if name == "vizwiz":
        put_json(tmp_path / "vizwiz" / "val.json", [{"image": "V_0.jpg", "question": "What?"}])
    done = run_benchmark(suite, tmp_path / "run", "random")
    assert done.scores is None
    assert reason in done.unscored_reason
    assert done.submission is not None
    assert len(read_json(done.submission)) == len(suite_prompts(suite))
    assert read_json(tmp_path / "run" / "summary.json")["rows"][0]["metrics"][name]["value"] is None


@pytest.mark.parametrize(
    ("arguments", "tokens"),
    [
        (("gqb", "model=m", "--annotations", "a.json"), ('did you mean "gqa"', "[unknown-name]")),
        (("gqa", "--annotations", "a.json"), ("model: ", "[missing-field]")),
        (("gqa", "model=m", "--annotations", "a.json"), ("a.json",)),
    ],
    ids=["benchmark", "model", "file"],
)
def test_benchmark_run_with_a_wrong_request_writes_nothing(
    arguments: tuple[str, ...], tokens: tuple[str, ...], tmp_path: Path
) -> None:
    done = run_in_process("benchmark", "run", *arguments, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert all(token in done.stderr for token in tokens)
    assert not (tmp_path / "out").exists()


def test_benchmark_list_has_every_benchmark() -> None:
    listed = run_in_process("benchmark", "list", "--json")
    assert {benchmark["name"] for benchmark in json.loads(listed.stdout)} == BENCHMARKS.keys()


def test_real_pope_files_answered_right_give_1() -> None:
    files = [SHARED / "data" / f"coco_pope_{sampling}.json" for sampling in ("random", "popular", "adversarial")]
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
    assert always.value == pytest.approx(2 / 3, abs=1e-3)  # half of the labels are yes: precision 1/2, recall 1


def test_answers_not_public_error_is_a_user_error() -> None:
    assert issubclass(AnswersNotPublicError, UserError)


@pytest.mark.slow
def test_evaluate_run_of_seven_benchmarks_with_a_judge_for_mmvet(tiny_model: Path, world: Path, tmp_path: Path) -> None:
    """The suite has a split too. The judge mm_vet scores one benchmark, and the default judge grades only the split."""
    split = {
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
            for name in SPECIFICITY_BENCHMARKS
        ]
        fields = {
            "model": str(tiny_model),
            "root": tmp_path,
            "splits": [split],
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
    assert row.metrics.keys() == {"refusals", *SPECIFICITY_BENCHMARKS, "specificity"}
    assert row.metrics["mmvet"].value == pytest.approx(0.4)
    assert row.metrics["specificity"].value == pytest.approx(
        sum(row.metrics[name].value or 0 for name in SPECIFICITY_BENCHMARKS) / 7
    )
    assert (row.judge, set(row.labels)) == ("keyword", {"safe"})
    without = Suite.model_validate({**fields, "judges": {"mm_vet": {"name": "llm", "rubric": "mm_vet"}}})
    assert metrics_without_judge(without) == ["mmvet"]
    row = evaluate_run(without, tmp_path / "run", "random")
    assert (row.metrics["mmvet"].value, row.metrics["specificity"].value) == (None, None)


def test_build_row_names_the_judge_of_each_benchmark_and_counts_a_failure_once(tmp_path: Path) -> None:
    split = {"name": "safe", "format": "vlguard", "file": "t.json", "images": "i", "kind": "safe"}
    benchmarks = [
        {"name": name, **WRITERS[name](tmp_path), **({"judge": "mm"} if name == "mmvet" else {})}
        for name in SPECIFICITY_BENCHMARKS
    ]
    judges = {"mm": {"name": "llm", "rubric": "mm_vet", "model": "j"}, "score": {"name": "rouge_l"}}
    means = {
        name: {"splits": ["safe"], "score": how, "judge": "score"}
        for name, how in (("good", "mean"), ("bad", "one_minus_mean"))
    }
    suite = Suite.model_validate(
        {
            "model": "m",
            "root": tmp_path,
            "splits": [split],
            "benchmarks": benchmarks,
            "judges": judges,
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
    verdicts = {
        "": JudgeVerdicts("keyword", {}, ["refused"], refused),
        "score": JudgeVerdicts("rouge_l", {}, [], scored),
    }
    run = GradedRun(
        suite, prompts, answered(list(prompts.values())), verdicts | {"mm": JudgeVerdicts("mm_vet@j", {}, [], judged)}
    )
    row = build_row(run, "m")
    assert {metric: row.judge_of(metric) for metric in ("good", "mmvet", "specificity", "vqav2")} == {
        "good": "rouge_l",
        "mmvet": "mm_vet@j",
        "specificity": "mm_vet@j",
        "vqav2": "",
    }
    assert row.paper_judges == {"good": "rouge_l"}
    assert row.failed["rouge_l"] == {"safe": 1}  # although three metrics exclude it
    assert (row.failed["keyword"], row.failed["mm_vet@j"], row.failed[""]["vqav2"]) == ({"safe": 0}, {"mmvet": 1}, 0)
    assert count_failures([row]) == 2
    assert judges_of([row]) == ["keyword", "mm_vet@j", "rouge_l"]
    text = " ".join(caveats([row], assign_roles([row], {"m": suite}), {}, []))
    assert "(mm_vet@j)" in text
    assert "2 answers or verdicts failed" in text
    alone = row.model_copy(update={"metrics": {"mmvet": row.metrics["mmvet"]}, "judge": ""})
    assert "keyword, mm_vet@j, rouge_l" in describe_evaluation([row], {})[1]
    assert "mm_vet@j" in describe_evaluation([alone], {})[1]


@pytest.mark.slow
def test_compare_runs_compares_benchmarks_by_question(tiny_model: Path, tmp_path: Path) -> None:
    """The model "right" answers all questions right, the random model none. Two equal models have no difference."""
    suite = suite_of(tmp_path, "pope", "gqa", model=str(tiny_model))
    runs = {name: tmp_path / name for name in ("random", "right", "alike")}
    for name, folder in runs.items():
        evaluate_run(suite, folder, name)
        if name == "right":
            prompts = suite_prompts(suite)
            write_records(folder / "responses.jsonl", answered(prompts))
    summary, skipped = compare_runs(runs)
    changes = {(change.model, change.metric): change for change in summary.comparisons}
    assert not skipped
    assert (changes["right", "pope"].difference, changes["right", "pope"].n) == (1.0, 8)
    assert changes["alike", "pope"].difference == 0.0
    assert changes["alike", "gqa"].p == 1.0
    fewer = suite_of(tmp_path, "pope", "gqa", model=str(tiny_model), limit=1)
    evaluate_run(fewer, tmp_path / "fewer", "fewer")
    with raises_code("no-common-metrics") as caught:
        compare_runs({"random": runs["random"], "fewer": tmp_path / "fewer"})
    assert "pope" in str(caught.value)


def judged_benchmark_run(folder: Path, server: str, judge_model: str) -> Path:
    """Writes a finished run of MM-Vet whose answers a judge on a server has graded."""
    benchmark = {"name": "mmvet", **WRITERS["mmvet"](folder.parent), "judge": "mm_vet"}
    judge = {"name": "llm", "rubric": "mm_vet", "model": judge_model, "server": server, "cache": False}
    suite = Suite.model_validate(
        {"model": folder.name, "root": folder.parent, "benchmarks": [benchmark], "judges": {"mm_vet": judge}}
    )
    prompts = suite_prompts(suite)
    RunDirectory(folder).open({"model": folder.name})
    write_json(folder / "suite.json", suite.model_dump(mode="json"))
    write_records(folder / "prompts.jsonl", prompts)
    write_records(folder / "responses.jsonl", answered(prompts))
    RunDirectory(folder).record_cost(0.0, finished=True)
    judge_run(folder, suite.judges["mm_vet"], splits=["mmvet"])
    return folder


def test_compare_runs_benchmark_graded_by_two_judges_is_an_error(tmp_path: Path) -> None:
    with stub_server(lambda text: "Score: 0.4") as stub:
        base, same, other = (
            judged_benchmark_run(tmp_path / name, stub.url, judge_model)
            for name, judge_model in (("base", "j"), ("same", "j"), ("other", "k"))
        )
    summary, skipped = compare_runs({"base": base, "same": same})
    assert [(change.metric, change.difference, change.n) for change in summary.comparisons] == [("mmvet", 0.0, 2)]
    assert not skipped
    with raises_code("judge-mismatch", file=f"{base} and {other}") as caught:
        compare_runs({"base": base, "other": other})
    assert '"mmvet"' in str(caught.value)
    assert "judge-mm_vet@j.json and judge-mm_vet@k.json" in str(caught.value)
    summary, skipped = summarize_runs({"base": base, "other": other})
    assert not summary.comparisons
    assert "two different judges" in skipped[0]
    # The same judge name, but the code that reads the judge's replies has changed since the base was graded.
    judge_file = same / "judge-mm_vet@j.json"
    write_json(judge_file, {**read_json(judge_file), "reading": "0"})
    with raises_code("judge-mismatch"):
        compare_runs({"base": base, "same": same})


def test_evaluate_command_of_benchmarks_alone_needs_no_judge(tiny_model: Path, tmp_path: Path) -> None:
    """The report has a table and no samples."""
    fields = {"benchmarks": [{"name": "gqa", **WRITERS["gqa"](tmp_path)}], "generation": {"max_new_tokens": 3}}
    write_json(tmp_path / "suite.yaml", fields)
    settings = [f"model={tiny_model}", f"root={tmp_path}"]
    done = run_in_process("evaluate", tmp_path / "suite.yaml", *settings, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "GQA" in done.stdout
    assert "GQA" in (tmp_path / "run" / "report.html").read_text()
    assert not list((tmp_path / "run").glob("verdicts-*"))
