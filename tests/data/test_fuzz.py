"""Tests all readers with mutated input: each either reads the file or raises a `UserError`.

The mutations are seeded by their number. ``VLM_UNLEARN_FUZZ=10000`` runs 10,000 of them.
"""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.data.formats import llava, safe_eraser, table, vlguard
from vlm_unlearn.data.formats.table import Columns
from vlm_unlearn.data.readers import read_any
from vlm_unlearn.data_tools import pipeline
from vlm_unlearn.data_tools.audit import audit, labeled_questions
from vlm_unlearn.data_tools.check import Checker, DataSource
from vlm_unlearn.data_tools.diversify import diversify
from vlm_unlearn.data_tools.importers import import_files, import_safe_eraser, import_vlguard
from vlm_unlearn.data_tools.select_harmful import read_selection_tasks
from vlm_unlearn.errors import Problems, UserError
from vlm_unlearn.records import Example
from vlm_unlearn.store import read_records

ROUNDS = int(os.environ.get("VLM_UNLEARN_FUZZ", "600"))
SEEDS: dict[str, Any] = {
    "vlguard": [
        {
            "id": "u",
            "image": "a.png",
            "safe": False,
            "harmful_category": "c",
            "instr-resp": [{"instruction": "Do it?", "response": "No."}],
        },
        {
            "id": "s",
            "image": "a.png",
            "safe": True,
            "instr-resp": [
                {"safe_instruction": "What?", "response": "A."},
                {"unsafe_instruction": "Hurt?", "response": "No."},
            ],
        },
    ],
    "safe_eraser": [
        {
            "image_path": "W/a.png",
            "SDImage_path": "a.png",
            "unsafe_pairs": [{"question": "How?", "model_response": "So.", "sd_response": "Bread."}],
            "UnharmPair_text1": {"Question": "What?", "Prediction": "Red."},
        }
    ]
    * 2,
    "llava": [
        {
            "id": str(i),
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "<image>\nQ?"},
                {"from": "gpt", "value": "A."},
                {"from": "human", "value": "R?"},
                {"from": "gpt", "value": "B."},
            ],
        }
        for i in range(3)
    ],
    "table": [
        {"id": "1", "image": "a.png", "question": "Q?", "answer": "A.", "set": "forget"},
        {"question": "R?", "answer": "B.", "set": "retain"},
    ],
    "answers": {"a.png": "harm", "b.png": "more"},
}
ODD: list[Any] = [
    None, True, 0, -1, 1e308, float("nan"), float("inf"), 10**400,
    "", " ", "\0", "\ud800", "\udfff\ud800", "\u202e", "x" * 10_000,
    [], {}, [[]], [None], {"": ""}, "../a.png", "/etc/passwd", "<image>", "\x1b[2J", [1] * 50,
]  # fmt: skip

ODD_BYTES = (b"\xff", b"\0", b"\xed\xa0\x80", b"]", b"}", b",", b'"', b"\\", b"NaN", b"[" * 5000, b"9" * 5000)


