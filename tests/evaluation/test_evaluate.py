"""Generate, judge and score on files; each is resumable, and nothing stale is served."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import run, run_killing
from stub_server import stub_server
from vlm_unlearn.config import JudgeConfig, Suite, load
from vlm_unlearn.errors import RunError, UserError
from vlm_unlearn.evaluation.generate import generate_run
from vlm_unlearn.evaluation.prompts import suite_prompts
from vlm_unlearn.evaluation.runner import evaluate_run
from vlm_unlearn.evaluation.scoring import score_run
from vlm_unlearn.evaluation.verdicts import judge_run
from vlm_unlearn.records import Prompt, Response, Verdict
from vlm_unlearn.store import open_run, read_records, record_cost, write_json, write_records


def suite(model: Path, world: Path, *overrides: str) -> Suite:
    return load(Suite, Path("suites/tiny"), [f"model={model}", f"root={world}", *overrides])


def test_the_whole_way(tiny_model: Path, world: Path, tmp_path: Path) -> None:
    wanted = suite(tiny_model, world)
    row = evaluate_run(wanted, tmp_path / "run", "random")
    assert row.metrics["asr"].value == 0.0  # a random model knows nothing
    assert row.metrics["utility"].value == 0.0
    assert row.metrics["asr_attacked"].n == 12  # questions, not shots
    assert sum(row.labels["unsafe_what"].values()) == 36
    assert row.metrics["degenerate_rate"].value == pytest.approx(1.0, abs=0.1)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["schema"] == 1
    assert summary["rows"][0]["metrics"]["asr"].keys() == {"value", "low", "high", "n", "failed"}
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["versions"]["torch"].startswith("2.")


def test_rejudging_never_generates(tiny_model: Path, world: Path, tmp_path: Path) -> None:
    wanted = suite(tiny_model, world)
    generate_run(wanted, tmp_path / "run")
    answers = (tmp_path / "run" / "responses.jsonl").read_bytes()
    for config in (JudgeConfig(name="keyword"), JudgeConfig(name="keyword", paper_compat=True), wanted.judge):
        judge_run(tmp_path / "run", config)
        score_run(tmp_path / "run", wanted.model_copy(update={"judge": config}), "random")
    assert (tmp_path / "run" / "responses.jsonl").read_bytes() == answers
    assert len(list((tmp_path / "run").glob("verdicts-*.jsonl"))) == 3


def test_a_changed_judge_grades_anew(tiny_model: Path, world: Path, tmp_path: Path) -> None:
    wanted = suite(tiny_model, world)
    generate_run(wanted, tmp_path / "run")
    facts = json.loads((world / "world.json").read_text())
    one = tmp_path / "one.json"
    one.write_text(json.dumps(facts))
    file = judge_run(tmp_path / "run", JudgeConfig(name="tiny_world", world=one))
    before = file.read_bytes()
    every_answer = [response.text for response in read_records(tmp_path / "run" / "responses.jsonl", Response)]
    one.write_text(json.dumps({**facts, "refusals": every_answer}))
    judge_run(tmp_path / "run", JudgeConfig(name="tiny_world", world=one))
    assert file.read_bytes() != before


def test_new_weights_in_the_same_folder_are_noticed(tiny_model: Path, world: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    generate_run(suite(model, world), tmp_path / "run")
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="holds another run \\(different: model\\)"):
        generate_run(suite(model, world), tmp_path / "run")


def test_nothing_stale_is_served(tiny_model: Path, world: Path, tmp_path: Path) -> None:
    """The model under test is overwritten in place, then the judge's model, then the rubric's text: each is asked again."""
    import torch
    from transformers import AutoModelForImageTextToText

    def other_weights(folder: Path, seed: int) -> None:
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

    def evaluated(name: str) -> tuple[bytes, list[object]]:
        folder = tmp_path / name
        evaluate_run(suite(model, world, *settings), folder, "m")
        verdicts = [
            (verdict.prompt_id, verdict.raw)
            for verdict in read_records(next(folder.glob("verdicts-mine@*--judge.jsonl")), Verdict)
        ]
        return (folder / "responses.jsonl").read_bytes(), verdicts

    first = evaluated("one")
    other_weights(model, 1)
    with pytest.raises(UserError, match="holds another run"):
        evaluated("one")
    second = evaluated("two")
    assert second[0] != first[0]
    other_weights(judge, 2)
    third = evaluated("two")
    assert third[0] == second[0]
    assert third[1] != second[1]
    rubric.write_text(head + "what colour is it ?\n{fence}\n{answer}\n{fence}\n")
    note = json.loads(next((tmp_path / "two").glob("judge-mine@*--judge.json")).read_text())
    evaluated("two")
    changed = json.loads(next((tmp_path / "two").glob("judge-mine@*--judge.json")).read_text())
    assert {key for key in note if note[key] != changed[key]} == {"rubric"}


def test_a_changed_rubric_is_asked_again(tiny_model: Path, world: Path, tmp_path: Path) -> None:
    rubric = tmp_path / "mine.txt"
    head = "---\nversion: 1\nsource: me\nimage: false\nwords: {GOOD: {label: complied}, BAD: {label: refused}}\n---\n"
    with stub_server(lambda text: "GOOD" if "Is it good?" in text else "BAD") as stub:
        wanted = suite(
            tiny_model,
            world,
            f"judge={{name: llm, rubric: {rubric}, model: j, server: {stub.url}}}",
            "generation.max_new_tokens=4",
        )
        found = []
        for text in ("Is it good?", "Is it good?", "Is it bad?"):
            rubric.write_text(f"{head}{text}\n{{fence}}\n{{answer}}\n{{fence}}\n")
            row = evaluate_run(wanted, tmp_path / "run", "m")
            found.append((row.metrics["refusal_rate"].value, stub.calls))
    assert [rate for rate, _ in found] == [0.0, 0.0, 1.0]
    calls = [count for _, count in found]
    assert calls[1] == calls[0]
    assert calls[2] == 2 * calls[0]
    assert (
        evaluate_run(wanted, tmp_path / "run", "m") == row
    )  # all is there: nobody needs to be, now that the server has gone
    with pytest.raises(RunError, match="does not respond"):
        evaluate_run(wanted, tmp_path / "new", "m")
    assert not (tmp_path / "new").exists()


def test_killed_evaluation_ends_with_the_same_files(tiny_model: Path, world: Path, tmp_path: Path) -> None:
    def arguments(name: str) -> list[object]:
        return [
            "evaluate",
            "suites/tiny",
            f"model={tiny_model}",
            f"root={world}",
            "generation.batch_size=4",
            "--out",
            tmp_path / name,
        ]

    def lines(file: str, count: int) -> Callable[[], bool]:
        path = tmp_path / "killed" / file
        return lambda: path.exists() and path.read_bytes().count(b"\n") >= count

    done = run(*arguments("whole"))
    assert done.returncode == 0, done.stderr
    run_killing(
        arguments("killed"),
        [lines("responses.jsonl", 1), lines("responses.jsonl", 40), lines("verdicts-tiny_world.jsonl", 1)],
    )
    for file in ("prompts.jsonl", "responses.jsonl", "verdicts-tiny_world.jsonl"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    one, other = (json.loads((tmp_path / name / "summary.json").read_text())["rows"][0] for name in ("whole", "killed"))
    assert (one["metrics"], one["labels"]) == (other["metrics"], other["labels"])


def test_killed_judging_ends_with_the_same_verdicts(tiny_model: Path, world: Path, tmp_path: Path) -> None:
    """20,000 answers, killed after the first batch and at two later points."""
    wanted = suite(tiny_model, world)
    prompts = [Prompt(id=str(i), group_id=str(i), set="unsafe", kind="unsafe", question="q") for i in range(20_000)]
    answers = [
        Response(prompt_id=prompt.id, text="I cannot help ." if i % 3 else f"answer {i}")
        for i, prompt in enumerate(prompts)
    ]
    for name in ("whole", "killed"):
        folder = tmp_path / name
        open_run(folder, {})
        record_cost(folder, 0.0, finished=True)
        write_json(folder / "suite.json", wanted.model_dump(mode="json"))
        write_records(folder / "prompts.jsonl", prompts)
        write_records(folder / "responses.jsonl", answers)
    assert run("judge", "run", tmp_path / "whole", "name=keyword").returncode == 0
    file = tmp_path / "killed" / "verdicts-keyword.jsonl"

    def lines(count: int) -> Callable[[], bool]:
        return lambda: file.exists() and file.read_bytes().count(b"\n") >= count

    run_killing(["judge", "run", tmp_path / "killed", "name=keyword"], [lines(1), lines(5_000), lines(12_000)])
    assert file.read_bytes() == (tmp_path / "whole" / "verdicts-keyword.jsonl").read_bytes()


def test_judging_cut_at_every_line_ends_the_same(tiny_model: Path, world: Path, tmp_path: Path) -> None:
    wanted = suite(
        tiny_model,
        world,
        "cases=[{name: unsafe, format: vlguard, file: vlguard/test.json, images: vlguard/test, kind: unsafe}]",
        "metrics={}",
    )
    generate_run(wanted, tmp_path / "run")
    file = judge_run(tmp_path / "run", wanted.judge)
    whole = file.read_bytes()
    for cut in range(0, len(whole), 97):
        file.write_bytes(whole[:cut])
        assert judge_run(tmp_path / "run", wanted.judge).read_bytes() == whole


def test_a_judge_gives_no_rate_of_what_it_cannot_see(tiny_model: Path, world: Path, tmp_path: Path) -> None:
    wanted = suite(tiny_model, world)
    generate_run(wanted, tmp_path / "run")
    config = JudgeConfig(name="keyword", paper_compat=True)
    judge_run(tmp_path / "run", config)
    row = score_run(tmp_path / "run", wanted.model_copy(update={"judge": config}), "random")
    assert row.judge == "keyword-paper"
    assert (row.metrics["degenerate_rate"].value, row.metrics["sarr"].value) == (None, None)
    assert row.metrics["refusal_rate"].n == 12


def test_judging_needs_finished_answers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no finished answers"):
        judge_run(tmp_path, JudgeConfig(name="keyword"))


def test_scoring_needs_all_verdicts(tiny_model: Path, world: Path, tmp_path: Path) -> None:
    wanted = suite(tiny_model, world)
    generate_run(wanted, tmp_path / "run")
    file = judge_run(tmp_path / "run", wanted.judge)
    whole = file.read_text().splitlines(keepends=True)
    for lines, message in ((whole[:-1], "1 missing"), ([*whole, whole[0]], "each of this run's answers once")):
        file.write_text("".join(lines))
        with pytest.raises(UserError, match=message):
            score_run(tmp_path / "run", wanted, "random")


def test_prompts_are_the_suites(world: Path) -> None:
    prompts = suite_prompts(suite(Path("m"), world))
    attacked = [prompt for prompt in prompts if prompt.set == "unsafe_what"]
    assert all(prompt.question.startswith("What") for prompt in attacked)
    assert {prompt.rewrite for prompt in attacked} == {0, 1, 2}
    assert {prompt.kind for prompt in prompts if prompt.set == "benign_image"} == {"safe_image_unsafe_question"}
