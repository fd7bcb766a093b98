"""Rows in memory as prompts: columns, messages, images, and broken rows."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
from PIL import Image

from helpers import raises_code
from vlm_unlearn.attacks.base import FunctionAttack
from vlm_unlearn.attacks.one_word import rewrite_prompts
from vlm_unlearn.config import RewriteConfig
from vlm_unlearn.evaluation.rows import PromptSet, apply_attack, read_rows, write_images
from vlm_unlearn.records import Prompt, Round

ROW = {"question": "What is this?"}


def png(color: tuple[int, int, int] = (9, 8, 7), format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(buffer, format=format)
    return buffer.getvalue()


def only(row: dict[str, Any], **options: Any) -> Prompt:
    (prompt,) = read_rows([row], **options).prompts
    return prompt


def test_read_rows_reads_all_columns() -> None:
    row = {**ROW, "id": 7, "group_id": "g", "kind": "safe", "set": "s", "answer": "A kite.", "category": "toys", "x": 1}
    assert only(row) == Prompt(
        id="7", group_id="g", set="s", kind="safe", question="What is this?", reference="A kite.", category="toys"
    )


def test_read_rows_has_defaults_for_all_but_the_question() -> None:
    first, second = read_rows([ROW, {**ROW, "answer": None, "image": float("nan"), "kind": "safe"}]).prompts
    assert first == Prompt(id="0", group_id="0", set="unsafe", kind="unsafe", question="What is this?")
    assert second == Prompt(id="1", group_id="1", set="safe", kind="safe", question="What is this?")


def test_read_rows_takes_the_kind_from_the_sets_of_a_table() -> None:
    kinds = [only({**ROW, "set": name}).kind for name in ("harmful", "harmless", "decouple", "mine")]
    assert kinds == ["unsafe", "safe", "safe_image_unsafe_question", "unsafe"]


def test_read_rows_splits_sets_of_several_kinds_and_numbers_rewrites() -> None:
    rows = [{**ROW, "split": "test", "kind": kind, "group_id": "g"} for kind in ("unsafe", "safe", "unsafe")]
    data = read_rows(rows)
    assert data.kinds == {"test_unsafe": "unsafe", "test_safe": "safe"}
    assert [(prompt.set, prompt.rewrite) for prompt in data.prompts] == [
        ("test_unsafe", 0),
        ("test_safe", 0),
        ("test_unsafe", 1),
    ]


def image_forms(folder: Path) -> dict[str, Any]:
    (folder / "a.png").write_bytes(png())
    return {
        "path": folder / "a.png",
        "text": str(folder / "a.png"),
        "bytes": png(),
        "value": {"bytes": png(), "path": "elsewhere.png"},
        "path value": {"bytes": None, "path": str(folder / "a.png")},
    }


def test_read_rows_takes_images_in_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forms = image_forms(tmp_path)
    monkeypatch.chdir(tmp_path)
    data = read_rows([{**ROW, "image": form} for form in [*forms.values(), "a.png"]])
    assert len(data.images) == 1  # the same content
    pictures = read_rows(
        [{**ROW, "image": Image.open(tmp_path / "a.png")}, {**ROW, "image": np.zeros((4, 4), np.uint8)}]
    )
    write_images({**data.images, **pictures.images}, tmp_path / "out")
    files = sorted((tmp_path / "out").iterdir())
    assert len(files) == 3
    assert png() in [file.read_bytes() for file in files]
    assert {Image.open(file).getpixel((0, 0)) for file in files} == {(9, 8, 7), (0, 0, 0)}


def test_read_rows_reads_hub_data_sets_without_decoding() -> None:
    rows = [{**ROW, "image": {"bytes": png(), "path": None}}, {**ROW, "image": None}]
    data = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    prompts = read_rows(data.shuffle(seed=0)).prompts
    assert sorted(prompt.image is None for prompt in prompts) == [False, True]
    assert read_rows(data).images.keys() == read_rows(rows).images.keys()  # the file's bytes, not decoded pixels
    assert read_rows(pandas.DataFrame([{**ROW, "category": "a"}, ROW])).prompts[1].category is None
    streamed = datasets.IterableDataset.from_generator(lambda: iter([ROW]))
    assert len(read_rows(streamed).prompts) == 1


CONTENT = [{"type": "image", "text": None}, {"type": "text", "text": "What is this?"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "<image>\nWhat is this?"}], "images": [png()]},
        {"messages": [{"role": "user", "content": CONTENT}], "images": [{"bytes": png(), "path": None}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": png()}, CONTENT[1]]}]},
        {"conversations": [{"from": "human", "value": "What is this?\n<image>"}], "image": png()},
        {"messages": [{"role": "user", "content": CONTENT}], "images": png()},
    ],
)
@pytest.mark.parametrize("reference", [None, "A kite."])
def test_read_rows_reads_messages(row: dict[str, Any], reference: str | None) -> None:
    column = next(name for name in row if name != "images" and name != "image")
    answer = [] if reference is None else [{"role": "assistant", "content": reference}]
    prompt = only({**row, column: [*row[column], *answer]})
    assert (prompt.question, prompt.reference) == ("What is this?", reference)
    assert prompt.image is not None


def test_read_rows_reads_messages_of_a_data_set() -> None:
    row = {"messages": [{"role": "user", "content": CONTENT}], "images": [{"bytes": png(), "path": None}]}
    data = datasets.Dataset.from_list([row]).cast_column("images", datasets.List(datasets.Image()))
    assert read_rows(data).prompts == read_rows([row]).prompts


def test_read_rows_reads_several_rounds() -> None:
    prompt = only({**ROW, "system": "Be brief.", "history": [{"question": "Who?", "answer": "Ann."}]})
    assert (prompt.system, prompt.history) == ("Be brief.", (Round(question="Who?", answer="Ann."),))
    # Fields that are not set are not written, so that files and digests of single questions stay as they were.
    assert not {"system", "history", "image_offset"} & only(ROW).model_dump().keys()


GONE = ("image-not-found", "images[0]")


@pytest.mark.parametrize(
    ("row", "code", "field"),
    [
        ({"prompt": "What is this?"}, "missing-field", "question"),
        ({"question": None}, "missing-field", "question"),
        ({"question": ""}, "empty-field", "question"),
        ({"question": 3}, "invalid-field", "question"),
        ({"question": ["What?"]}, "invalid-field", "question"),
        ({**ROW, "answer": 3}, "invalid-field", "answer"),
        ({**ROW, "kind": "harmful"}, "invalid-field", "kind"),
        ({**ROW, "id": 1.5}, "invalid-field", "id"),
        ({**ROW, "id": True}, "invalid-field", "id"),
        ({**ROW, "id": " "}, "empty-field", "id"),
        ({**ROW, "set": 3}, "invalid-field", "set"),
        ({**ROW, "image": "gone.png"}, "image-not-found", "image"),
        ({**ROW, "image": "/dev/zero"}, "image-not-found", "image"),
        ({**ROW, "image": "https://example.com/a.png"}, "unsupported-setting", "image"),
        ({**ROW, "image": b"no image"}, "invalid-image", "image"),
        ({**ROW, "image": b""}, "invalid-image", "image"),
        ({**ROW, "image": 3}, "invalid-field", "image"),
        ({**ROW, "image": np.zeros((2, 2), float)}, "invalid-field", "image"),
        ({**ROW, "images": [png(), png()]}, "unsupported-setting", "images"),
        ({**ROW, "history": [{"question": "Who?"}]}, "missing-field", "history[0].answer"),
        ({"messages": [{"role": "user", "content": "What?", "image": png()}], "images": ["gone.png"]}, *GONE),
        ("What is this?", "invalid-field", None),
    ],
)
def test_broken_rows_are_errors_with_record_and_field(row: Any, code: str, field: str | None) -> None:
    with raises_code(code, record=2, field=field):
        read_rows([{**ROW, "id": "a"}, row])


@pytest.mark.parametrize(
    "data", ["test.jsonl", Path("test.jsonl"), {"test": [ROW]}, datasets.DatasetDict(), 3, None], ids=str
)
def test_broken_data_sets_are_errors(data: Any) -> None:
    with raises_code("invalid-field", field="dataset"):
        read_rows(data)


def test_empty_data_and_duplicate_ids_are_errors() -> None:
    with raises_code("no-records"):
        read_rows([])
    with raises_code("duplicate-id", record=3, field="id"):
        read_rows([{**ROW, "id": "a"}, ROW, {**ROW, "id": "a"}])
    with raises_code("duplicate-id", record=2, field="id"):
        read_rows([{**ROW, "id": 1}, ROW])  # the default id of the second row


def test_decompression_bombs_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_unlearn.data.images.MAX_IMAGE_PIXELS", 40)
    for image in (png(), Image.new("RGB", (8, 6))):
        with raises_code("image-too-large", record=1, field="image"):
            read_rows([{**ROW, "image": image}])


def test_paths_stay_inside_the_image_root(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for folder in (tmp_path, tmp_path / "images"):
        (folder / "a.png").write_bytes(png())
    assert only({**ROW, "image": "a.png"}, image_root=tmp_path / "images").image
    for path in ("../a.png", str(tmp_path / "a.png")):
        with raises_code("image-outside-root", record=1, field="image"):
            read_rows([{**ROW, "image": path}], tmp_path / "images")


def test_prompts_are_rows_too(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    prompt = Prompt(id="x", group_id="x", set="s", kind="unsafe", question="How?", image="a.png")
    data = read_rows([prompt], tmp_path)
    assert data.prompts[0].image in data.images
    assert data.prompts[0].question == "How?"


def rewrites(prompts: list[Prompt]) -> list[Prompt]:
    return [
        prompt.model_copy(update={"id": f"{prompt.id}/{word}", "question": f"{word} {prompt.question}"})
        for prompt in prompts
        for word in ("Share", "What")
    ]


def test_attack_makes_prompts_of_prompts() -> None:
    data = apply_attack(read_rows([{**ROW, "image": png()}]), [FunctionAttack(rewrites, {})])
    assert [(prompt.id, prompt.group_id, prompt.rewrite, prompt.set) for prompt in data.prompts] == [
        ("0/Share", "0", 0, "unsafe_attacked"),
        ("0/What", "0", 1, "unsafe_attacked"),
    ]
    assert data.image(data.prompts[1]) is not None


def test_attack_moves_the_image_before_a_rewritten_question() -> None:
    chat = [{"role": "user", "content": "What is it? <image>"}]
    rounds = [{"role": "assistant", "content": "A kite."}, {"role": "user", "content": "Why?"}]
    data = read_rows([{"messages": chat, "images": [png()]}, {"messages": [*chat, *rounds], "images": [png()]}])
    assert [prompt.image_offset for prompt in data.prompts] == [11, 11]
    attacked = apply_attack(data, [FunctionAttack(lambda prompts: [*rewrites(prompts), *prompts], {})]).prompts
    assert [prompt.image_offset for prompt in attacked] == [0, 0, 11, 11, 11, 11]
    move = FunctionAttack(lambda prompts: [prompts[0].model_copy(update={"image_offset": 4})], {})
    moved = apply_attack(data, [move])
    assert moved.prompts[0].image_offset == 4
    config = RewriteConfig(trigger="what", num_rewrites=1)
    assert [prompt.image_offset for prompt in rewrite_prompts(data.prompts, config)] == [0, 11]


@pytest.mark.parametrize(
    "attack",
    [
        lambda prompts: [],
        lambda prompts: ["How?"],
        lambda prompts: [*prompts, *prompts],
        lambda prompts: [prompt.model_copy(update={"image": "other.png"}) for prompt in prompts],
    ],
)
def test_broken_attacks_are_errors(attack: Any) -> None:
    data: PromptSet = read_rows([ROW])
    with raises_code("invalid-attack", field="attack"):
        apply_attack(data, [FunctionAttack(attack, {})])
