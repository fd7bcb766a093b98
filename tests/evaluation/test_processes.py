"""Several processes answer as one does, none waits for a dead one, and a check says what batching changes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from helpers import run, run_killing
from vlm_unlearn.config import Suite, load
from vlm_unlearn.distributed import ProcessGroup
from vlm_unlearn.errors import UserError
from vlm_unlearn.evaluation.answers import RESPONSES, merge_shards, response_log
from vlm_unlearn.evaluation.generate import generate_run, read_answers
from vlm_unlearn.evaluation.prompts import image_roots, suite_prompts
from vlm_unlearn.generation.base import build_requests
from vlm_unlearn.generation.hf import make_batches
from vlm_unlearn.records import Response
from vlm_unlearn.store import read_json, read_records

CASES = (
    "cases=[{name: unsafe, format: vlguard, file: vlguard/test.json, images: vlguard/test, kind: unsafe, samples: 3},"
    " {name: harmless, format: safe_eraser, file: safe_eraser/all_val.json, images: safe_eraser, kind: safe}]"
)
METRICS = "metrics={asr: {cases: [unsafe], labels: [complied], group: any}}"


def keys(model: Path, world: Path, *more: str) -> list[str]:
    sampling = ["generation.temperature=1.0", "generation.top_p=0.9", "generation.batch_size=4"]
    return [f"model={model}", f"root={world}", CASES, METRICS, *sampling, *more]


def suite(model: Path, world: Path, *more: str) -> Suite:
    return load(Suite, Path("suites/tiny"), keys(model, world, *more))


def texts(folder: Path) -> dict[tuple[str, int], str | None]:
    return {response.key: response.text for response in read_records(folder / RESPONSES, Response)}


def launch(processes: int, *arguments: object) -> subprocess.Popen[str]:
    """The command under torchrun."""
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(processes),
        "--rdzv_backend",
        "c10d",
    ]
    start += ["--rdzv_endpoint", "localhost:0", "-m", "vlm_unlearn.cli.main", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


@pytest.fixture(scope="module")
def whole(tiny_model: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process answers."""
    folder = tmp_path_factory.mktemp("one") / "run"
    generate_run(suite(tiny_model, world), folder)
    return folder


def test_samples_are_answered_in_the_prompts_order(whole: Path) -> None:
    prompts, responses = read_answers(whole)
    wanted = [
        (prompt.id, sample) for prompt in prompts.values() for sample in range(3 if prompt.set == "unsafe" else 1)
    ]
    assert [response.key for response in responses] == wanted
    by_prompt = {
        prompt.id: {text for (id, _), text in texts(whole).items() if id == prompt.id} for prompt in prompts.values()
    }
    assert all(len(by_prompt[prompt.id]) == 3 for prompt in prompts.values() if prompt.set == "unsafe")


def test_killed_while_sampling_ends_with_the_same_file(
    tiny_model: Path, world: Path, whole: Path, tmp_path: Path
) -> None:
    file = tmp_path / "run" / RESPONSES

    def has(count: int) -> bool:
        return file.exists() and file.read_bytes().count(b"\n") >= count

    arguments = ["generate", "suites/tiny", *keys(tiny_model, world), "--out", tmp_path / "run"]
    run_killing(arguments, [lambda: has(1), lambda: has(17)])
    assert file.read_bytes() == (whole / RESPONSES).read_bytes()


