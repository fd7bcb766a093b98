"""SafeEraser files, in the shapes seen in the wild."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from vlm_unlearn.data.formats import safe_eraser
from vlm_unlearn.errors import Problems, UserError

RECORD = {
    "image_path": "Weapon/a.png",
    "SDImage_path": "sd/a.png",
    "unsafe_pairs": [
        {"question": "How?", "model_response": "So.", "sd_response": "It is a loaf."},
        {"question": "Why?", "model_response": "Thus.", "sd_response": "Bread."},
    ],
    "UnharmPair_text1": {"Question": "What colour?", "Prediction": "Red."},
    "UnharmPair_image1": {"Question": "What size?", "Predicti1on": "Big."},
    "UnharmPair_image2": {"Question": "Where?", "Answer": "Here."},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("Weapon/a.png", "sd/a.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize("name", ["all.json", "all.jsonl", "lines.json"])
def test_sets_and_pairs(folder: Path, name: str) -> None:
    file = folder / name
    line = json.dumps(RECORD)
    file.write_text({"all.json": f"[{line}]", "all.jsonl": line + "\n", "lines.json": f"{line}\n{line}\n"}[name])
    records = list(safe_eraser.read_safe_eraser(file, folder))[:1]
    forget, retain, decouple = safe_eraser.examples(records)
    assert [(e.question, e.answer, e.category) for e in forget] == [
        ("How?", "So.", "Weapon"),
        ("Why?", "Thus.", "Weapon"),
    ]
    assert [e.answer for e in retain] == ["Red.", "Big.", "Here."]
    for example, twin in zip(forget, decouple, strict=True):
        assert (twin.pair_id, twin.question, twin.image) == (example.pair_id, example.question, "sd/a.png")
    assert [p.image for p in safe_eraser.prompts(records, "sarr", "safe_image_unsafe_question")] == ["sd/a.png"] * 2
    assert len(list(safe_eraser.prompts(records, "harmless", "safe"))) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"SDImage_path": "sd/gone.png"},
            r'all\.json: record 0 \(line 1, "Weapon/a\.png"\): image "sd/gone\.png" not found',
        ),
        ({"unsafe_pairs": [{"question": "How?"}]}, r'unsafe_pairs\[0\]: field "model_response" is missing'),
        ({"UnharmPair_text1": {"Question": "What?"}}, r'UnharmPair_text1: field "Prediction" is missing'),
        ({"UnharmPair_text1": "text"}, r"UnharmPair_text1: expected an object, found text"),
    ],
)
def test_broken_records_are_named(folder: Path, change: dict[str, object], message: str) -> None:
    (folder / "all.json").write_text(json.dumps([{**RECORD, **change}]))
    with pytest.raises(UserError, match=message):
        list(safe_eraser.read_safe_eraser(folder / "all.json", folder))
    problems = Problems()
    whole = json.dumps([{**RECORD, **change}, RECORD])
    (folder / "all.json").write_text(whole)
    assert len(list(safe_eraser.read_safe_eraser(folder / "all.json", folder, problems))) == 1, "the rest goes on"
    assert problems.count == 1
    assert re.search(message, problems.messages[0])


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "prompt.json").write_text('{"idk": ["No.", "Never."]}')
    assert safe_eraser.read_refusals(tmp_path / "prompt.json") == ["No.", "Never."]
    (tmp_path / "prompt.json").write_text('{"idk": []}')
    with pytest.raises(UserError, match="non-empty list"):
        safe_eraser.read_refusals(tmp_path / "prompt.json")