def mutated(rng: random.Random, value: Any) -> Any:
    """Returns the value with one or more changes: an item is removed, duplicated, nested or of another type."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        holders = [holder for holder in _holders(value) if holder]
        if not holders:
            return copy.deepcopy(rng.choice(ODD))
        holder = rng.choice(holders)
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        match rng.randrange(5):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[rng.choice(("id", "image", "from", "value", "safe", "Answer", "set", "x"))] = holder.pop(key)
            case 2:
                holder[key] = [holder[key]] if rng.random() < 0.5 else {"x": holder[key]}
            case 3 if isinstance(holder, list):
                holder.insert(key, holder[key])
            case _:
                holder[key] = copy.deepcopy(rng.choice(ODD))
    return value


def _holders(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from _holders(item)


def as_bytes(rng: random.Random, value: Any) -> bytes:
    """Returns the value as a JSON list or JSON lines, possibly with broken bytes."""
    if isinstance(value, list) and rng.random() < 0.4:
        text = "\n".join(json.dumps(item, ensure_ascii=rng.random() < 0.5) for item in value)
    else:
        text = json.dumps(value, ensure_ascii=rng.random() < 0.5, indent=rng.choice((None, 1)))
    raw = text.encode("utf-8", "surrogatepass")
    match rng.randrange(8):
        case 0:
            raw = raw[: rng.randrange(len(raw) + 1)]
        case 1:
            position = rng.randrange(len(raw) + 1)
            raw = raw[:position] + rng.choice(ODD_BYTES) + raw[position:]
        case 2:
            start, end = sorted(rng.randrange(len(raw) + 1) for _ in range(2))
            raw = raw[:start] + raw[end:]
        case 3:
            raw = b"\xef\xbb\xbf" + raw
    return raw


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz-images")
    for name in ("a.png", "W/a.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), "red").save(folder / name)
    return folder


def readers(images: Path, work: Path) -> dict[str, list[Callable[[Path], object]]]:
    """Returns the functions that read each kind of file."""
    vlguard_file = work / "vlguard.json"
    vlguard_file.write_text(json.dumps(SEEDS["vlguard"]))
    llava_file = work / "llava.json"
    llava_file.write_text(json.dumps(SEEDS["llava"]))
    out = work / "out.json"
    columns = Columns(set="set")

    common = [
        lambda file: audit(
            labeled_questions(read_any(file, images, None, Problems()), "auto", lambda text: text.startswith("No"))
        ),
        lambda file: check(DataSource(file, images)),
        lambda file: diversify(file, out, problems=Problems()),
        lambda file: pipeline.convert(file, out, problems=Problems()),
    ]
    return {
        "vlguard": [
            *common,
            lambda file: vlguard.read_pairs(file, images, Problems()),
            lambda file: vlguard.read_pairs(file, images),
            lambda file: pipeline.split(file, work / "split", True, Problems()),
            lambda file: pipeline.inject(file, work / "answers-good.json", out, Problems()),
            lambda file: import_vlguard(file, images, work / "set"),
        ],
        "safe_eraser": [
            *common,
            lambda file: list(safe_eraser.read_safe_eraser(file, images, Problems())),
            lambda file: list(safe_eraser.read_safe_eraser(file, images)),
            lambda file: import_safe_eraser(file, images, work / "set"),
        ],
        "llava": [
            *common,
            lambda file: list(llava.read_llava(file, images, Problems())),
            lambda file: pipeline.to_rmu(file, out, Problems()),
            lambda file: pipeline.mix(file, llava_file, out, 5, problems=Problems()),
            lambda file: pipeline.mix(llava_file, file, out, 5, problems=Problems()),
            lambda file: import_files({"forget": file, "retain": llava_file}, images, work / "set"),
        ],
        "table": [
            *common,
            lambda file: list(table.read_table(file, columns, images, Problems())),
            lambda file: import_files({"": file}, images, work / "set", columns),
            lambda file: list(read_records(file, Example)),
        ],
        "answers": [
            lambda file: pipeline.inject(vlguard_file, file, out),
            lambda file: read_selection_tasks(vlguard_file, [file], images, Problems()),
            lambda file: safe_eraser.read_refusals(file),
            lambda file: UnlearningDataset.from_folder(folder_with(file, work)),
        ],
    }


def check(source: DataSource) -> str:
    """Returns the report of `data check` as JSON."""
    checker = Checker()
    checker.add(source)
    return json.dumps(checker.report())


def folder_with(file: Path, work: Path) -> Path:
    """Returns a training-set folder whose dataset.json is the file."""
    folder = work / "folder"
    folder.mkdir(exist_ok=True)
    (folder / "dataset.json").write_bytes(file.read_bytes())
    return folder


@pytest.mark.slow
@pytest.mark.timeout(60 + ROUNDS)
def test_readers_of_mutated_files_raise_clean_errors_only(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm_unlearn.data_tools.audit.NUM_SHUFFLES", 5)  # of a test of significance, not of its input
    (tmp_path / "answers-good.json").write_text(json.dumps(SEEDS["answers"]))
    functions = readers(images, tmp_path)
    outcomes = {"read": 0, "rejected": 0}
    for number in range(ROUNDS):
        rng = random.Random(f"fuzz-{number}")
        kind = rng.choice(list(SEEDS))
        raw = as_bytes(rng, mutated(rng, SEEDS[kind]))
        file = tmp_path / rng.choice(("in.json", "in.jsonl"))
        file.write_bytes(raw)
        for position, read in enumerate(functions[kind]):
            place = f"round {number}, {kind}, reader {position}"
            try:
                read(file)
            except UserError as error:
                outcomes["rejected"] += 1
                message = str(error)
                assert message.isprintable(), f"{place}: {message!r}"
                assert len(message) < 2000, f"{place}: {message!r}"
            except Exception as error:
                pytest.fail(f"{place}: {type(error).__name__}: {error}\n{raw[:2000]!r}")
            else:
                outcomes["read"] += 1
    assert min(outcomes.values()) > ROUNDS / 10, f"the mutations are too similar: {outcomes}"
