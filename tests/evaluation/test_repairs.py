"""Damaged files of a run: the error names a command, and the command repairs the run."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers import error_code, run_in_process
from stub_server import Stub, stub_server
from vlm_unlearn.config import Suite, load
from vlm_unlearn.evaluation.generate import generate_run
from vlm_unlearn.store import EvaluationRun

SPLITS = "splits=[{name: unsafe, format: vlguard, file: vlguard/test.json, images: vlguard/test, kind: unsafe}]"
DAMAGES: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "lost line": lambda lines: lines[:3] + lines[4:],
    "lost last line": lambda lines: lines[:-1],
    "half last line": lambda lines: [*lines[:-1], lines[-1][:25]],
    "two halves in one line": lambda lines: [*lines[:3], lines[3][:25], *lines[4:]],
    "line twice": lambda lines: [*lines, lines[-1].replace(b'"question": "', b'"question": "not ')],
    "other encoding": lambda lines: [*lines[:-1], lines[-1].decode().replace('"id"', '"id\xe9"').encode("latin-1")],
    "empty": lambda lines: [],
}


@pytest.fixture
def stub() -> Iterator[Stub]:
    with stub_server(lambda text: f"A longer answer to {text}") as server:
        yield server


@pytest.fixture
def finished(stub: Stub, world: Path, tmp_path: Path) -> EvaluationRun:
    overrides = ["model=m", f"root={world}", SPLITS, "metrics={}", "judge=keyword", "generation.backend=openai"]
    suite = load(Suite, Path("suites/tiny"), [*overrides, f"generation.server={stub.url}"])
    run = EvaluationRun(tmp_path / "a run")
    generate_run(suite, run)
    return run


def damage(file: Path, name: str) -> None:
    file.write_bytes(b"".join(DAMAGES[name](file.read_bytes().splitlines(keepends=True))))


def repair(done: subprocess.CompletedProcess[str]) -> None:
    """Does what an error says: deletes the line that it names, if it says so, and runs the command that it names."""
    assert done.returncode == 2, done.stderr
    (command,) = re.findall(r"`(vlm-unlearn .*?)`", done.stderr)
    location = re.match(r"vlm-unlearn: (.*), record (\d+): ", done.stderr)
    if "Delete this line" in done.stderr:
        assert location is not None
        lines = Path(location[1]).read_bytes().splitlines(keepends=True)
        del lines[int(location[2]) - 1]
        Path(location[1]).write_bytes(b"".join(lines))
    repaired = run_in_process(*shlex.split(command)[1:])
    assert repaired.returncode == 0, repaired.stderr


@pytest.mark.parametrize("name", [*DAMAGES, "missing"])
def test_damaged_prompts_are_repaired_by_the_named_command(name: str, stub: Stub, finished: EvaluationRun) -> None:
    contents = [file.read_bytes() for file in (finished.prompts_file, finished.responses_file)]
    calls = stub.calls
    if name == "missing":
        finished.prompts_file.unlink()
    else:
        damage(finished.prompts_file, name)
    repair(run_in_process("judge", "run", finished.path))
    assert [file.read_bytes() for file in (finished.prompts_file, finished.responses_file)] == contents
    assert stub.calls == calls
    assert run_in_process("judge", "run", finished.path).returncode == 0


@pytest.mark.parametrize("name", ["lost line", "half last line", "two halves in one line"])
def test_damaged_answers_are_repaired_by_the_named_command(name: str, stub: Stub, finished: EvaluationRun) -> None:
    content, calls = finished.responses_file.read_bytes(), stub.calls
    damage(finished.responses_file, name)
    repair(run_in_process("judge", "run", finished.path))
    assert finished.responses_file.read_bytes() == content
    assert stub.calls == calls + (2 if name == "two halves in one line" else 1)


@pytest.mark.parametrize("name", ["lost line", "half last line", "two halves in one line"])
def test_damaged_verdicts_are_repaired_by_the_named_command(name: str, finished: EvaluationRun) -> None:
    assert run_in_process("judge", "run", finished.path).returncode == 0
    file = finished.verdicts_file("keyword")
    lines = file.read_bytes().splitlines()
    damage(file, name)
    repair(run_in_process("score", finished.path))
    assert sorted(file.read_bytes().splitlines()) == sorted(lines)
    assert run_in_process("score", finished.path).returncode == 0


def test_damaged_line_stops_generation_and_names_the_fix(finished: EvaluationRun) -> None:
    damage(finished.responses_file, "two halves in one line")
    done = run_in_process("generate", finished.suite_file, "--out", finished.path)
    assert (done.returncode, error_code(done)) == (2, "invalid-json")
    assert f"{finished.responses_file}, record 4" in done.stderr
