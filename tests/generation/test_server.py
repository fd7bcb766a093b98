"""A model on a server as the model under test: no response is lost, and only failed requests are sent again."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers import raises_code, run, run_killing
from stub_server import Stub, stub_server
from vlm_unlearn.config import JudgeConfig, Suite, load
from vlm_unlearn.errors import RunError
from vlm_unlearn.evaluation.generate import generate_run, generation_notes
from vlm_unlearn.evaluation.verdicts import judge_run
from vlm_unlearn.generation.server import ResponseBuffer
from vlm_unlearn.records import Response, Verdict
from vlm_unlearn.store import EvaluationRun, RunDirectory, read_records

SPLITS = (
    "splits=[{name: unsafe, format: vlguard, file: vlguard/test.json, images: vlguard/test, kind: unsafe, samples: %d}]"
)


@pytest.fixture
def stub() -> Iterator[Stub]:
    with stub_server(lambda text: f"You asked: {text}") as server:
        yield server


def overrides(stub: Stub, world: Path, samples: int, *more: str) -> list[str]:
    split = ["model=under-test", f"root={world}", SPLITS % samples, "metrics={}", "judge=keyword"]
    return [*split, "generation.backend=openai", f"generation.server={stub.url}", *more]


def load_suite(stub: Stub, world: Path, samples: int = 1, *more: str) -> Suite:
    return load(Suite, Path("suites/tiny"), overrides(stub, world, samples, *more))


def read_responses(folder: Path) -> list[Response]:
    return list(read_records(folder / "responses.jsonl", Response))


def test_server_answers_every_sample(stub: Stub, world: Path, tmp_path: Path) -> None:
    stub.finish_reason = "length"
    answer = stub.answer
    stub.answer = lambda text: (time.sleep(0.01), answer(text))[1]  # otherwise no two requests would be pending
    options = ["generation.temperature=1.0", "generation.top_p=0.9", "generation.concurrency=5"]
    generate_run(load_suite(stub, world, 3, *options), tmp_path / "run")
    prompts, responses = EvaluationRun(tmp_path / "run").read_answers()
    assert [response.key for response in responses] == [(id, sample) for id in prompts for sample in range(3)]
    for response in responses:
        assert response.text == f"You asked: {prompts[response.prompt_id].question}".strip()
        assert (response.finish_reason, response.error) == ("length", None)  # truncated responses are valid
    assert len({body["seed"] for body in stub.bodies}) == len(responses) == stub.calls
    assert {(body["model"], body["temperature"], body["top_p"]) for body in stub.bodies} == {("under-test", 1.0, 0.9)}
    assert 1 < stub.most_at_once <= 5
    identity = RunDirectory(tmp_path / "run").read_manifest()["identity"]
    assert identity["model"] == {"server": stub.url, "name": "under-test", "weights": "unknown"}
    assert identity["samples"] == {"unsafe": 3}


def test_failed_requests_are_sent_again_and_their_verdicts_replaced(stub: Stub, world: Path, tmp_path: Path) -> None:
    suite, folder = load_suite(stub, world), tmp_path / "run"
    stub.faults = lambda call: "400" if call in (2, 5) else ""
    generate_run(suite, folder)
    failed = {response.key: response for response in read_responses(folder) if response.error}
    assert len(failed) == 2
    assert all(response.text is None and "HTTP 400" in str(response.error) for response in failed.values())
    (note,) = generation_notes(folder)
    assert "2 of 12" in note
    verdicts = judge_run(folder, JudgeConfig(name="keyword"))
    assert sum(verdict.error is not None for verdict in read_records(verdicts, Verdict)) == 2
    answered, calls = [response for response in read_responses(folder) if not response.error], stub.calls
    generate_run(suite, folder)
    assert stub.calls == calls + 2
    assert not generation_notes(folder)
    assert [response for response in read_responses(folder) if response.key not in failed] == answered
    judge_run(folder, JudgeConfig(name="keyword"))
    assert [verdict.error for verdict in read_records(verdicts, Verdict)] == [None] * 12
    generate_run(suite, folder)
    assert stub.calls == calls + 2


@pytest.mark.slow
def test_run_resumes_after_server_went_down(stub: Stub, world: Path, tmp_path: Path) -> None:
    suite = load_suite(stub, world, 1, "generation.concurrency=8")  # retries in parallel
    folder = tmp_path / "run"
    stub.faults = lambda call: "cut" if call > 3 else ""
    with raises_code("server-unreachable", RunError):
        generate_run(suite, folder)
    with raises_code("run-unfinished", file=folder):
        EvaluationRun(folder).read_answers()
    assert sum(response.error is None for response in read_responses(folder)) == 3
    stub.faults = lambda call: ""
    calls = stub.calls
    generate_run(suite, folder)
    assert stub.calls == calls + 9
    assert all(response.error is None for response in EvaluationRun(folder).read_answers()[1])


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(300)
def test_kill_loses_at_most_the_responses_of_one_second(stub: Stub, world: Path, tmp_path: Path) -> None:
    stub.answer = lambda text: (time.sleep(0.4), f"You asked: {text}")[1]
    options = ["generation.temperature=0.5", "generation.concurrency=2", "generation.max_new_tokens=5"]

    def has_lines(count: int) -> Callable[[], bool]:
        file = tmp_path / "killed" / "responses.jsonl"
        return lambda: file.exists() and file.read_bytes().count(b"\n") >= count

    arguments = ["generate", "suites/tiny", *overrides(stub, world, 2, *options), "--out", tmp_path / "killed"]
    run_killing(arguments, [has_lines(1), has_lines(8)])
    calls = stub.calls
    stub.answer = lambda text: f"You asked: {text}"
    generate_run(load_suite(stub, world, 2, *options), tmp_path / "uninterrupted")
    files = [(tmp_path / name / "responses.jsonl").read_bytes() for name in ("uninterrupted", "killed")]
    assert files[0] == files[1]
    assert files[0].count(b"\n") == 24
    assert calls <= 24 + 2 * (2 + 6)  # each kill repeats the pending requests and those of the last second


def test_verify_batching_sends_requests_one_by_one(stub: Stub, world: Path, tmp_path: Path) -> None:
    pending_counts: list[int] = []

    def answer(text: str) -> str:
        if stub.calls <= 12:
            return "batched"
        pending_counts.append(stub.at_once)
        return "alone"

    stub.answer = answer
    barrier = threading.Barrier(12)  # all requests of the run are pending at once
    stub.faults = lambda call: (barrier.wait(), "")[1] if call <= 12 else ""
    generate_run(load_suite(stub, world), tmp_path / "run", verify_batching=5)
    assert json.loads((tmp_path / "run" / "batching.json").read_text()) == {"checked": 5, "flipped": 5}
    assert pending_counts == [1] * 5
    assert stub.calls == 17


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_generate_command_reports_failures_and_batching(stub: Stub, world: Path, tmp_path: Path) -> None:
    stub.faults = lambda call: "400" if call == 1 else ""
    done = run("generate", "suites/tiny", *overrides(stub, world, 1), "--out", tmp_path / "run", "--verify-batching", 3)
    assert done.returncode == 0
    for token in ("1 of 12", "HTTP 400", "fault, your key is", "0 of 3"):
        assert token in done.stderr


def test_response_buffer_passes_on_responses_every_interval() -> None:
    """The last responses before a long pause must not wait for the next one."""
    groups: list[list[str]] = []

    def on_responses(responses: object) -> None:
        groups.append([response.prompt_id for response in responses])  # type: ignore[attr-defined]

    with ResponseBuffer(on_responses, interval=0.05) as buffer:
        for id in ("a", "b"):
            buffer.add(Response(prompt_id=id))
        while not groups:
            time.sleep(0.01)
        buffer.add(Response(prompt_id="c"))
    assert groups == [["a", "b"], ["c"]]


def test_response_buffer_raises_error_of_background_thread() -> None:
    def fail(_: object) -> None:
        raise OSError(28, "No space left on device")

    def add_until_error() -> None:
        with ResponseBuffer(fail, interval=0.01) as buffer:
            for _ in range(500):
                buffer.add(Response(prompt_id="a"))
                time.sleep(0.01)
            pytest.fail("no error was raised")

    with pytest.raises(OSError, match="No space"):
        add_until_error()
