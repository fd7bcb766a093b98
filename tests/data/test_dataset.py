"""`UnlearningDataset` in memory: rows of every form, images of every type, errors, and fingerprints."""

from __future__ import annotations

import io
import json
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from helpers import raises_code
from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.data.images import ImageReference, image_key, image_size, open_image
from vlm_unlearn.records import Example
from vlm_unlearn.store import digest_file, digest_json, read_records

ROW: dict[str, Any] = {"question": "What?", "answer": "A kite."}
RETAIN = [{"question": "Who?", "answer": "Nobody."}]


def read(*rows: dict[str, Any], **options: Any) -> UnlearningDataset:
    return UnlearningDataset.from_datasets({"forget": list(rows), "retain": RETAIN}, **options)


def picture(mode: str = "RGB", size: tuple[int, int] = (12, 8), seed: int = 0) -> Image.Image:
    """A picture of random pixels."""
    pixels = random.Random(seed).randbytes(size[0] * size[1] * 4)
    return Image.frombytes("RGBA", size, pixels).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    picture().save(tmp_path / "a.png")
    return tmp_path


@pytest.mark.parametrize(
    "value",
    [
        lambda file: file,
        str,
        lambda file: file.read_bytes(),
        lambda file: bytearray(file.read_bytes()),
        lambda file: {"bytes": file.read_bytes(), "path": None},
        lambda file: {"bytes": None, "path": str(file)},
        lambda file: {"bytes": file.read_bytes(), "path": "gone.png"},
        Image.open,
        lambda file: Image.open(file).copy(),
        lambda file: np.asarray(Image.open(file)),
    ],
)
def test_image_of_every_type_opens_as_rgb(folder: Path, value: Callable[[Path], Any]) -> None:
    data = read({**ROW, "image": value(folder / "a.png")})
    image = data.image(data["forget"][0])
    assert image is not None
    assert open_image(image).tobytes() == picture().tobytes()
    assert image_size(image) == (12, 8)
    restored = pickle.loads(pickle.dumps(data))
    assert open_image(restored.image(restored["forget"][0])).tobytes() == picture().tobytes()


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16"])
def test_pil_image_of_every_mode_is_converted_like_its_file(tmp_path: Path, mode: str) -> None:
    image = picture("L").convert("I").convert("I;16") if mode == "I;16" else picture(mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    memory, file = read({**ROW, "image": image}), read({**ROW, "image": encoded(image, kind)})
    opened = [open_image(data.image(data["forget"][0])) for data in (memory, file)]  # type: ignore[arg-type]
    assert opened[0].mode == "RGB"
    assert opened[0].tobytes() == opened[1].tobytes()


@pytest.mark.parametrize(
    ("array", "code"),
    [
        (np.zeros((3, 4), np.uint8), None),
        (np.zeros((3, 4, 1), np.uint8), None),
        (np.zeros((3, 4, 4), np.uint8), None),
        (np.zeros((3, 4, 3), np.uint8)[:, ::-1], None),
        (np.zeros((3, 4, 2), np.uint8), "invalid-field"),
        (np.zeros((3, 40, 40), np.uint8), "invalid-field"),
        (np.zeros((3, 4, 3), np.float32), "invalid-field"),
        (np.zeros((0, 4, 3), np.uint8), "invalid-image"),
    ],
)
def test_array_is_an_image_or_an_error(array: Any, code: str | None) -> None:
    if code is None:
        data = read({**ROW, "image": array})
        assert image_size(data.image(data["forget"][0])) == (4, 3)  # type: ignore[arg-type]
    else:
        with raises_code(code, file="forget", record="1", field="image"):
            read({**ROW, "image": array})


def test_exif_orientation_is_applied_as_in_files(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a.jpg").write_bytes(encoded(picture(), "JPEG", exif=exif))
    table = Dataset.from_list([{**ROW, "image": str(tmp_path / "a.jpg")}]).cast_column("image", ImageFeature())
    assert table[0]["image"].size == (8, 12)  # datasets rotates when it decodes
    data = UnlearningDataset.from_datasets({"forget": table, "retain": RETAIN})
    assert image_size(data.image(data["forget"][0])) == (8, 12)  # type: ignore[arg-type]


def test_same_content_is_the_same_image(folder: Path) -> None:
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes())
    content = (folder / "a.png").read_bytes()
    images = [folder / "a.png", str(folder / "b.png"), content, {"bytes": content, "path": "x"}]
    decoded = [Image.open(folder / "a.png"), np.asarray(picture())]
    data = read(*({**ROW, "image": image} for image in [*images, *decoded]))
    sources = [data.image(example) for example in data["forget"]]
    assert len(set(sources[:4])) == len({example.image for example in data["forget"][:4]}) == 1
    assert len(set(sources[4:])) == 1
    assert len({image_key(source) for source in sources if source}) == 2
    assert read({**ROW, "image": content}).fingerprint() == read({**ROW, "image": folder / "b.png"}).fingerprint()


@pytest.mark.parametrize(
    ("image", "code"),
    [
        ("../a.png", "image-outside-root"),
        ("sub/../../a.png", "image-outside-root"),
        ("/etc/hostname", "image-outside-root"),
        ("gone.png", "image-not-found"),
        ("", "invalid-field"),
        ("https://example.org/a.png", "unsupported-setting"),
        (3, "invalid-field"),
        (["a.png", "a.png"], "unsupported-setting"),
        ({"bytes": None, "path": None}, "invalid-field"),
    ],
)
def test_invalid_image_names_role_row_and_column(folder: Path, image: Any, code: str) -> None:
    with raises_code(code, file="forget", record='2 ("x")', field="image"):
        read(ROW, {**ROW, "id": "x", "image": image}, root=folder)


def test_relative_path_is_in_the_root_or_the_current_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    opened = Image.open("a.png")  # `datasets` stores its path alone
    table = Dataset.from_list([{**ROW, "image": opened}, {**ROW, "image": Image.open("a.png")}])
    stored = UnlearningDataset.from_datasets({"forget": table, "retain": RETAIN})
    for data in (read({**ROW, "image": "a.png"}), stored):
        assert image_size(data.image(data["forget"][0])) == opened.size  # type: ignore[arg-type]
    with raises_code("image-not-found", file="forget", record="1", field="image"):
        read({**ROW, "image": "gone.png"})
    with raises_code("image-not-found", file="forget", record="1", field="image"):
        read({**ROW, "image": folder / "gone.png"})
    (folder / "in").mkdir()
    (folder / "in" / "link.png").symlink_to(folder / "a.png")
    with raises_code("image-outside-root", field="image"):
        read({**ROW, "image": "link.png"}, root=folder / "in")
    data = read({**ROW, "image": folder / "a.png"}, {**ROW, "image": "a.png"}, root=folder)
    assert [example.image for example in data["forget"]] == ["a.png", "a.png"]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (encoded(picture())[:60], "invalid-image"),
        (encoded(Image.new("RGB", (64, 640), "red"), "JPEG")[:-600], "invalid-image"),
        (b"", "invalid-image"),
        (b"<svg/>", "invalid-image"),
        (encoded(Image.new("1", (40_000, 2))), "image-too-large"),
        (encoded(Image.new("1", (12_000, 12_000))), "image-too-large"),
    ],
)
def test_broken_bytes_are_an_error_when_the_image_is_encoded(tiny_model: Path, content: bytes, code: str) -> None:
    from vlm_unlearn.data.encoding import Turn, encode
    from vlm_unlearn.modeling.loader import load_processor

    data = read({**ROW, "image": content})
    example = data["forget"][0]
    with raises_code(code, record='"forget-1"'):
        encode(load_processor(tiny_model), [Turn.of_example(example, data.image(example))], "right")


