"""A model that a server runs, as the model under test: nothing is lost, and what failed is asked anew, once."""

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
from vlm_unlearn.evaluation.generate import generate_run, generation_notes, read_answers
from vlm_unlearn.evaluation.verdicts import judge_run
from vlm_unlearn.generation.server import Grouped
from vlm_unlearn.records import Response, Verdict
from vlm_unlearn.store import read_manifest, read_records

CASE = (
    "cases=[{name: unsafe, format: vlguard, file: vlguard/test.json, images: vlguard/test, kind: unsafe, samples: %d}]"
)


@pytest.fixture
def stub() -> Iterator[Stub]:
    with stub_server(lambda text: f"You asked: {text}") as served:
        yield served


def keys(stub: Stub, world: Path, samples: int, *more: str) -> list[str]:
    found = ["model=under-test", f"root={world}", CASE % samples, "metrics={}", "judge=keyword"]
    return [*found, "generation.backend=openai", f"generation.server={stub.url}", *more]


def suite(stub: Stub, world: Path, samples: int = 1, *more: str) -> Suite:
    return load(Suite, Path("suites/tiny"), keys(stub, world, samples, *more))


def responses(folder: Path) -> list[Response]:
    return list(read_records(folder / "responses.jsonl", Response))


def test_a_server_answers_each_sample(stub: Stub, world: Path, tmp_path: Path) -> None:
    stub.finish_reason = "length"
    plain = stub.answer
    stub.answer = lambda text: (time.sleep(0.01), plain(text))[1]  # or one is answered before the next is sent
    wanted = suite(stub, world, 3, "generation.temperature=1.0", "generation.top_p=0.9", "generation.concurrency=5")
    generate_run(wanted, tmp_path / "run")
    prompts, found = read_answers(tmp_path / "run")
    assert [response.key for response in found] == [(id, sample) for id in prompts for sample in range(3)]  # in order
    for response in found:
        assert response.text == f"You asked: {prompts[response.prompt_id].question}".strip()
        assert (response.finish_reason, response.error) == ("length", None)  # a cut answer is an answer
    assert len({body["seed"] for body in stub.bodies}) == len(found) == stub.calls
    assert {(body["model"], body["temperature"], body["top_p"]) for body in stub.bodies} == {("under-test", 1.0, 0.9)}
    assert 1 < stub.most_at_once <= 5
    manifest = read_manifest(tmp_path / "run")["identity"]
    assert manifest["model"] == {"server": stub.url, "name": "under-test", "weights": "unknown"}
    assert manifest["samples"] == {"unsafe": 3}


def test_what_failed_is_asked_anew(stub: Stub, world: Path, tmp_path: Path) -> None:
    """Also after it was judged: no verdict on a missing answer stays."""
    wanted = suite(stub, world)
    folder = tmp_path / "run"
    stub.faults = lambda call: "400" if call in (2, 5) else ""
    generate_run(wanted, folder)
    failed = [response.key for response in responses(folder) if response.error]
    assert len(failed) == 2
    assert all(
        response.text is None and str(response.error).startswith("HTTP 400")
        for response in responses(folder)
        if response.key in failed
    )
    (remark,) = generation_notes(folder)
    assert "2 of 12 answers failed" in remark
    verdicts = judge_run(folder, JudgeConfig(name="keyword"))
    assert sum(verdict.error is not None for verdict in read_records(verdicts, Verdict)) == 2
    answered, calls = [response for response in responses(folder) if not response.error], stub.calls
    generate_run(wanted, folder)
    assert stub.calls == calls + 2
    assert not generation_notes(folder)
    assert [response for response in responses(folder) if response.key not in failed] == answered
    judge_run(folder, JudgeConfig(name="keyword"))
    assert [verdict.error for verdict in read_records(verdicts, Verdict)] == [None] * 12
    generate_run(wanted, folder)
    assert stub.calls == calls + 2


