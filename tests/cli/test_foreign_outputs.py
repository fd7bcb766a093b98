"""No command overwrites a file of somebody else. Its own output of an earlier run is replaced."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from helpers import error_code, raises_code, run_in_process
from vlm_unlearn.records import Summary
from vlm_unlearn.reporting.report import GENERATOR, validate_report_folder
from vlm_unlearn.store import record_outputs, validate_outputs, write_json

FOREIGN = b"somebody else's work\n"
Arguments = list[object]


@pytest.fixture
def commands(world: Path, training_sets: dict[str, Path], tmp_path: Path) -> dict[str, tuple[Arguments, list[Path]]]:
    """The arguments of each command that writes files, and those files."""
    vlguard, eraser = world / "vlguard", world / "safe_eraser"
    train, out, folder = vlguard / "train.json", tmp_path / "out.json", tmp_path / "out"
    records = json.loads(train.read_text())
    candidates = tmp_path / "candidates.json"
    candidates.write_text((vlguard / "harmful_answers.json").read_text())
    conversations = tmp_path / "conversations.json"
    assert run_in_process("data", "convert", train, conversations).returncode == 0
    table = tmp_path / "table.jsonl"
    rows = [
        {"id": str(number), "image": records[0]["image"], "question": f"q {number}?", "answer": "a", "set": role}
        for number, role in enumerate(["forget", "retain"])
    ]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    set_files = [folder / "forget.jsonl", folder / "retain.jsonl", folder / "dataset.json"]
    imported = {"--images": vlguard / "train", "--out": folder}
    options = [item for pair in imported.items() for item in pair]
    return {
        "convert": (["data", "convert", train, out], [out]),
        "inject": (["data", "inject", train, candidates, out], [out]),
        "split": (["data", "split", train, folder], [folder / "forget.json", folder / "retain.json"]),
        "mix": (["data", "mix", conversations, conversations, out, "--size", 3], [out]),
        "to-rmu": (["data", "to-rmu", conversations, out], [out]),
        "filter": (
            ["data", "filter", conversations, out],
            [out, out.with_name("out.removed.jsonl"), out.with_name("out.filter.json")],
        ),
        "diversify": (["data", "diversify", train, out], [out]),
        "diversify a set": (["data", "diversify", training_sets["harmful"], folder], set_files),
        "audit": (["data", "audit", train, "--html", out], [out]),
        "check": (["data", "check", train, "--no-images", "--out", out], [out]),
        "rewrite": (["attack", "rewrite", train, out, "--trigger", "what"], [out]),
        "import vlguard": (["data", "import", "vlguard", train, *options, "--accept-refusals"], set_files),
        "import safe-eraser": (
            ["data", "import", "safe-eraser", eraser / "all_train.json", "--images", eraser, "--out", folder],
            set_files,
        ),
        "import files": (["data", "import", "files", table, *options], set_files),
    }


NAMES = (
    *(
        "convert",
        "inject",
        "split",
        "mix",
        "to-rmu",
        "filter",
        "diversify",
        "diversify a set",
        "audit",
        "check",
        "rewrite",
    ),
    *("import vlguard", "import safe-eraser", "import files"),
)


@pytest.mark.parametrize("name", NAMES)
def test_foreign_file_is_not_overwritten(name: str, commands: dict[str, tuple[Arguments, list[Path]]]) -> None:
    arguments, outputs = commands[name]
    for file in outputs:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(FOREIGN)
        done = run_in_process(*arguments)
        assert (done.returncode, error_code(done)) == (2, "output-exists"), done.stderr
        assert file.read_bytes() == FOREIGN
        assert [other for other in outputs if other.exists()] == [file]  # nothing else was written
        file.unlink()
    outputs[0].write_bytes(FOREIGN)
    done = run_in_process(*arguments, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert outputs[0].read_bytes() != FOREIGN


@pytest.mark.parametrize("name", NAMES)
def test_output_of_an_earlier_run_is_replaced(name: str, commands: dict[str, tuple[Arguments, list[Path]]]) -> None:
    arguments, outputs = commands[name]
    outputs[0].parent.mkdir(exist_ok=True)
    outputs[0].touch()  # an empty file holds nothing that could be lost
    for _ in range(2):
        done = run_in_process(*arguments)
        assert done.returncode == 0, done.stderr
    if name == "convert":
        outputs[0].write_bytes(FOREIGN)  # somebody edits the output
        assert error_code(run_in_process(*arguments)) == "output-exists"


@pytest.mark.parametrize("name", ["report.html", "summary.json", "notes.txt"])
def test_report_does_not_overwrite_foreign_files(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(b'{"mine": true}' if name == "summary.json" else FOREIGN)
    with raises_code("output-exists"):
        validate_report_folder(tmp_path)
    if name != "notes.txt":
        file.write_bytes(b"")
        validate_report_folder(tmp_path)


def test_report_replaces_an_earlier_report(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_bytes(b"<html>" + GENERATOR)
    validate_report_folder(tmp_path)
    (tmp_path / "report.html").write_text("a page of an earlier version")
    write_json(tmp_path / "summary.json", Summary(rows=[]).model_dump())
    validate_report_folder(tmp_path)


def test_set_that_was_killed_while_it_was_written_is_replaced(
    commands: dict[str, tuple[Arguments, list[Path]]],
) -> None:
    arguments, outputs = commands["import files"]
    assert run_in_process(*arguments).returncode == 0
    outputs[-1].unlink()  # dataset.json is written last
    assert run_in_process(*arguments).returncode == 0


def test_moved_output_is_foreign_to_its_new_place(tmp_path: Path) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    first.write_text("{}")
    record_outputs([first])
    validate_outputs([first], [])
    shutil.copy2(first, second)
    with raises_code("output-exists", file=second):
        validate_outputs([second], [])
    validate_outputs([second], [], overwrite=True)


def test_record_of_outputs_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    monkeypatch.setenv("VLM_UNLEARN_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "a.json"
    file.write_text("{}")
    record_outputs([file])
    with raises_code("output-exists", file=file):
        validate_outputs([file], [])
