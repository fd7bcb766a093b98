"""Generate, judge and score write files. Each step resumes, and no step uses outdated results."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from finished_runs import complies, make_run
from helpers import raises_code, run_killing
from stub_server import stub_server
from vlm_unlearn.config import JudgeConfig, Suite, load
from vlm_unlearn.errors import RunError, UserError
from vlm_unlearn.evaluation.generate import generate_run, saved_suite
from vlm_unlearn.evaluation.prompts import suite_prompts
from vlm_unlearn.evaluation.runner import evaluate_run
from vlm_unlearn.evaluation.scoring import score_run
from vlm_unlearn.evaluation.verdicts import judge_run
from vlm_unlearn.records import Prompt, Response, Summary, Verdict
from vlm_unlearn.store import RunDirectory, read_json, read_records, write_json, write_records


def tiny_suite(model: Path, world: Path, *overrides: str) -> Suite:
    settings = [f"model={model}", f"root={world}", "generation.batch_size=16"]
    return load(Suite, Path("suites/tiny"), [*settings, *overrides])


@pytest.fixture(scope="module")
def evaluated(tiny_model: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished evaluation of the random tiny model. Tests that change it copy it."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    evaluate_run(tiny_suite(tiny_model, world), folder, "random")
    return folder


@pytest.fixture
def run_copy(evaluated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(evaluated, tmp_path / "run"))


def test_evaluate_run_writes_rates_and_versions(evaluated: Path) -> None:
    summary = read_json(evaluated / "summary.json")
    row = Summary.model_validate(summary).rows[0]
    assert row.metrics["asr"].value == 0.0  # the answers of a random model are random words
    assert row.metrics["utility"].value == 0.0
    assert row.metrics["asr_attacked"].n == 12  # questions, not rewrites
    assert sum(row.labels["unsafe_what"].values()) == 36
    assert row.metrics["degenerate_rate"].value == pytest.approx(1.0, abs=0.1)
    assert summary["schema"] == 1
    assert summary["rows"][0]["metrics"]["asr"].keys() == {"value", "low", "high", "n", "failed"}
    assert read_json(evaluated / "manifest.json")["versions"]["torch"].startswith("2.")


def test_system_prompt_goes_to_every_question_without_one(tiny_model: Path, world: Path) -> None:
    plain = suite_prompts(tiny_suite(tiny_model, world))
    prompts = suite_prompts(tiny_suite(tiny_model, world, "system_prompt=Be safe."))
    assert {prompt.system for prompt in prompts} == {"Be safe."}
    assert [prompt.model_copy(update={"system": None}) for prompt in prompts] == plain


def test_judging_again_leaves_the_answers_unchanged(tiny_model: Path, world: Path, run_copy: Path) -> None:
    suite = tiny_suite(tiny_model, world)
    answers = (run_copy / "responses.jsonl").read_bytes()
    for config in (JudgeConfig(name="keyword"), JudgeConfig(name="keyword", paper_compat=True), suite.judge):
        judge_run(run_copy, config)
        score_run(run_copy, suite.model_copy(update={"judge": config}), "random")
    assert (run_copy / "responses.jsonl").read_bytes() == answers
    assert len(list(run_copy.glob("verdicts-*.jsonl"))) == 3


def test_judge_run_with_changed_facts_grades_again(world: Path, run_copy: Path, tmp_path: Path) -> None:
    facts = json.loads((world / "world.json").read_text())
    facts_file = tmp_path / "facts.json"
    facts_file.write_text(json.dumps(facts))
    judge = JudgeConfig(name="tiny_world", world=facts_file)
    file = judge_run(run_copy, judge)
    verdicts = file.read_bytes()
    every_answer = [response.text for response in read_records(run_copy / "responses.jsonl", Response)]
    facts_file.write_text(json.dumps({**facts, "refusals": every_answer}))
    judge_run(run_copy, judge)
    assert file.read_bytes() != verdicts
    assert (run_copy / f"before-{file.name}").read_bytes() == verdicts


def test_generate_run_with_other_weights_in_the_same_folder_is_an_error(
    tiny_model: Path, world: Path, run_copy: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    generate_run(tiny_suite(model, world), run_copy)  # a copy of the model gives the same run
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="model"):
        generate_run(tiny_suite(model, world), run_copy)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_evaluate_run_uses_no_outdated_results(tiny_model: Path, world: Path, tmp_path: Path) -> None:
    """The evaluated model is overwritten in place, then the judge's model, then the rubric. Each is run again."""
    import torch
    from transformers import AutoModelForImageTextToText

    def change_weights(folder: Path, seed: int) -> None:
        model = AutoModelForImageTextToText.from_pretrained(folder)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model.save_pretrained(folder)

    model, judge = (Path(shutil.copytree(tiny_model, tmp_path / name)) for name in ("model", "judge"))
    rubric = tmp_path / "mine.txt"
    head = "---\nversion: 1\nsource: me\nimage: false\nwords: {RED: {label: complied}}\n---\n"
    rubric.write_text(head + "what is it ?\n{fence}\n{answer}\n{fence}\n")
    settings = [f"judge={{name: llm, rubric: {rubric}, model: {judge}, max_tokens: 6}}", "generation.max_new_tokens=6"]

    def evaluate(name: str) -> tuple[bytes, list[object]]:
        folder = tmp_path / name
        evaluate_run(tiny_suite(model, world, *settings), folder, "m")
        verdicts = [
            (verdict.prompt_id, verdict.raw)
            for verdict in read_records(next(folder.glob("verdicts-mine@*--judge.jsonl")), Verdict)
        ]
        return (folder / "responses.jsonl").read_bytes(), verdicts

    first = evaluate("one")
    change_weights(model, 1)
    with pytest.raises(UserError, match="model"):
        evaluate("one")
    second = evaluate("two")
    assert second[0] != first[0]
    change_weights(judge, 2)
    third = evaluate("two")
    assert third[0] == second[0]
    assert third[1] != second[1]
    rubric.write_text(head + "what color is it ?\n{fence}\n{answer}\n{fence}\n")
    identity = json.loads(next((tmp_path / "two").glob("judge-mine@*--judge.json")).read_text())
    evaluate("two")
    changed = json.loads(next((tmp_path / "two").glob("judge-mine@*--judge.json")).read_text())
    assert {key for key in identity if identity[key] != changed[key]} == {"rubric"}