def test_a_server_that_ends_is_gone_on_with(stub: Stub, world: Path, tmp_path: Path) -> None:
    wanted = suite(stub, world, 1, "generation.concurrency=8")  # their retries go on side by side
    folder = tmp_path / "run"
    stub.faults = lambda call: "cut" if call > 3 else ""
    with pytest.raises(RunError, match="8 questions in a row were not answered"):
        generate_run(wanted, folder)
    with raises_code("run-unfinished", file=folder):
        read_answers(folder)
    assert sum(response.error is None for response in responses(folder)) == 3
    stub.faults = lambda call: ""
    calls = stub.calls
    generate_run(wanted, folder)
    assert stub.calls == calls + 9
    assert all(response.error is None for response in read_answers(folder)[1])


def test_a_kill_loses_no_more_than_a_second(stub: Stub, world: Path, tmp_path: Path) -> None:
    stub.answer = lambda text: (time.sleep(0.4), f"You asked: {text}")[1]
    arguments = keys(
        stub, world, 2, "generation.temperature=0.5", "generation.concurrency=2", "generation.max_new_tokens=5"
    )

    def lines(count: int) -> Callable[[], bool]:
        file = tmp_path / "killed" / "responses.jsonl"
        return lambda: file.exists() and file.read_bytes().count(b"\n") >= count

    run_killing(["generate", "suites/tiny", *arguments, "--out", tmp_path / "killed"], [lines(1), lines(8)])
    asked = stub.calls
    assert run("generate", "suites/tiny", *arguments, "--out", tmp_path / "whole").returncode == 0
    files = [(tmp_path / name / "responses.jsonl").read_bytes() for name in ("whole", "killed")]
    assert files[0] == files[1]
    assert files[0].count(b"\n") == 24
    assert asked <= 24 + 2 * (2 + 6)  # what a kill cost: the questions under way, and those of the last second


def test_batching_is_checked_with_nothing_beside(stub: Stub, world: Path, tmp_path: Path) -> None:
    at_once: list[int] = []

    def answer(text: str) -> str:
        if stub.calls <= 12:
            return "beside others"
        at_once.append(stub.at_once)
        return "alone"

    stub.answer = answer
    gate = threading.Barrier(12)
    stub.faults = lambda call: (
        (gate.wait(), "")[1] if call <= 12 else ""
    )  # the run's questions are all under way at once
    generate_run(suite(stub, world), tmp_path / "run", verify_batching=5)
    assert json.loads((tmp_path / "run" / "batching.json").read_text()) == {"checked": 5, "flipped": 5}
    assert at_once == [1] * 5
    assert stub.calls == 17


def test_the_command_says_what_failed(stub: Stub, world: Path, tmp_path: Path) -> None:
    stub.faults = lambda call: "400" if call == 1 else ""
    done = run("generate", "suites/tiny", *keys(stub, world, 1), "--out", tmp_path / "run", "--verify-batching", 3)
    assert done.returncode == 0
    assert "1 of 12 answers failed" in done.stderr
    assert '"HTTP 400: "fault, your key is Bearer none""' in done.stderr
    assert "0 of 3 answers" in done.stderr


def test_answers_are_handed_on_each_second() -> None:
    """Also the last before a long silence."""
    groups: list[list[str]] = []
    with Grouped(lambda answers: groups.append([answer.prompt_id for answer in answers]), seconds=0.05) as grouped:
        for id in ("a", "b"):
            grouped.add(Response(prompt_id=id))
        while not groups:
            time.sleep(0.01)
        grouped.add(Response(prompt_id="c"))
    assert groups == [["a", "b"], ["c"]]


def test_a_full_disk_ends_the_asking() -> None:
    def full(_: object) -> None:
        raise OSError(28, "No space left on device")

    def ask_on() -> None:
        with Grouped(full, seconds=0.01) as grouped:
            for _ in range(500):
                grouped.add(Response(prompt_id="a"))
                time.sleep(0.01)
            pytest.fail("nobody noticed")

    with pytest.raises(OSError, match="No space"):
        ask_on()