def test_broken_pil_image_is_an_error(folder: Path) -> None:
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:120])
    with raises_code("invalid-image", file="forget", record="1", field="image"):
        read({**ROW, "image": Image.open(folder / "cut.png")})
    with raises_code("image-too-large", field="image"):
        read({**ROW, "image": Image.new("1", (40_000, 2))})


def test_pil_image_keeps_no_file_open(tmp_path: Path) -> None:
    frames = [picture(seed=seed) for seed in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    image: Any = Image.open(tmp_path / "a.gif")
    data = read({**ROW, "image": image})
    image.close()
    assert image_size(data.image(data["forget"][0])) == (12, 8)  # type: ignore[arg-type]


def test_tables_of_every_form_give_the_same_examples(folder: Path) -> None:
    rows = [{**ROW, "id": "f", "image": str(folder / "a.png"), "category": "x", "pair_id": 3}, {**ROW, "id": "g"}]
    retain = [{**RETAIN[0], "id": "r"}]
    with_role = [{**row, "role": role} for role, of_role in (("forget", rows), ("retain", retain)) for row in of_role]
    labels = Dataset.from_list(with_role).cast_column("role", ClassLabel(names=["retain", "forget"]))
    decoded = Dataset.from_list(rows).cast_column("image", ImageFeature())
    forms = [
        {"forget": rows, "retain": retain},
        {"retain": tuple(retain), "forget": Dataset.from_list(rows)},
        DatasetDict({"forget": decoded, "retain": Dataset.from_list(retain)}),
        DatasetDict({"train": Dataset.from_list(with_role)}),
        Dataset.from_list(with_role).with_format("numpy"),
        labels,
        labels.select([2, 0, 1]),
        with_role,
    ]
    for data in map(UnlearningDataset.from_any, forms):
        assert list(data) == ["forget", "retain"]
        assert [example.id for example in data["forget"]] == ["f", "g"]
        assert data.fingerprint() == UnlearningDataset.from_datasets(forms[0]).fingerprint()
        assert (data["forget"][0].category, data["forget"][0].pair_id) == ("x", "3")
        assert image_size(data.image(data["forget"][0])) == (12, 8)  # type: ignore[arg-type]
        assert data.image(data["forget"][1]) is None


@pytest.mark.parametrize(
    ("data", "code", "field"),
    [
        ({"forget": [ROW]}, "no-records", "retain"),
        ({"forget": [], "retain": RETAIN}, "no-records", "forget"),
        ({"forget": Dataset.from_list([]), "retain": RETAIN}, "no-records", "forget"),
        ({"forgot": [ROW], "retain": RETAIN}, "unknown-role", "data"),
        (DatasetDict({"train": Dataset.from_list(RETAIN)}), "unknown-role", "data"),
        (Dataset.from_list([{**ROW, "role": "harmful"}]), "unknown-role", "role"),
        (Dataset.from_list([{**ROW, "role": None}, {**ROW, "role": "forget"}]), "missing-field", "role"),
        (Dataset.from_list([ROW]), "missing-field", "role"),
        ({"forget": [{"questions": "?", "answer": "!"}], "retain": RETAIN}, "missing-field", "question"),
        ({"forget": [{"prompt": "?", "chosen": "!"}], "retain": RETAIN}, "missing-field", "question"),
        ({"forget": [{**ROW, "answer": None}], "retain": RETAIN}, "invalid-field", "answer"),
        ({"forget": [{**ROW, "answer": 3}], "retain": RETAIN}, "invalid-field", "answer"),
        ({"forget": [{**ROW, "answer": " "}], "retain": RETAIN}, "empty-field", "answer"),
        ({"forget": [{**ROW, "id": "a"}, {**ROW, "id": "a"}], "retain": RETAIN}, "duplicate-id", "id"),
        ({"forget": [{**ROW, "id": "forget-2"}, ROW], "retain": RETAIN}, "duplicate-id", "id"),
        (
            {"forget": [ROW], "retain": RETAIN, "decouple": [{**ROW, "pair_id": "p"}] * 2},
            "duplicate-id",
            "pair_id",
        ),
        ({"forget": ["What?"], "retain": RETAIN}, "invalid-field", "forget"),
        ({"forget": "rows.json", "retain": RETAIN}, "invalid-field", "forget"),
        (iter([ROW]), "invalid-field", "data"),
        ({"forget": [{**ROW, "image": b"x", "images": [b"x"]}], "retain": RETAIN}, "conflicting-settings", "images"),
        ({"forget": [{**ROW, "pair_id": 1.5}], "retain": RETAIN}, "invalid-field", "pair_id"),
        (Dataset.from_list([ROW]).with_transform(lambda rows: rows), "unsupported-setting", "data"),
        (IterableDataset.from_generator(lambda: iter([ROW])), "streaming-dataset", None),
        (
            datasets.IterableDatasetDict({"train": IterableDataset.from_generator(lambda: iter([ROW]))}),
            "streaming-dataset",
            None,
        ),
    ],
)
def test_invalid_data_is_a_user_error(data: Any, code: str, field: str | None) -> None:
    with raises_code(code, field=field):
        UnlearningDataset.from_any(data)


def test_missing_class_label_is_no_category() -> None:
    features = Features({"question": Value("string"), "answer": Value("string"), "category": ClassLabel(names=["a"])})
    table = Dataset.from_list([{**ROW, "category": 0}, {**ROW, "category": -1}, {**ROW, "category": None}], features)
    data = UnlearningDataset.from_datasets({"forget": table, "retain": RETAIN})
    assert [example.category for example in data["forget"]] == ["a", None, None]


def test_refusals_are_validated() -> None:
    assert read(ROW, refusals=("No.",)).refusals == ["No."]
    assert len(read(ROW).refusals) == 4
    for refusals in ([], [""], [3]):
        with raises_code("invalid-field", field="refusals"):
            read(ROW, refusals=refusals)


def test_folder_rejects_options_for_memory(training_sets: dict[str, Path]) -> None:
    for options in ({"root": "x"}, {"refusals": ["No."]}):
        with raises_code("conflicting-settings", field=next(iter(options))):
            UnlearningDataset.from_any(training_sets["harmful"], **options)  # type: ignore[arg-type]
    data = UnlearningDataset.from_any(str(training_sets["harmful"]))
    assert UnlearningDataset.from_any(data) is data


def test_folder_fingerprint_is_that_of_earlier_versions(training_sets: dict[str, Path]) -> None:
    """Runs resume only with the same fingerprint: one digest for each file, and one for the images in their order."""
    folder = training_sets["safe_eraser"]
    described = json.loads((folder / "dataset.json").read_text())
    root = folder / described["images"]["safe_eraser"]
    roles = ("forget", "retain", "decouple")
    names = [example.image for role in roles for example in read_records(folder / f"{role}.jsonl", Example)]
    expected = {name: entry["sha256"] for name, entry in described["files"].items()}
    expected["images"] = digest_json([digest_file(root / name) for name in dict.fromkeys(names) if name])
    data = UnlearningDataset.from_folder(folder)
    assert data.fingerprint() == expected
    for role in roles:
        assert "system" not in (folder / f"{role}.jsonl").read_text()
    tables = datasets.load_dataset("json", data_files={role: str(folder / f"{role}.jsonl") for role in roles})
    memory = UnlearningDataset.from_datasets(tables, root=root, refusals=data.refusals)
    assert memory.fingerprint() == expected


def test_fingerprint_depends_on_texts_images_and_refusals(folder: Path) -> None:
    base = {**ROW, "image": picture()}
    variants = [
        read(base),
        read({**base, "question": "Why?"}),
        read({**base, "answer": "So."}),
        read({**base, "image": picture(seed=1)}),
        read({**base, "image": picture("L")}),
        read({**base, "image": picture(size=(8, 12))}),
        read({**base, "system": "Be brief."}),
        read(base, base),
        read(base, refusals=["No."]),
    ]
    assert len({json.dumps(data.fingerprint()) for data in variants}) == len(variants)
    assert read(base).fingerprint() == read({**ROW, "image": picture()}).fingerprint()


def test_images_of_a_dataset_are_not_decoded_while_rows_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    features = Features(
        {"question": Value("string"), "answer": Value("string"), "images": List(ImageFeature()), "id": Value("int64")}
    )
    rows = [{**ROW, "id": number, "images": [picture(seed=number)]} for number in range(40)]
    table = Dataset.from_list(rows, features=features).shuffle(seed=1)
    opened = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **options: opened.append(1) or original(*args, **options))
    data = UnlearningDataset.from_datasets({"forget": table, "retain": RETAIN})
    data.fingerprint()
    assert not opened
    source = data.image(data["forget"][7])
    assert isinstance(source, ImageReference)
    assert len(pickle.dumps(source.load())) < 2000  # the stored bytes of one image
    assert open_image(source).tobytes() == picture(seed=int(data["forget"][7].id)).tobytes()
    assert len(opened) == 1


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


