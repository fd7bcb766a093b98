"""The folder of an evaluation: answers are complete and in order, and verdicts belong to one version of a judge."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import raises_code
from vlm_unlearn.errors import RunError
from vlm_unlearn.records import Prompt, Response
from vlm_unlearn.store import EvaluationRun, RetryLog, RunDirectory, read_json, write_json, write_records


def finished_run(path: Path, ids: str, samples: int = 1) -> EvaluationRun:
    run = EvaluationRun(path)
    run.open({"kind": "evaluate", "samples": {"s": samples} if samples > 1 else {}})
    prompts = [Prompt(id=id, group_id=id, set="s", kind="unsafe", question="q") for id in ids]
    write_records(run.prompts_file, prompts)
    responses = [Response(prompt_id=id, sample=sample, text=id) for id in ids for sample in range(samples)]
    write_records(run.responses_file, responses)
    run.record_cost(0.0, finished=True)
    return run


def test_read_answers_returns_every_sample(tmp_path: Path) -> None:
    prompts, responses = finished_run(tmp_path, "ab", samples=2).read_answers()
    assert list(prompts) == ["a", "b"]
    assert [response.key for response in responses] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


def test_read_answers_of_unfinished_and_other_runs_is_an_error(tmp_path: Path) -> None:
    run = EvaluationRun(tmp_path / "run")
    with raises_code("run-unfinished", file=run.path):
        run.read_answers()
    run.open({"kind": "evaluate"})
    with raises_code("run-unfinished", file=run.path):
        run.read_answers()
    training = RunDirectory(tmp_path / "training")
    training.open({"kind": "train"})
    training.record_cost(0.0, finished=True)
    with raises_code("run-not-found", file=training.path):
        EvaluationRun(training).read_answers()


@pytest.mark.parametrize("ids", ["a", "abc", "aab", ""])
def test_read_answers_that_do_not_match_the_prompts_is_an_error(ids: str, tmp_path: Path) -> None:
    run = finished_run(tmp_path, "ab")
    write_records(run.responses_file, [Response(prompt_id=id, text=id) for id in ids])
    with raises_code("run-mismatch", file=run.path):
        run.read_answers()


@pytest.mark.parametrize("samples", [0, -1, 10**9, "3", None])
def test_read_answers_checks_the_number_of_samples(samples: object, tmp_path: Path) -> None:
    run = finished_run(tmp_path, "ab")
    manifest = run.read_manifest()
    write_json(run.manifest_file, {**manifest, "identity": {"samples": {"s": samples}}})
    with raises_code("invalid-field", file=run.manifest_file, field="samples"):
        run.read_answers()


def test_sort_responses_restores_the_order_and_removes_duplicates(tmp_path: Path) -> None:
    run = finished_run(tmp_path, "ab")
    sorted_bytes = run.responses_file.read_bytes()
    lines = sorted_bytes.splitlines(keepends=True)
    for content in (lines[1] + lines[0], lines[0] + lines[1] + lines[0]):
        run.responses_file.write_bytes(content)
        run.sort_responses([("a", 0), ("b", 0)])
        assert run.responses_file.read_bytes() == sorted_bytes


def run_with_a_failed_response(tmp_path: Path) -> EvaluationRun:
    run = finished_run(tmp_path, "ab")
    failed = Response(prompt_id="c", text=None, error="no reply")
    with run.responses_file.open("a") as handle:
        handle.write(failed.model_dump_json() + '\n{"prompt_id": "d"')  # killed while it wrote the last line
    assert run.failed_responses() == {("c", 0)}
    return run


def texts(run: EvaluationRun) -> dict[str, str | None]:
    return {response.prompt_id: response.text for response in run.read_responses()}


def test_failed_response_stays_until_it_is_replaced(tmp_path: Path) -> None:
    run = run_with_a_failed_response(tmp_path)
    before = texts(run)
    with run.response_log(0, 1) as log:
        assert log.keys == {("a", 0), ("b", 0)}
        log.append([Response(prompt_id="a", text="other"), Response(prompt_id="c", text="new")])
        assert texts(run) == before  # another process that reads the run finds it complete
    assert texts(run) == {**before, "c": "new"}
    assert [response.prompt_id for response in run.read_responses()] == ["a", "b", "c"]
    assert run.is_finished


def test_successor_of_a_failed_response_survives_a_kill_and_an_error(tmp_path: Path) -> None:
    run = run_with_a_failed_response(tmp_path)
    killed = RetryLog(run.responses_file, Response, {("c", 0)})
    killed.append([Response(prompt_id="c", text="new")])  # no merge

    def fail() -> None:
        with run.response_log(0, 1) as log:
            assert ("c", 0) in log.keys
            raise RunError("the server is down", code="server-unreachable")

    with raises_code("server-unreachable", RunError):
        fail()
    assert texts(run)["c"] == "new"
    assert not list(tmp_path.rglob("*.retries"))


def test_shards_replace_failed_responses(tmp_path: Path) -> None:
    run = run_with_a_failed_response(tmp_path)
    with run.response_log(1, 2) as log:
        log.append([Response(prompt_id="c", text="new"), Response(prompt_id="a", text="other")])
    run.merge_shards()
    assert texts(run) == {**texts(finished_run(tmp_path / "other", "ab")), "c": "new"}


def test_open_verdicts_moves_the_verdicts_of_a_changed_judge(tmp_path: Path) -> None:
    run = EvaluationRun(tmp_path)
    file = run.open_verdicts("keyword", {"code": "1"}, {"name": "keyword"})
    file.write_text("first\n")
    assert run.open_verdicts("keyword", {"code": "1"}, {"name": "keyword", "input_price": 2.0}) == file
    assert file.read_text() == "first\n"
    assert read_json(run.judge_identity_file("keyword"))["config"]["input_price"] == 2.0
    run.open_verdicts("keyword", {"code": "2"}, {"name": "keyword"})
    assert not file.exists()
    assert (tmp_path / "before-verdicts-keyword.jsonl").read_text() == "first\n"
    assert read_json(tmp_path / "before-judge-keyword.json")["code"] == "1"
    assert run.verdicts_files() == {}


def test_merge_shards_loses_and_duplicates_no_answer(tmp_path: Path) -> None:
    """A merge that was killed before it deleted the shards, half-written lines, and an answer in two shards."""
    run = EvaluationRun(tmp_path)
    (tmp_path / "parts").mkdir()
    lines = [Response(prompt_id=id, text=id).model_dump_json() + "\n" for id in "abc"]
    run.responses_file.write_text(lines[0] + lines[1][:9])
    (tmp_path / "parts" / "0.jsonl").write_text(lines[0] + lines[1])
    (tmp_path / "parts" / "7.jsonl").write_text(lines[1] + lines[2] + lines[0][:5])
    run.merge_shards()
    assert [response.prompt_id for response in run.read_responses()] == ["a", "b", "c"]
    assert not (tmp_path / "parts").exists()


def test_merge_shards_in_use_by_another_process_is_an_error(tmp_path: Path) -> None:
    run = EvaluationRun(tmp_path)
    with run.response_log(rank=1, num_processes=2) as log:
        log.append([Response(prompt_id="a", text="a")])
        with raises_code("run-locked", file=tmp_path):
            run.merge_shards()
    assert not run.responses_file.exists()
    run.merge_shards()
    assert [response.prompt_id for response in run.read_responses()] == ["a"]


def test_response_log_of_one_process_is_the_answer_file(tmp_path: Path) -> None:
    run = EvaluationRun(tmp_path)
    with run.response_log(rank=0, num_processes=1) as log:
        assert log.path == run.responses_file


def test_file_names_on_disk_do_not_change(tmp_path: Path) -> None:
    """Runs of earlier versions must resume, and other tools read these files."""
    run = EvaluationRun(tmp_path)
    inherited = vars(RunDirectory(tmp_path))
    paths = {name: value.relative_to(tmp_path).as_posix() for name, value in vars(run).items() if name not in inherited}
    assert paths == {
        "prompts_file": "prompts.jsonl",
        "responses_file": "responses.jsonl",
        "suite_file": "suite.json",
        "batching_file": "batching.json",
        "summary_file": "summary.json",
        "images": "images",
        "predictions_file": "predictions.jsonl",
        "submission_file": "submission.json",
        "search_file": "search.json",
        "search_plot_file": "search.png",
        "_shards": "parts",
    }
    assert run.verdicts_file("llm@m").name == "verdicts-llm@m.jsonl"
    assert run.judge_identity_file("llm@m").name == "judge-llm@m.json"
