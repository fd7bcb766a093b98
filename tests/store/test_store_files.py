"""Files and folders survive kills."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import raises_code
from vlm_unlearn.config import Suite, validate
from vlm_unlearn.errors import UserError
from vlm_unlearn.modeling.loader import model_folder
from vlm_unlearn.records import Prompt, Response
from vlm_unlearn.store import (
    RecordLog,
    build_atomically,
    cache_folder,
    digest_model,
    lock_folder,
    peak_memory_mb,
    read_json,
    read_records,
    validate_not_overwriting,
    write_json,
    write_records,
)


def responses(*names: str) -> list[Response]:
    return [Response(prompt_id=name, text=f"answer {name}") for name in names]


def test_record_log_drops_an_incomplete_line_and_appends_it_again(tmp_path: Path) -> None:
    file = tmp_path / "responses.jsonl"
    RecordLog(file, Response).append(responses("a", "b"))
    complete = file.read_bytes()
    for length in range(len(complete)):
        file.write_bytes(complete[:length])
        log = RecordLog(file, Response)
        log.append(responses("a", "b"))
        assert file.read_bytes() == complete


def test_record_log_appends_no_duplicates(tmp_path: Path) -> None:
    file = tmp_path / "responses.jsonl"
    for _ in range(2):
        RecordLog(file, Response).append(responses("a", "b"))
    assert [record.prompt_id for record in read_records(file, Response)] == ["a", "b"]


def test_record_log_keeps_nul_and_replaces_lone_surrogates(tmp_path: Path) -> None:
    file = tmp_path / "responses.jsonl"
    RecordLog(file, Response).append([Response(prompt_id="a", text="\ud800 \x00 \u202e")])
    assert next(iter(read_records(file, Response))).text == "\ufffd \x00 \u202e"


def test_invalid_record_names_file_record_and_field(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    write_records(file, [Prompt(id="a", group_id="a", set="s", kind="safe", question="q")])
    file.write_text(file.read_text() + '{"id": 3}\n')
    with raises_code("invalid-field", file=file, record=2, field="id"):
        list(read_records(file, Prompt))


def test_build_atomically_leaves_nothing_after_an_error_and_builds_once(tmp_path: Path) -> None:
    folder = tmp_path / "built"
    with pytest.raises(ValueError, match="half way"), build_atomically(folder):
        raise ValueError("half way")
    assert not folder.exists()
    with build_atomically(folder) as temporary:
        assert temporary is not None
        (temporary / "file").write_text("complete")
    with build_atomically(folder) as temporary:
        assert temporary is None
    assert (folder / "file").read_text() == "complete"


def test_invalid_json_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('[\n{"a": 1},\n{"a" 2}\n]')
    with raises_code("invalid-json", file=tmp_path / "x.json") as caught:
        read_json(tmp_path / "x.json")
    assert "line 3" in str(caught.value)
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with raises_code("invalid-json", file=tmp_path / "deep.json"):
        read_json(tmp_path / "deep.json")


def test_model_digest_changes_with_the_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"one")
    write_json(tmp_path / "config.json", {})
    digest = digest_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert digest_model(tmp_path) != digest


def test_writing_deletes_temporary_files_of_killed_processes(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stale, of_another, foreign = (
        tmp_path / name for name in (f".a.json.{dead.pid}.part", f".a.json.{os.getppid()}.part", ".a.json.x.part")
    )
    for file in (stale, of_another, foreign):
        file.touch()
    write_json(tmp_path / "a.json", {})
    assert {file.name for file in tmp_path.iterdir()} == {"a.json", of_another.name, foreign.name}


def test_folder_lock_excludes_a_second_holder(tmp_path: Path) -> None:
    with (
        lock_folder(tmp_path / "out"),
        raises_code("run-locked", file=tmp_path / "out"),
        lock_folder(tmp_path / "out"),
    ):
        pass
    with lock_folder(tmp_path / "out"):  # released
        pass


@pytest.mark.timeout(20)
@pytest.mark.parametrize("special", ["pipe", "link to a device"])
def test_pipes_and_devices_are_not_read(special: str, tmp_path: Path) -> None:
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
        with raises_code("not-a-file", file=file):
            read()


def test_home_of_an_unknown_user_is_a_missing_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_UNLEARN_CACHE", "~nosuchuser/x")
    assert cache_folder() == Path("~nosuchuser/x")
    with pytest.raises(UserError, match="~nosuchuser/x"):
        model_folder("~nosuchuser/x")
    splits = [{"name": "a", "format": "vlguard", "file": "x.json", "images": "x", "kind": "unsafe"}]
    suite = validate(
        Suite, {"model": "~nosuchuser/x", "root": "~nosuchuser/y", "judge": "keyword", "splits": splits}, "suite.json"
    )
    assert suite.splits[0].file.parent.name == "y"


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux counts the memory of the parent")
def test_peak_memory_excludes_the_parent_process() -> None:
    held = bytearray(300 * 2**20)
    assert peak_memory_mb() >= 300
    code = "from vlm_unlearn.store import peak_memory_mb; print(peak_memory_mb())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    del held
    assert 0 < int(done.stdout) < 250


@pytest.mark.parametrize("name", ["dataset.json", "forget.jsonl", "sub/../dataset.json"])
def test_output_that_is_a_file_of_an_input_folder_is_rejected(name: str, tmp_path: Path) -> None:
    (tmp_path / "set" / "sub").mkdir(parents=True)
    for file in ("dataset.json", "forget.jsonl"):
        (tmp_path / "set" / file).write_text("{}")
    with raises_code("output-exists"):
        validate_not_overwriting([tmp_path / "set" / name], [tmp_path / "set"])
    validate_not_overwriting([tmp_path / "set" / "new.json", tmp_path / "other.json"], [tmp_path / "set"])
