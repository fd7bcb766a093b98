"""Run folders survive kills and refuse to mix runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_unlearn.config import Suite, validate
from vlm_unlearn.errors import UserError
from vlm_unlearn.models.loader import model_folder
from vlm_unlearn.records import Prompt, Response
from vlm_unlearn.store import (
    RecordLog,
    build_atomically,
    cache_folder,
    digest_model,
    lock_folder,
    open_run,
    peak_memory_mb,
    read_json,
    read_manifest,
    read_records,
    write_json,
    write_records,
)


def responses(*names: str) -> list[Response]:
    return [Response(prompt_id=name, text=f"answer {name}") for name in names]


def test_a_half_written_line_is_dropped_and_written_again(tmp_path: Path) -> None:
    file = tmp_path / "responses.jsonl"
    RecordLog(file, Response).append(responses("a", "b"))
    whole = file.read_bytes()
    for cut in range(len(whole)):
        file.write_bytes(whole[:cut])
        log = RecordLog(file, Response)
        log.append(responses("a", "b"))
        assert file.read_bytes() == whole


def test_nothing_is_doubled(tmp_path: Path) -> None:
    file = tmp_path / "responses.jsonl"
    for _ in range(2):
        RecordLog(file, Response).append(responses("a", "b"))
    assert [record.prompt_id for record in read_records(file, Response)] == ["a", "b"]


def test_nul_survives_and_lone_surrogates_are_replaced(tmp_path: Path) -> None:
    file = tmp_path / "responses.jsonl"
    RecordLog(file, Response).append([Response(prompt_id="a", text="\ud800 \x00 \u202e")])
    assert next(iter(read_records(file, Response))).text == "\ufffd \x00 \u202e"


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    write_records(file, [Prompt(id="a", group_id="a", set="s", kind="safe", question="q")])
    file.write_text(file.read_text() + '{"id": 3}\n')
    with pytest.raises(UserError, match=r"prompts\.jsonl: line 2: id"):
        list(read_records(file, Prompt))


def test_a_run_folder_refuses_another_run(tmp_path: Path) -> None:
    open_run(tmp_path / "run", {"recipe": {"beta": 1, "seed": 0}})
    assert open_run(tmp_path / "run", {"recipe": {"beta": 1, "seed": 0}})["finished"] is False
    with pytest.raises(UserError, match=r"different: recipe\.beta"):
        open_run(tmp_path / "run", {"recipe": {"beta": 2, "seed": 0}})


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        open_run(tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_build_once_leaves_nothing_after_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "built"
    with pytest.raises(ValueError, match="half way"), build_atomically(folder):
        raise ValueError("half way")
    assert not folder.exists()
    with build_atomically(folder) as scratch:
        assert scratch is not None
        (scratch / "file").write_text("whole")
    with build_atomically(folder) as scratch:
        assert scratch is None
    assert (folder / "file").read_text() == "whole"


def test_json_errors_name_the_line(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('[\n{"a": 1},\n{"a" 2}\n]')
    with pytest.raises(UserError, match=r"x\.json: line 3"):
        read_json(tmp_path / "x.json")
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match=r"deep\.json"):
        read_json(tmp_path / "deep.json")


def test_the_model_digest_follows_the_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"one")
    write_json(tmp_path / "config.json", {})
    before = digest_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert digest_model(tmp_path) != before


def test_what_a_killed_writer_left_is_deleted_by_the_next(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, of_another, foreign = (
        tmp_path / name for name in (f".a.json.{dead.pid}.part", f".a.json.{os.getppid()}.part", ".a.json.x.part")
    )
    for file in (left, of_another, foreign):
        file.touch()
    write_json(tmp_path / "a.json", {})
    assert {file.name for file in tmp_path.iterdir()} == {"a.json", of_another.name, foreign.name}


def test_a_folder_is_held_by_one(tmp_path: Path) -> None:
    with (
        lock_folder(tmp_path / "out"),
        pytest.raises(UserError, match="another process is at work"),
        lock_folder(tmp_path / "out"),
    ):
        pass
    with lock_folder(tmp_path / "out"):  # let go of
        pass


@pytest.mark.timeout(20)
@pytest.mark.parametrize("special", ["pipe", "link to a device"])
def test_what_has_no_end_is_not_read(special: str, tmp_path: Path) -> None:
    file = tmp_path / "responses.jsonl"
    if special == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero")
    for read in (
        lambda: read_json(file),
        lambda: list(read_records(file, Response)),
        lambda: RecordLog(file, Response),
    ):
        with pytest.raises(UserError, match="is a device or a pipe"):
            read()


@pytest.mark.parametrize("field", ["wall_seconds", "peak_memory_mb"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-1", "1" + "0" * 400, '"1"'])
def test_costs_that_are_no_amounts_are_refused(field: str, value: str, tmp_path: Path) -> None:
    costs = {"wall_seconds": "1.5", "peak_memory_mb": "100", field: value}
    written = ", ".join(f'"{name}": {amount}' for name, amount in costs.items())
    (tmp_path / "manifest.json").write_text(f'{{"identity": {{}}, "finished": true, {written}}}')
    with pytest.raises(UserError, match="is not a run's manifest"):
        read_manifest(tmp_path)


def test_the_home_of_somebody_unknown_is_a_path_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_UNLEARN_CACHE", "~nosuchuser/x")
    assert cache_folder() == Path("~nosuchuser/x")
    with pytest.raises(UserError, match="~nosuchuser/x: model folder not found"):
        model_folder("~nosuchuser/x")
    cases = [{"name": "a", "format": "vlguard", "file": "x.json", "images": "x", "kind": "unsafe"}]
    suite = validate(
        Suite, {"model": "~nosuchuser/x", "root": "~nosuchuser/y", "judge": "keyword", "splits": cases}, "suite.json"
    )
    assert suite.splits[0].file.parent.name == "y"


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux counts a parent's memory in")
def test_peak_memory_is_this_process_own() -> None:
    held = bytearray(300 * 2**20)
    assert peak_memory_mb() >= 300
    code = "from vlm_unlearn.store import peak_memory_mb; print(peak_memory_mb())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    del held
    assert 0 < int(done.stdout) < 250