@pytest.mark.slow
def test_evaluate_run_with_changed_rubric_judges_again(
    tiny_model: Path, world: Path, run_copy: Path, tmp_path: Path
) -> None:
    rubric = tmp_path / "mine.txt"
    head = "---\nversion: 1\nsource: me\nimage: false\nwords: {GOOD: {label: complied}, BAD: {label: refused}}\n---\n"
    with stub_server(lambda text: "GOOD" if "Is it good?" in text else "BAD") as stub:
        judge = f"judge={{name: llm, rubric: {rubric}, model: j, server: {stub.url}}}"
        suite = tiny_suite(tiny_model, world, judge)
        results = []
        for text in ("Is it good?", "Is it good?", "Is it bad?"):
            rubric.write_text(f"{head}{text}\n{{fence}}\n{{answer}}\n{{fence}}\n")
            row = evaluate_run(suite, run_copy, "m")
            results.append((row.metrics["refusal_rate"].value, stub.calls))
    assert [rate for rate, _ in results] == [0.0, 0.0, 1.0]
    calls = [count for _, count in results]
    assert calls[1] == calls[0]
    assert calls[2] == 2 * calls[0]
    assert evaluate_run(suite, run_copy, "m") == row  # without missing verdicts no server is needed
    with pytest.raises(RunError, match=re.escape(stub.url)):
        evaluate_run(suite, tmp_path / "new", "m")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(300)
