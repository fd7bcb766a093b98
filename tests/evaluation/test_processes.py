"""Several processes write the same answers as one, and end if one of them dies. The batching check counts changes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fork_server import start_processes
from helpers import raises_code, run_killing
from vlm_unlearn.config import Suite, load
from vlm_unlearn.evaluation.generate import generate_run, generation_notes
from vlm_unlearn.evaluation.prompts import suite_prompts
from vlm_unlearn.evaluation.runner import evaluate_run
from vlm_unlearn.records import Response
from vlm_unlearn.store import EvaluationRun, read_json, read_records

RESPONSES = "responses.jsonl"
SPLITS = (
    "splits=[{name: unsafe, format: vlguard, file: vlguard/test.json, images: vlguard/test, kind: unsafe, samples: 3},"
    " {name: harmless, format: safe_eraser, file: safe_eraser/all_val.json, images: safe_eraser, kind: safe}]"
)
METRICS = "metrics={asr: {splits: [unsafe], labels: [complied], aggregate: any_per_question}}"


def settings(model: Path, world: Path, *overrides: str) -> list[str]:
    sampling = ["generation.temperature=1.0", "generation.top_p=0.9", "generation.batch_size=4"]
    return [f"model={model}", f"root={world}", SPLITS, METRICS, *sampling, *overrides]


def sampling_suite(model: Path, world: Path, *overrides: str) -> Suite:
    return load(Suite, Path("suites/tiny"), settings(model, world, *overrides))


def texts(folder: Path) -> dict[tuple[str, int], str | None]:
    return {response.key: response.text for response in read_records(folder / RESPONSES, Response)}


@pytest.fixture(scope="module")
def complete(tiny_model: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a single process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    generate_run(sampling_suite(tiny_model, world), folder)
    return folder


def test_generate_run_sorts_samples_by_prompt(complete: Path) -> None:
    prompts, responses = EvaluationRun(complete).read_answers()
    expected_keys = [
        (prompt.id, sample) for prompt in prompts.values() for sample in range(3 if prompt.set == "unsafe" else 1)
    ]
    assert [response.key for response in responses] == expected_keys
    by_prompt = {
        prompt.id: {text for (id, _), text in texts(complete).items() if id == prompt.id} for prompt in prompts.values()
    }
    assert all(len(by_prompt[prompt.id]) == 3 for prompt in prompts.values() if prompt.set == "unsafe")


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(180)
def test_killed_generation_writes_the_same_file(tiny_model: Path, world: Path, complete: Path, tmp_path: Path) -> None:
    file = tmp_path / "run" / RESPONSES

    def has_lines(count: int) -> bool:
        return file.exists() and file.read_bytes().count(b"\n") >= count

    arguments = ["generate", "suites/tiny", *settings(tiny_model, world), "--out", tmp_path / "run"]
    run_killing(arguments, [lambda: has_lines(1), lambda: has_lines(17)])
    assert file.read_bytes() == (complete / RESPONSES).read_bytes()


@pytest.mark.slow
def test_generate_run_completes_a_file_truncated_anywhere(
    tiny_model: Path, world: Path, complete: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(complete, tmp_path / "run")
    complete_bytes = (complete / RESPONSES).read_bytes()
    for end in (0, 1, 333, len(complete_bytes) // 2, len(complete_bytes) - 1):
        manifest = read_json(folder / "manifest.json")
        (folder / "manifest.json").write_text(json.dumps(manifest | {"finished": False}))
        (folder / RESPONSES).write_bytes(complete_bytes[:end])
        generate_run(sampling_suite(tiny_model, world), folder)
        assert (folder / RESPONSES).read_bytes() == complete_bytes


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(240)
def test_two_processes_resume_and_write_the_same_answers(
    tiny_model: Path, world: Path, complete: Path, tmp_path: Path
) -> None:
    """Two processes resume a run of one process, then of three, that were killed.

    Only the first one judges, scores and prints.
    """
    folder = tmp_path / "run"
    shutil.copytree(complete, folder)
    (folder / "manifest.json").write_text(json.dumps(read_json(complete / "manifest.json") | {"finished": False}))
    lines = (complete / RESPONSES).read_text().splitlines(keepends=True)
    (folder / RESPONSES).write_text("".join(lines[:5]) + lines[5][:30])
    (folder / "parts").mkdir()
    for rank in range(3):
        (folder / "parts" / f"{rank}.jsonl").write_text("".join(lines[8 + 4 * rank : 11 + 4 * rank]))
    two = start_processes(2, ["evaluate", "suites/tiny", *settings(tiny_model, world), "--json", "--out", folder])
    texts_of_ranks = [process.communicate(timeout=200) for process in two]
    out, err = map("".join, zip(*texts_of_ranks, strict=True))
    assert [process.wait() for process in two] == [0, 0], err
    (row,) = json.loads(out)["rows"]  # one document
    assert row["metrics"]["asr"]["n"] == 12
    assert (folder / RESPONSES).read_bytes() == (complete / RESPONSES).read_bytes()
    assert not (folder / "parts").exists()
    assert (folder / "report.html").exists()
    assert err.count("generate (") == 1
    process_answers = int(err.split("generate (")[1].split(")")[0])
    assert 0 < process_answers < (len(lines) - 5 - 9 + 4) * 2 / 3  # the other process did the rest


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(240)
def test_two_killed_processes_lose_no_answers(tiny_model: Path, world: Path, complete: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ["generate", "suites/tiny", *settings(tiny_model, world, "generation.batch_size=1"), "--out", folder]
    two = start_processes(2, arguments)
    shards = [folder / "parts" / f"{rank}.jsonl" for rank in (0, 1)]
    while not all(shard.exists() and _complete_lines(shard) for shard in shards):
        assert all(process.poll() is None for process in two), [process.communicate() for process in two]
        time.sleep(0.002)
    for process in two:
        process.kill()
    answered = {response.key: response for shard in shards for response in _complete_lines(shard)}
    assert len(answered) >= 2
    generate_run(sampling_suite(tiny_model, world, "generation.batch_size=1"), folder)
    responses = {response.key: response for response in _read(folder)}
    assert list(responses) == list(texts(complete))
    assert {key: responses[key] for key in answered} == answered


def _complete_lines(shard: Path) -> list[Response]:
    return [
        Response.model_validate_json(line)
        for line in shard.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]


FAILING_LAUNCHER = """
import os
from vlm_unlearn.cli.main import main
from vlm_unlearn.errors import UserError
from vlm_unlearn.generation import hf