IMAGE = {"type": "image"}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [user("What?"), assistant("A kite.")]}, ("What?", "A kite.", 0, [], None)),
        ({"messages": [user("<image>\nWhat?"), assistant("A kite.")]}, ("What?", "A kite.", 0, [], None)),
        ({"messages": [user("What? <image>"), assistant("A kite.")]}, ("What?", "A kite.", 5, [], None)),
        ({"messages": [user("In <image> what?"), assistant("A kite.")]}, ("In  what?", "A kite.", 3, [], None)),
        ({"messages": [user([IMAGE, text("What?")]), assistant([text("A kite.")])]}, ("What?", "A kite.", 0, [], None)),
        ({"messages": [user([text("What?"), IMAGE]), assistant("A kite.")]}, ("What?", "A kite.", 5, [], None)),
        (
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    user([{"type": "image", "text": None}, {"type": "text", "text": "Who?"}]),
                    assistant("Ann."),
                    user("What?"),
                    assistant("A kite."),
                ]
            },
            ("What?", "A kite.", 0, [("Who?", "Ann.")], "Be brief."),
        ),
        (
            {
                "conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A kite."}],
                "system": "Be brief.",
            },
            ("What?", "A kite.", 0, [], "Be brief."),
        ),
    ],
)
@pytest.mark.parametrize("as_table", [False, True])
def test_messages_are_read(row: dict[str, Any], expected: tuple[Any, ...], as_table: bool) -> None:
    rows = [{**row, "images": [picture()]}]
    tables = {"forget": Dataset.from_list(rows, on_mixed_types="use_json") if as_table else rows, "retain": RETAIN}
    data = UnlearningDataset.from_datasets(tables)
    (example,) = data["forget"]
    history = [(turn.question, turn.answer) for turn in example.history]
    assert (example.question, example.answer, example.image_offset, history, example.system) == expected
    assert example.loss_on == ("last_answer" if history else "all_answers")
    assert image_size(data.image(example)) == (12, 8)  # type: ignore[arg-type]


