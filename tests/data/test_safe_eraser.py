"""SafeEraser files, with the spellings of the released ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import raises_code
from vlm_unlearn.data.formats import safe_eraser
from vlm_unlearn.errors import Problems

RECORD = {
    "image_path": "Weapon/a.png",
    "SDImage_path": "sd/a.png",
    "unsafe_pairs": [
        {"question": "How?", "model_response": "So.", "sd_response": "It is a loaf."},
        {"question": "Why?", "model_response": "Thus.", "sd_response": "Bread."},
    ],
    "UnharmPair_text1": {"Question": "What color?", "Prediction": "Red."},
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
def test_read_safe_eraser_examples_and_prompts(folder: Path, name: str) -> None:
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
    ("change", "code", "field"),
    [
        ({"SDImage_path": "sd/gone.png"}, "image-not-found", None),
        ({"unsafe_pairs": [{"question": "How?"}]}, "missing-field", "unsafe_pairs[0].model_response"),
        ({"UnharmPair_text1": {"Question": "What?"}}, "missing-field", "UnharmPair_text1.Prediction"),
        ({"UnharmPair_text1": "text"}, "invalid-field", "UnharmPair_text1"),
    ],
)
def test_read_safe_eraser_broken_record_names_field(
    folder: Path, change: dict[str, object], code: str, field: str | None
) -> None:
    file = folder / "all.json"
    file.write_text(json.dumps([{**RECORD, **change}]))
    with raises_code(code, file="all.json", record='1 (line 1, "Weapon/a.png")', field=field) as caught:
        list(safe_eraser.read_safe_eraser(file, folder))
    if code == "image-not-found":
        assert "sd/gone.png" in str(caught.value)
    problems = Problems()
    file.write_text(json.dumps([{**RECORD, **change}, RECORD]))
    assert len(list(safe_eraser.read_safe_eraser(file, folder, problems))) == 1
    assert problems.messages == [str(caught.value)]


def test_read_refusals(tmp_path: Path) -> None:
    file = tmp_path / "prompt.json"
    file.write_text('{"idk": ["No.", "Never."]}')
    assert safe_eraser.read_refusals(file) == ["No.", "Never."]
    file.write_text('{"idk": []}')
    with raises_code("invalid-field", file=file, field="idk"):
        safe_eraser.read_refusals(file)