generate_batch = hf.generate_batch
calls = 0


def fail_in_second_process(*arguments):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls == 2:
        raise UserError("the second process fails", code="planted-error")
    return generate_batch(*arguments)


hf.generate_batch = fail_in_second_process
main()
"""


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(180)
def test_error_in_one_process_ends_all(tiny_model: Path, world: Path, tmp_path: Path) -> None:
    split = "splits=[{name: unsafe, format: vlguard, file: vlguard/test.json, images: vlguard/test, kind: unsafe}]"
    shared = [f"model={tiny_model}", f"root={world}", split, "metrics={}", "generation.batch_size=1"]
    script = tmp_path / "launcher.py"
    script.write_text(FAILING_LAUNCHER)
    started = time.monotonic()
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    launcher += ["--rdzv_endpoint", "localhost:0", str(script)]
    two = subprocess.run(
        [sys.executable, *launcher, "generate", "suites/tiny", *shared, "--out", str(tmp_path / "run")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert two.returncode != 0
    assert (
        sum(line.startswith("vlm-unlearn:") and line.endswith("[planted-error]") for line in two.stderr.splitlines())
        == 1
    )
    assert time.monotonic() - started < 60


def test_broken_image_is_one_failed_answer(tiny_model: Path, world: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(world, tmp_path / "world"))
    split = "splits=[{name: unsafe, format: vlguard, file: vlguard/test.json, images: vlguard/test, kind: unsafe}]"
    shared = [f"model={tiny_model}", f"root={broken}", split, "metrics={}", "generation.batch_size=4"]
    suite = load(Suite, Path("suites/tiny"), shared)
    first = next(prompt for prompt in suite_prompts(suite) if prompt.image is not None)
    (broken / "vlguard" / "test" / str(first.image)).write_bytes(b"no image")
    run = EvaluationRun(tmp_path / "run")
    generate_run(suite, run)
    prompts, responses = run.read_answers()
    failed = [response for response in responses if response.error is not None]
    assert {prompts[response.prompt_id].image for response in failed} == {first.image}
    assert all(str(first.image)[:20] in str(response.error) for response in failed)


@pytest.mark.parametrize("backend", ["openai", "vllm"])
def test_generate_run_in_two_processes_needs_the_backend_hf(
    backend: str, tiny_model: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    server = ["generation.server=http://localhost:1/v1"] if backend == "openai" else []
    with raises_code("unsupported-setting", field="generation.backend"):
        generate_run(sampling_suite(tiny_model, world, f"generation.backend={backend}", *server), tmp_path / "run")


@pytest.mark.slow
def test_verify_batching_counts_changed_answers(tiny_model: Path, world: Path, complete: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(complete, tmp_path / "run")
    changed = [
        response.model_copy(update={"text": "changed"}) if number % 7 == 0 else response
        for number, response in enumerate(_read(folder))
    ]
    (folder / RESPONSES).write_text("".join(response.model_dump_json() + "\n" for response in changed))
    generate_run(sampling_suite(tiny_model, world), folder, verify_batching=10_000)
    batching = read_json(folder / "batching.json")
    assert batching["checked"] == len(changed)
    expected = sum(response.text == "changed" for response in changed)
    assert 0 < expected <= batching["flipped"] <= expected + 2  # batching itself may change an answer or two


def _read(folder: Path) -> list[Response]:
    return list(read_records(folder / RESPONSES, Response))


def test_verify_batching_is_in_the_row_and_runs_once(
    tiny_model: Path, world: Path, complete: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(complete, tmp_path / "run"))
    suite = sampling_suite(tiny_model, world)
    for expected_stages in ({"one by one", "judge tiny_world"}, {"judge tiny_world"}):
        events: list[tuple[str, int, int]] = []
        row = evaluate_run(suite, folder, "m", lambda *event, events=events: events.append(event), verify_batching=5)
        assert row.batching is not None
        assert row.batching.checked == 5
        assert {stage for stage, _, _ in events} == expected_stages
        assert "of 5 answers" in generation_notes(folder)[-1]