def test_image_inside_a_message_is_read() -> None:
    rows = [{"messages": [user([{**IMAGE, "image": picture()}, text("What?")]), assistant([text("A kite.")])]}]
    for table in (rows, Dataset.from_list(rows)):
        data = UnlearningDataset.from_datasets({"forget": table, "retain": RETAIN})
        assert open_image(data.image(data["forget"][0])).tobytes() == picture().tobytes()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("messages", "code", "field"),
    [
        ([], "invalid-field", "messages"),
        ([user("What?")], "invalid-field", "messages"),
        ([user("What?"), user("Who?"), assistant("A.")], "invalid-field", "messages"),
        ([assistant("A."), user("What?")], "invalid-field", "messages"),
        ([user("What?"), {"role": "tool", "content": "x"}], "invalid-field", "messages"),
        ([user("What?"), assistant("A."), {"role": "system", "content": "x"}], "invalid-field", "messages"),
        ("What?", "invalid-field", "messages"),
        ([user("<image><image>What?"), assistant("A.")], "unsupported-setting", "messages[0].content"),
        ([user([IMAGE, IMAGE, text("What?")]), assistant("A.")], "unsupported-setting", "messages[0].content"),
        (
            [user("Who?"), assistant("A."), user("<image>What?"), assistant("B.")],
            "unsupported-setting",
            "messages[2].content",
        ),
        ([user("What?"), assistant("<image>A.")], "placeholder-in-text", "messages[1].content"),
        ([user("<image>"), assistant("A.")], "empty-field", "messages[0].content"),
        ([user("What?"), assistant([])], "empty-field", "messages[1].content"),
        ([user([{"type": "video"}]), assistant("A.")], "unsupported-setting", "messages[0].content[0].type"),
        ([user(3), assistant("A.")], "invalid-field", "messages[0].content"),
        ([{"content": "What?"}, assistant("A.")], "missing-field", "messages[0].role"),
    ],
)
def test_invalid_messages_name_row_and_field(messages: Any, code: str, field: str) -> None:
    with raises_code(code, file="forget", record='2 ("x")', field=field):
        read(ROW, {"id": "x", "messages": messages, "images": [picture()]})