def test_killed_evaluation_writes_the_same_files(
    evaluated: Path, tiny_model: Path, world: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"

    def has_lines(file: str, count: int) -> Callable[[], bool]:
        path = folder / file
        return lambda: path.exists() and path.read_bytes().count(b"\n") >= count

    settings = [f"model={tiny_model}", f"root={world}", "generation.batch_size=4"]
    run_killing(
        ["evaluate", "suites/tiny", *settings, "--name", "random", "--out", folder],
        [has_lines("responses.jsonl", 1), has_lines("responses.jsonl", 40), has_lines("verdicts-tiny_world.jsonl", 1)],
    )
    for file in ("prompts.jsonl", "responses.jsonl", "verdicts-tiny_world.jsonl", "summary.json"):
        assert (folder / file).read_bytes() == (evaluated / file).read_bytes(), file


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(180)
def test_killed_judging_writes_the_same_verdicts(tiny_model: Path, world: Path, tmp_path: Path) -> None:
    """Judging 20,000 answers is killed after the first batch and at two later points."""
    suite = tiny_suite(tiny_model, world)
    prompts = [Prompt(id=str(i), group_id=str(i), set="unsafe", kind="unsafe", question="q") for i in range(20_000)]
    answers = [
        Response(prompt_id=prompt.id, text="I cannot help ." if i % 3 else f"answer {i}")
        for i, prompt in enumerate(prompts)
    ]
    for name in ("complete", "killed"):
        folder = tmp_path / name
        RunDirectory(folder).open({})
        RunDirectory(folder).record_cost(0.0, finished=True)
        write_json(folder / "suite.json", suite.model_dump(mode="json"))
        write_records(folder / "prompts.jsonl", prompts)
        write_records(folder / "responses.jsonl", answers)
    expected = judge_run(tmp_path / "complete", JudgeConfig(name="keyword")).read_bytes()
    file = tmp_path / "killed" / "verdicts-keyword.jsonl"

    def has_lines(count: int) -> Callable[[], bool]:
        return lambda: file.exists() and file.read_bytes().count(b"\n") >= count

    run_killing(
        ["judge", "run", tmp_path / "killed", "name=keyword"], [has_lines(1), has_lines(5_000), has_lines(12_000)]
    )
    assert file.read_bytes() == expected


def test_judge_run_completes_a_file_truncated_anywhere(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", complies, groups=3)
    judge = saved_suite(folder).judge
    file = folder / "verdicts-keyword.jsonl"
    complete = file.read_bytes()
    for end in range(0, len(complete), 97):
        file.write_bytes(complete[:end])
        assert judge_run(folder, judge).read_bytes() == complete


def test_score_run_gives_no_rate_of_labels_that_the_judge_cannot_return(
    tiny_model: Path, world: Path, run_copy: Path
) -> None:
    config = JudgeConfig(name="keyword", paper_compat=True)
    judge_run(run_copy, config)
    row = score_run(run_copy, tiny_suite(tiny_model, world).model_copy(update={"judge": config}), "random")
    assert row.judge == "keyword-paper"
    assert (row.metrics["degenerate_rate"].value, row.metrics["sarr"].value) == (None, None)
    assert row.metrics["refusal_rate"].n == 12


def test_judge_run_without_finished_answers_is_an_error(tmp_path: Path) -> None:
    with raises_code("run-unfinished", file=tmp_path):
        judge_run(tmp_path, JudgeConfig(name="keyword"))


def test_judge_run_unknown_split_is_an_error(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", complies, groups=1)
    with raises_code("unknown-name", file=folder, field="--split") as caught:
        judge_run(folder, JudgeConfig(name="keyword"), splits=["saef"])
    assert 'did you mean "safe"' in str(caught.value)
    with raises_code("missing-setting", file=folder):
        judge_run(folder, JudgeConfig(name="keyword"), splits=[])


def test_score_run_needs_exactly_one_verdict_per_answer(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", complies, groups=2)
    file = folder / "verdicts-keyword.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    other_judge = lines[0].replace('"judge": "keyword"', '"judge": "other"')
    assert other_judge != lines[0]
    for changed, problem in (
        (lines[:-1], "(1 missing)"),
        ([*lines, lines[0]], "(1 duplicate)"),
        ([other_judge, *lines[1:]], "(1 by another judge)"),
    ):
        file.write_text("".join(changed))
        with raises_code("incomplete-verdicts", file=file) as caught:
            score_run(folder, saved_suite(folder), "random")
        assert problem in str(caught.value)


def test_score_run_after_a_change_of_the_judge_is_an_error(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", complies, groups=1)
    identity_file = folder / "judge-keyword.json"
    write_json(identity_file, {**read_json(identity_file), "config": {}})
    with raises_code("judge-changed", file=identity_file):
        score_run(folder, saved_suite(folder), "random")


def test_saved_suite_accepts_overrides_of_judges_and_metrics_only(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", complies, groups=1)
    assert saved_suite(folder, ["paper_compat=true"]).paper_compat
    with pytest.warns(FutureWarning, match="paper_compat"):
        assert saved_suite(folder, ["paper=true"]).paper_compat
    with raises_code("invalid-override", field="generation"):
        saved_suite(folder, ["generation.seed=3"])


def test_suite_prompts_of_the_tiny_suite(world: Path) -> None:
    prompts = suite_prompts(tiny_suite(Path("m"), world))
    attacked = [prompt for prompt in prompts if prompt.set == "unsafe_what"]
    assert all(prompt.question.startswith("What") for prompt in attacked)
    assert {prompt.rewrite for prompt in attacked} == {0, 1, 2}
    assert {prompt.kind for prompt in prompts if prompt.set == "benign_image"} == {"safe_image_unsafe_question"}
