"""VLGuard files as examples and prompts, and the errors of broken records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import raises_code
from vlm_unlearn.data.formats import vlguard
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


@pytest.mark.parametrize("question", ["Who owns it?", "how is it made?"])
def test_split_an_answer_for_two_questions_on_an_image_raises(folder: Path, question: str) -> None:
    other = {**UNSAFE, "id": "u2", "instr-resp": [{"instruction": question, "response": "No."}]}
    pairs = vlguard.read_pairs(write(folder, [UNSAFE, other]), folder)
    with raises_code("duplicate-key", record='"u2"'):
        vlguard.split(pairs, {"u.png": "Like so."}, include_safe_image_unsafe=False)
    split = vlguard.split(pairs, {"u": "Like so.", "u2": "Me."}, include_safe_image_unsafe=False)
    assert [(e.id, e.answer) for e in split.forget] == [("u/unsafe", "Like so."), ("u2/unsafe", "Me.")]


def test_split_an_answer_for_the_same_question_twice_is_used_twice(folder: Path) -> None:
    pairs = vlguard.read_pairs(write(folder, [UNSAFE, {**UNSAFE, "id": "u2"}]), folder)
    split = vlguard.split(pairs, {"u.png": "Like so."}, include_safe_image_unsafe=False)
    assert [e.answer for e in split.forget] == ["Like so.", "Like so."]


def test_prompts_of_one_id_with_two_images_raise(folder: Path) -> None:
    pairs = [vlguard.Pair("u", image, "unsafe", "Q?", "No.", None) for image in ("u.png", "u.png", "v.png")]
    assert [prompt.rewrite for prompt in vlguard.prompts(pairs[:2], "s", "unsafe")] == [0, 1]
    with raises_code("duplicate-id", record='"u"', field="id"):
        list(vlguard.prompts(pairs, "s", "unsafe"))


def test_split_with_and_without_harmful_answers(folder: Path) -> None:
    pairs = vlguard.read_pairs(write(folder, [UNSAFE, SAFE]), folder)
    split = vlguard.split(pairs, {"u.png": "Like so."}, include_safe_image_unsafe=False)
    assert [(e.id, e.answer) for e in split.forget] == [("u/unsafe", "Like so.")]
    assert [(e.pair_id, e.question, e.answer) for e in split.preferred] == [
        ("u/unsafe", split.forget[0].question, "No.")
    ]
    assert split.forget[0].pair_id == "u/unsafe"
    assert [(e.id, e.question) for e in split.retain] == [("s/safe", "What is it?")]
    split = vlguard.split(pairs, None, include_safe_image_unsafe=True)
    assert split.preferred == []  # the forget set contains the reference responses
    assert [e.answer for e in split.forget] == ["No.", "No."]


def test_split_with_answers_to_questions_on_safe_images(folder: Path) -> None:
    pairs = vlguard.read_pairs(write(folder, [UNSAFE, SAFE, {**SAFE, "id": "t", "image": "u.png"}]), folder)
    split = vlguard.split(pairs, {"u.png": "Like so."}, False, {"s.png": "With a stick."})
    assert [(e.id, e.answer) for e in split.forget] == [
        ("u/unsafe", "Like so."),
        ("s/safe_image_unsafe_question", "With a stick."),
    ]
    assert [(e.pair_id, e.answer) for e in split.preferred] == [(e.id, "No.") for e in split.forget]
    assert split.left_out == {"no harmful answer": 1}
    split = vlguard.split(pairs, {"u.png": "Like so."}, include_safe_image_unsafe=True)
    assert [e.answer for e in split.forget] == ["Like so.", "No.", "No."]


def test_split_counts_pairs_without_answer(folder: Path) -> None:
    empty = {**SAFE, "instr-resp": [{"safe_instruction": "What is it?", "response": ""}]}
    pairs = vlguard.read_pairs(write(folder, [UNSAFE, empty]), folder)
    split = vlguard.split(pairs, {}, include_safe_image_unsafe=False)
    assert split == vlguard.Split([], [], [], {"no harmful answer": 1, "empty response": 1})
    assert next(vlguard.prompts(pairs, "s", "safe")).reference is None  # it is still a prompt


def test_prompts_group_records_with_same_id(folder: Path) -> None:
    pairs = vlguard.read_pairs(write(folder, [UNSAFE, UNSAFE, UNSAFE]), folder)
    prompts = list(vlguard.prompts(pairs, "attack", "unsafe"))
    assert [prompt.rewrite for prompt in prompts] == [0, 1, 2]
    assert {prompt.group_id for prompt in prompts} == {"u"}
    assert len({prompt.id for prompt in prompts}) == 3


@pytest.mark.parametrize(
    ("records", "code", "record", "field"),
    [
        ([{**UNSAFE, "image": "gone.png"}], "image-not-found", '1 (line 1, "u")', None),
        ([{**UNSAFE, "image": "../u.png"}], "image-outside-root", '1 (line 1, "u")', None),
        ([{**UNSAFE, "image": "/etc/passwd"}], "image-outside-root", '1 (line 1, "u")', None),
        ([{**UNSAFE, "image": "a\\..\\..\\u.png"}], "image-outside-root", '1 (line 1, "u")', None),
        ([{**UNSAFE, "image": "u\0.png"}], "invalid-encoding", '1 (line 1, "u")', "image"),
        ([{**UNSAFE, "image": 3}], "invalid-field", '1 (line 1, "u")', "image"),
        ([UNSAFE, 5], "invalid-field", "2 (line 1)", None),
        ([{**UNSAFE, "instr-resp": {}}], "invalid-field", '1 (line 1, "u")', "instr-resp"),
        ([{**UNSAFE, "instr-resp": []}], "empty-field", '1 (line 1, "u")', "instr-resp"),
        ([{**UNSAFE, "instr-resp": [{"response": "x"}]}], "missing-field", '1 (line 1, "u")', "instr-resp[0]"),
        (
            [{**UNSAFE, "instr-resp": [{"instruction": "x"}]}],
            "missing-field",
            '1 (line 1, "u")',
            "instr-resp[0].response",
        ),
        ({}, "missing-field", "1 (line 1)", "image"),
    ],
)
def test_read_pairs_broken_record_names_field(
    folder: Path, records: object, code: str, record: str, field: str | None
) -> None:
    with raises_code(code, file="train.json", record=record, field=field):
        vlguard.read_pairs(write(folder, records), folder)


def test_read_pairs_missing_image_message(folder: Path) -> None:
    """The most frequent error: one line with the file, the record, the image and the option that fixes it."""
    with raises_code("image-not-found") as caught:
        vlguard.read_pairs(write(folder, [{**UNSAFE, "image": "gone.png"}]), folder)
    message = str(caught.value)
    assert message.startswith('train.json, record 1 (line 1, "u"): image "gone.png" not found')
    assert str(folder) in message
    assert "--images" in message


def test_read_pairs_link_out_of_folder_raises(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "x.png"
    outside.write_bytes(b"")
    (folder / "u.png").unlink()
    (folder / "u.png").symlink_to(outside)
    with raises_code("image-outside-root", file="train.json"):
        vlguard.read_pairs(write(folder, [UNSAFE]), folder)


def test_split_real_annotations_equals_published_counts(
    vlguard_test: Path, golden_pipeline: dict[str, dict], tmp_path: Path
) -> None:
    """The counts for the real file are those of the published steps. The images are empty files."""
    for record in json.loads(vlguard_test.read_text()):
        path = tmp_path / record["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    pairs = vlguard.read_pairs(vlguard_test, tmp_path)
    split = vlguard.split(pairs, None, include_safe_image_unsafe=False)
    assert len(split.forget) == golden_pipeline["split"]["forget"]
    # The published step keeps one safe question with an empty response. Here it is left out and counted.
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
    ("name", "kind", "groups", "rewrites"), [("what_3shot", "unsafe", 442, 3), ("share_1shot", "safe", 556, 1)]
)
def test_prompts_of_published_attack_files(
    vlguard_test: Path, tmp_path: Path, name: str, kind: str, groups: int, rewrites: int
) -> None:
    file = vlguard_test.with_name(f"vlguard_test_{name}.json")
    for record in json.loads(file.read_text()):
        path = tmp_path / record["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    prompts = list(vlguard.prompts(vlguard.read_pairs(file, tmp_path), "attack", kind))
    assert len({prompt.id for prompt in prompts}) == len(prompts) == groups * rewrites
    assert len({prompt.group_id for prompt in prompts}) == groups
    assert {prompt.rewrite for prompt in prompts} == set(range(rewrites))