def test_placeholder_without_image_and_several_images_are_errors() -> None:
    messages = [user("<image>What?"), assistant("A.")]
    with raises_code("missing-field", record="1", field="images"):
        read({"messages": messages})
    with raises_code("unsupported-setting", record="1", field="images"):
        read({"messages": messages, "images": [picture(), picture()]})


@pytest.fixture(scope="module")
def processor(tiny_model: Path) -> Any:
    from vlm_unlearn.modeling.loader import load_processor

    return load_processor(tiny_model)


def chats() -> Iterator[list[dict[str, Any]]]:
    """Chats whose image is first, last or in the middle, with one or two rounds."""
    for content in ([IMAGE, text("what is this ?")], [text("what is this ?"), IMAGE], [text("is"), IMAGE, text("red")]):
        yield [user(content), assistant([text("it is red .")])]
        rounds = [assistant([text("a kite .")]), user([text("what colour ?")]), assistant([text("it is red .")])]
        yield [user(content), *rounds]


def test_messages_are_encoded_as_the_chat_template_does(processor: Any) -> None:
    from vlm_unlearn.data.encoding import PromptMeter, Turn, encode_with_labels, render
    from vlm_unlearn.losses import IGNORED

    for messages in chats():
        data = read({"messages": messages, "images": [picture()]})
        turn = Turn.of_example(data["forget"][0], data.image(data["forget"][0]))
        prompt = processor.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
        assert render(processor, turn).before_answer[0] == prompt
        batch = encode_with_labels(processor, [turn], 512)
        labels = batch["labels"][0]
        answer = processor.tokenizer.decode(labels[labels != IGNORED])
        assert answer == "it is red . " + processor.tokenizer.eos_token
        meter = PromptMeter(processor)
        assert meter.prompt_tokens(turn) == int((labels != IGNORED).nonzero()[0])
        assert meter.total_tokens(turn) == batch["input_ids"].shape[1]


def test_system_message_is_rendered_or_an_error(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm_unlearn.data.encoding import Turn, render

    turn = Turn("x", None, "what ?", "it .", system="be brief")
    dropped = (
        "{% for m in messages if m['role'] != 'system' %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}"
        "{% endfor %}"
    )
    monkeypatch.setattr(processor, "chat_template", dropped)
    with raises_code("unsupported-setting", record='"x"'):
        render(processor, turn)
    monkeypatch.setattr(processor, "chat_template", dropped.replace(" if m['role'] != 'system'", ""))
    assert render(processor, turn).before_answer[0].startswith("be brief")


def test_fingerprint_does_not_depend_on_the_image_loader(training_sets: dict[str, Path]) -> None:
    data = UnlearningDataset.from_folder(training_sets["harmful"])
    fingerprint = data.fingerprint()
    data.image_loader = "llava"
    assert data.fingerprint() == fingerprint