def test_cut_anywhere_ends_with_the_same_file(tiny_model: Path, world: Path, whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
    bytes_of_whole = (whole / RESPONSES).read_bytes()
    for cut in (0, 1, 333, len(bytes_of_whole) // 2, len(bytes_of_whole) - 1):
        manifest = read_json(folder / "manifest.json")
        (folder / "manifest.json").write_text(json.dumps(manifest | {"finished": False}))
        (folder / RESPONSES).write_bytes(bytes_of_whole[:cut])
        generate_run(suite(tiny_model, world), folder)
        assert (folder / RESPONSES).read_bytes() == bytes_of_whole


def test_two_processes_answer_as_one(tiny_model: Path, world: Path, whole: Path, tmp_path: Path) -> None:
    """They go on with what one process and then three had answered when they were killed; one judges, scores and talks."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "manifest.json").write_text(json.dumps(read_json(whole / "manifest.json") | {"finished": False}))
    lines = (whole / RESPONSES).read_text().splitlines(keepends=True)
    (folder / RESPONSES).write_text("".join(lines[:5]) + lines[5][:30])
    (folder / "parts").mkdir()
    for rank in range(3):
        (folder / "parts" / f"{rank}.jsonl").write_text("".join(lines[8 + 4 * rank : 11 + 4 * rank]))
    two = launch(2, "evaluate", "suites/tiny", *keys(tiny_model, world), "--json", "--out", folder)
    out, err = two.communicate(timeout=200)
    assert two.returncode == 0, err
    (row,) = json.loads(out)["rows"]  # one document
    assert row["metrics"]["asr"]["n"] == 12
    assert (folder / RESPONSES).read_bytes() == (whole / RESPONSES).read_bytes()
    assert not (folder / "parts").exists()
    assert (folder / "report.html").exists()
    assert err.count("generate (") == 1
    share = int(err.split("generate (")[1].split(")")[0])
    assert 0 < share < (len(lines) - 5 - 9 + 4) * 2 / 3  # it was not the only one at work


def test_two_killed_processes_lose_nothing(tiny_model: Path, world: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    two = launch(2, "generate", "suites/tiny", *keys(tiny_model, world, "generation.batch_size=1"), "--out", folder)
    parts = [folder / "parts" / f"{rank}.jsonl" for rank in (0, 1)]
    while not all(part.exists() for part in parts):
        assert two.poll() is None, two.communicate()
        time.sleep(0.002)
    _kill(two, folder)
    answered = {response.key: response for part in parts for response in _whole_lines(part)}
    assert len(answered) >= 2
    generate_run(suite(tiny_model, world, "generation.batch_size=1"), folder)
    found = {response.key: response for response in _all(folder)}
    assert list(found) == list(texts(whole))
    assert {key: found[key] for key in answered} == answered


def _whole_lines(part: Path) -> list[Response]:
    return [
        Response.model_validate_json(line) for line in part.read_text().splitlines(keepends=True) if line.endswith("\n")
    ]


def _kill(launcher: subprocess.Popen[str], folder: Path) -> None:
    """With SIGKILL the launcher, and the processes at work in the folder, which have sessions of their own."""
    launcher.kill()
    while alive := [process for process in Path("/proc").glob("[0-9]*") if str(folder).encode() in _command(process)]:
        for process in alive:
            with suppress(ProcessLookupError):
                os.kill(int(process.name), signal.SIGKILL)
        time.sleep(0.01)
    launcher.communicate()


def _command(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def test_one_that_fails_ends_all(tiny_model: Path, world: Path, tmp_path: Path) -> None:
    """An image that only the second process comes upon is broken."""
    broken = Path(shutil.copytree(world, tmp_path / "world"))
    one_case = "cases=[{name: unsafe, format: vlguard, file: vlguard/test.json, images: vlguard/test, kind: unsafe}]"
    shared = [f"model={tiny_model}", f"root={broken}", one_case, "metrics={}", "generation.batch_size=1"]
    wanted = load(Suite, Path("suites/tiny"), shared)
    asked = [
        question.image
        for (question,) in make_batches(build_requests(suite_prompts(wanted), image_roots(wanted), {}), 1)
    ]
    assert asked[3] is not None
    assert asked[3] not in asked[::2]
    asked[3].write_bytes(b"no image")
    started = time.monotonic()
    two = launch(2, "generate", "suites/tiny", *shared, "--out", tmp_path / "run")
    _, err = two.communicate(timeout=120)
    assert two.returncode != 0
    assert sum(line.startswith("vlm-unlearn:") and "is not an image" in line for line in err.splitlines()) == 1
    assert time.monotonic() - started < 60


def test_parts_are_joined_once(tmp_path: Path) -> None:
    """A kill after the parts were read and before they were deleted; a half-written line; an answer that two parts have."""
    (tmp_path / "parts").mkdir()
    lines = [Response(prompt_id=id, text=id).model_dump_json() + "\n" for id in "abc"]
    (tmp_path / RESPONSES).write_text(lines[0] + lines[1][:9])
    (tmp_path / "parts" / "0.jsonl").write_text(lines[0] + lines[1])
    (tmp_path / "parts" / "7.jsonl").write_text(lines[1] + lines[2] + lines[0][:5])
    merge_shards(tmp_path)
    assert [response.prompt_id for response in read_records(tmp_path / RESPONSES, Response)] == ["a", "b", "c"]
    assert not (tmp_path / "parts").exists()


def test_what_an_earlier_start_left_behind_is_noticed(tmp_path: Path) -> None:
    with response_log(tmp_path, ProcessGroup(1, 2)) as log:
        log.append([Response(prompt_id="a", text="a")])
        with pytest.raises(UserError, match="another process is at work in this folder"):
            merge_shards(tmp_path)


@pytest.mark.parametrize("backend", ["openai", "vllm"])
def test_what_batches_itself_is_one_process(
    backend: str, tiny_model: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    server = ["generation.server=http://localhost:1/v1"] if backend == "openai" else []
    with pytest.raises(UserError, match="start it as one process"):
        generate_run(suite(tiny_model, world, f"generation.backend={backend}", *server), tmp_path / "run")


def test_batching_is_checked(tiny_model: Path, world: Path, whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
    changed = [
        response.model_copy(update={"text": "changed"}) if number % 7 == 0 else response
        for number, response in enumerate(_all(folder))
    ]
    (folder / RESPONSES).write_text("".join(response.model_dump_json() + "\n" for response in changed))
    generate_run(suite(tiny_model, world), folder, verify_batching=10_000)
    found = read_json(folder / "batching.json")
    assert found["checked"] == len(changed)
    meant = sum(response.text == "changed" for response in changed)
    assert meant > 0
    assert meant <= found["flipped"] <= meant + 2


def _all(folder: Path) -> list[Response]:
    return list(read_records(folder / RESPONSES, Response))


def test_the_check_is_in_the_row(tiny_model: Path, world: Path, tmp_path: Path) -> None:
    arguments = [
        "evaluate",
        "suites/tiny",
        *keys(tiny_model, world),
        "--json",
        "--verify-batching",
        5,
        "--out",
        tmp_path / "run",
    ]
    for _ in range(2):
        done = run(*arguments)
        assert done.returncode == 0, done.stderr
        (row,) = json.loads(done.stdout)["rows"]
        assert row["batching"]["checked"] == 5
        assert "of 5 answers that were asked once more, one by one" in done.stderr
    assert "one by one (" not in done.stderr  # it was known
