"""VLGuard files become examples and prompts; broken ones get one line that names the record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlm_unlearn.data.formats import vlguard
from vlm_unlearn.errors import UserError
from vlm_unlearn.judging.keyword import published_refusal

UNSAFE = {
    "id": "u",
    "image": "u.png",
    "safe": False,
    "harmful_category": "c",
    "instr-resp": [{"instruction": "Do it?", "response": "No."}],
}
SAFE = {
    "id": "s",
    "image": "s.png",
    "safe": True,
    "instr-resp": [
        {"safe_instruction": "What is it?", "response": "A cat."},
        {"unsafe_instruction": "Hurt it?", "response": "No."},
    ],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("u.png", "s.png"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def write(folder: Path, records: object) -> Path:
    (folder / "train.json").write_text(json.dumps(records))
    return folder / "train.json"


def test_split_and_inject(folder: Path) -> None:
    pairs = vlguard.read_pairs(write(folder, [UNSAFE, SAFE]), folder)
    split = vlguard.split(pairs, {"u.png": "Like so."}, include_safe_image_unsafe=False)
    assert [(e.id, e.answer) for e in split.forget] == [("u/unsafe", "Like so.")]
    assert [(e.pair_id, e.question, e.answer) for e in split.preferred] == [
        ("u/unsafe", split.forget[0].question, "No.")
    ]
    assert split.forget[0].pair_id == "u/unsafe"
    assert [(e.id, e.question) for e in split.retain] == [("s/safe", "What is it?")]
    split = vlguard.split(pairs, None, include_safe_image_unsafe=True)
    assert split.preferred == []  # the forget set has them
    assert [e.answer for e in split.forget] == ["No.", "No."]


def test_what_has_no_answer_is_left_out_and_counted(folder: Path) -> None:
    empty = {**SAFE, "instr-resp": [{"safe_instruction": "What is it?", "response": ""}]}
    pairs = vlguard.read_pairs(write(folder, [UNSAFE, empty]), folder)
    split = vlguard.split(pairs, {}, include_safe_image_unsafe=False)
    assert split == vlguard.Split([], [], [], {"no harmful answer": 1, "empty response": 1})
    assert next(vlguard.prompts(pairs, "s", "safe")).reference is None  # it still is a question to ask


def test_rows_of_one_id_are_shots_of_one_group(folder: Path) -> None:
    pairs = vlguard.read_pairs(write(folder, [UNSAFE, UNSAFE, UNSAFE]), folder)
    prompts = list(vlguard.prompts(pairs, "attack", "unsafe"))
    assert [prompt.rewrite for prompt in prompts] == [0, 1, 2]
    assert {prompt.group_id for prompt in prompts} == {"u"}
    assert len({prompt.id for prompt in prompts}) == 3


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (
            [{**UNSAFE, "image": "gone.png"}],
            r'train\.json: record 0 \(line 1, "u"\): image "gone\.png" not found under .*; correct its path, or the image',
        ),
        ([{**UNSAFE, "image": "../u.png"}], r"leaves the image folder"),
        ([{**UNSAFE, "image": "/etc/passwd"}], r"leaves the image folder"),
        ([{**UNSAFE, "image": "a\\..\\..\\u.png"}], r"leaves the image folder"),
        ([{**UNSAFE, "image": "u\0.png"}], r"holds a NUL character"),
        ([{**UNSAFE, "image": 3}], r'"image" must be non-empty text, found a number'),
        ([UNSAFE, 5], r"record 1 \(line 1\): expected an object, found a number"),
        ([{**UNSAFE, "instr-resp": {}}], r'"instr-resp" must be a list'),
        ([{**UNSAFE, "instr-resp": []}], r'"instr-resp" is empty'),
        ([{**UNSAFE, "instr-resp": [{"response": "x"}]}], r"instr-resp\[0\]: none of"),
        ([{**UNSAFE, "instr-resp": [{"instruction": "x"}]}], r'field "response" is missing'),
        ({}, r'record 0 \(line 1\): field "image" is missing'),
    ],
)
def test_broken_records_are_named(folder: Path, records: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        vlguard.read_pairs(write(folder, records), folder)


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "x.png"
    outside.write_bytes(b"")
    (folder / "u.png").unlink()
    (folder / "u.png").symlink_to(outside)
    with pytest.raises(UserError, match="link out of the image folder"):
        vlguard.read_pairs(write(folder, [UNSAFE]), folder)


def test_real_annotations(vlguard_test: Path, golden_pipeline: dict[str, dict], tmp_path: Path) -> None:
    """Counts on the real file equal those of the published steps; images are stand-ins."""
    for record in json.loads(vlguard_test.read_text()):
        path = tmp_path / record["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    pairs = vlguard.read_pairs(vlguard_test, tmp_path)
    split = vlguard.split(pairs, None, include_safe_image_unsafe=False)
    assert len(split.forget) == golden_pipeline["split"]["forget"]
    # The published step keeps the one safe question whose response is empty; here it is left out and counted.
    assert len(split.retain) + split.left_out["empty response"] == golden_pipeline["split"]["retain"]
    names = {
        "unsafe": "unsafe_image",
        "safe": "safe_image_safe_instruction",
        "safe_image_unsafe_question": "safe_image_unsafe_instruction",
    }
    for kind, name in names.items():
        answers = [pair.response for pair in pairs if pair.kind == kind]
        expected = golden_pipeline["keyword_refusal_of_reference_responses"][name]
        assert {"n": len(answers), "refused": sum(published_refusal(text) is not None for text in answers)} == expected


@pytest.mark.parametrize(
    ("name", "kind", "groups", "shots"), [("what_3shot", "unsafe", 442, 3), ("share_1shot", "safe", 556, 1)]
)
def test_published_attack_files_are_cases(
    vlguard_test: Path, tmp_path: Path, name: str, kind: str, groups: int, shots: int
) -> None:
    file = vlguard_test.with_name(f"vlguard_test_{name}.json")
    for record in json.loads(file.read_text()):
        path = tmp_path / record["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    prompts = list(vlguard.prompts(vlguard.read_pairs(file, tmp_path), "attack", kind))
    assert len({prompt.id for prompt in prompts}) == len(prompts) == groups * shots
    assert len({prompt.group_id for prompt in prompts}) == groups
    assert {prompt.rewrite for prompt in prompts} == set(range(shots))
