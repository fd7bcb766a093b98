"""Files of rows with `messages` and `images`, as TRL writes them, are training data and splits of a suite."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from helpers import error_code, raises_code, run_in_process
from vlm_unlearn.config import Suite, load
from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.data.image_paths import resolve_image
from vlm_unlearn.evaluation.prompts import prompts_digest, suite_prompts
from vlm_unlearn.evaluation.rows import read_rows
from vlm_unlearn.records import Response, Round
from vlm_unlearn.store import read_records

Rows = Sequence[dict[str, Any]]


def picture(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(buffer, format="PNG")
    return buffer.getvalue()


def jsonl(path: Path, rows: Rows) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def parquet(path: Path, rows: Rows) -> None:
    from datasets import Dataset

    Dataset.from_list(list(rows)).to_parquet(path)


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    ".jsonl": jsonl,
    ".json": lambda path, rows: path.write_text(json.dumps(rows)) and None,
    ".parquet": parquet,
}


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


SYSTEM = message("system", "Be brief.")
PARTS = [{"type": "text", "text": "In "}, {"type": "image", "text": None}, {"type": "text", "text": "?"}]
TEXT_ROWS = [
    {"messages": [message("user", "<image>\nWhat?"), message("assistant", "A kite.")], "images": ["kite.png"]},
    {
        "messages": [
            SYSTEM,
            message("user", "<image>Who?"),
            message("assistant", "Ann."),
            message("user", "Where?"),
            message("assistant", "Here."),
        ],
        "images": ["sub/a.png"],
    },
    {"messages": [message("user", "Name a color."), message("assistant", "Red.")], "images": []},
]
PART_ROWS = [
    {
        "messages": [message("user", PARTS), message("assistant", [{"type": "text", "text": "A kite."}])],
        "images": ["kite.png"],
    }
]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    for name, color in (("kite.png", "red"), ("sub/a.png", "blue")):
        (root / name).write_bytes(picture(color))
    return root


def contents(data: UnlearningDataset, role: str) -> list[dict[str, Any]]:
    return [example.model_dump(exclude={"id", "source"}) for example in data[role]]


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize("rows", [TEXT_ROWS, PART_ROWS], ids=["texts", "parts"])
def test_imported_file_has_the_examples_of_the_rows_in_memory(
    rows: Rows, ending: str, images: Path, tmp_path: Path
) -> None:
    file = tmp_path / f"rows{ending}"
    WRITERS[ending](file, rows)
    arguments = ("--forget", file, "--retain", file, "--images", images, "--out", tmp_path / "set")
    done = run_in_process("data", "import", "files", *arguments)
    assert done.returncode == 0, done.stderr
    folder = UnlearningDataset.from_folder(tmp_path / "set")
    memory = UnlearningDataset.from_datasets({"forget": rows, "retain": rows}, root=images)
    for role in ("forget", "retain"):
        assert contents(folder, role) == contents(memory, role)
    assert run_in_process("data", "check", tmp_path / "set", "--json").returncode == 1  # equal forget and retain sets


@pytest.mark.parametrize("ending", WRITERS)
def test_one_file_with_a_set_column(ending: str, images: Path, tmp_path: Path) -> None:
    file = tmp_path / f"rows{ending}"
    roles = ("harmful", "harmless", "forget")
    rows = [{**row, "set": role, "id": f"r{role}"} for row, role in zip(TEXT_ROWS, roles, strict=True)]
    WRITERS[ending](file, rows)
    done = run_in_process("data", "import", "files", file, "--images", images, "--out", tmp_path / "set", "--json")
    assert json.loads(done.stdout)["counts"] == {"forget": 2, "retain": 1}


def embedded_parquet(path: Path, *colors: str) -> None:
    """A file with an image inside each row."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    rows = [{**TEXT_ROWS[0], "images": [{"bytes": picture(color), "path": None}]} for color in colors]
    features = Features(
        {"messages": [{"role": Value("string"), "content": Value("string")}], "images": List(ImageFeature())}
    )
    Dataset.from_list(rows, features=features).to_parquet(path)


def test_images_inside_a_parquet_file_are_unpacked(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    embedded_parquet(file, "red", "blue")
    (tmp_path / "images").mkdir()
    arguments = ("--forget", file, "--retain", file, "--images", tmp_path / "images", "--out", tmp_path / "set")
    assert run_in_process("data", "import", "files", *arguments).returncode == 0
    data = UnlearningDataset.from_folder(tmp_path / "set")
    image = data.image(data["forget"][0])
    assert isinstance(image, Path)
    assert image.read_bytes() == picture("red")


def test_images_inside_the_parquet_file_of_a_split(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLM_UNLEARN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    embedded_parquet(tmp_path / "rows.parquet", "red", "blue", "red")
    suite = split_suite(tmp_path / "rows.parquet", tmp_path / "images")
    prompts = suite_prompts(suite)
    files = [resolve_image(tmp_path / "images", str(prompt.image)) for prompt in prompts]
    assert [file.read_bytes() for file in files] == [picture(color) for color in ("red", "blue", "red")]
    arguments = (tmp_path / "suite.yaml", f"model={tiny_model}", "generation.max_new_tokens=2")
    done = run_in_process("evaluate", *arguments, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert all(response.text is not None for response in read_records(tmp_path / "run/responses.jsonl", Response))
    assert len(list((tmp_path / "run" / "report" / "images").iterdir())) == 2
    assert list((tmp_path / "images").iterdir()) == []
    identity = prompts_digest(prompts, {"mine": tmp_path / "images"})
    monkeypatch.setenv("VLM_UNLEARN_CACHE", str(tmp_path / "other"))
    with raises_code("image-not-found"):
        prompts_digest(prompts, {"mine": tmp_path / "images"})
    assert prompts_digest(suite_prompts(suite), {"mine": tmp_path / "images"}) == identity


def split_suite(file: Path, images: Path, kind: str = "unsafe") -> Suite:
    suite = file.parent / "suite.yaml"
    suite.write_text(
        f"model: m\nsplits: [{{name: mine, format: table, file: {file}, images: {images}, kind: {kind}}}]\n"
        "metrics: {asr: {splits: [mine], labels: [complied]}}\njudge: keyword\n"
    )
    return load(Suite, suite)


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize("rows", [TEXT_ROWS, PART_ROWS], ids=["texts", "parts"])
@pytest.mark.parametrize("kind", ["unsafe", "safe"])
def test_split_has_the_prompts_of_the_rows_in_memory(
    kind: str, rows: Rows, ending: str, images: Path, tmp_path: Path
) -> None:
    file = tmp_path / f"rows{ending}"
    WRITERS[ending](file, rows)
    prompts = suite_prompts(split_suite(file, images, kind))
    memory = read_rows(rows, images).prompts
    fields = {"question", "reference", "system", "history", "image_offset"}
    assert [prompt.model_dump(include=fields) for prompt in prompts] == [
        prompt.model_dump(include=fields) for prompt in memory
    ]
    assert [prompt.image for prompt in prompts] == [(row["images"] or [None])[0] for row in rows]
    assert {(prompt.set, prompt.kind) for prompt in prompts} == {("mine", kind)}


def test_split_takes_questions_without_an_answer_and_the_sets_of_a_set_column(images: Path, tmp_path: Path) -> None:
    asked = [message("user", "<image>Who?"), message("assistant", "Ann."), message("user", "Where?")]
    rows = [
        {"messages": asked, "image": "kite.png", "set": "harmful", "id": "a", "category": "c"},
        {"messages": [message("user", "What?")], "set": "harmless"},
    ]
    jsonl(tmp_path / "rows.jsonl", rows)
    (prompt,) = suite_prompts(split_suite(tmp_path / "rows.jsonl", images))
    assert (prompt.id, prompt.image, prompt.reference, prompt.category) == ("mine/a/0", "kite.png", None, "c")
    assert prompt.history == (Round(question="Who?", answer="Ann."),)


def test_rows_of_questions_can_have_the_column_images(images: Path, tmp_path: Path) -> None:
    rows = [{"question": "What?", "answer": "A kite.", "images": ["kite.png"], "set": "harmful"}]
    jsonl(tmp_path / "rows.jsonl", rows)
    (prompt,) = suite_prompts(split_suite(tmp_path / "rows.jsonl", images))
    assert prompt.image == "kite.png"


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"messages": [message("user", "Q?")]}, "invalid-field"),
        ({"messages": [message("assistant", "A.")]}, "invalid-field"),
        ({"messages": [message("user", "<image>Q?"), message("assistant", "A.")]}, "missing-field"),
        ({"messages": [message("user", "Q?"), message("assistant", " ")]}, "empty-field"),
        ({**TEXT_ROWS[0], "images": ["kite.png", "kite.png"]}, "unsupported-setting"),
        ({**TEXT_ROWS[0], "images": ["gone.png"]}, "image-not-found"),
        ({**TEXT_ROWS[0], "images": ["../a.png"]}, "image-outside-root"),
    ],
)
def test_broken_row_is_left_out_and_named(row: dict[str, Any], code: str, images: Path, tmp_path: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", [TEXT_ROWS[0], row])
    files = ("--forget", tmp_path / "rows.jsonl", "--retain", tmp_path / "rows.jsonl")
    done = run_in_process("data", "import", "files", *files, "--images", images, "--out", tmp_path / "set", "--json")
    document = json.loads(done.stdout)
    assert (document["counts"], document["broken"]) == ({"forget": 1, "retain": 1}, 2)
    jsonl(tmp_path / "broken.jsonl", [row])
    if code != "invalid-field" or row["messages"][-1]["role"] != "user":
        with raises_code(code) as caught:
            suite_prompts(split_suite(tmp_path / "broken.jsonl", images))
        assert caught.value.record is not None


def test_conversions_do_not_lose_a_system_message(tmp_path: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", TEXT_ROWS)
    for name in ("out.json", "out.jsonl"):
        done = run_in_process("data", "convert", tmp_path / "rows.jsonl", tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert "1 broken record" in done.stdout
        assert len((tmp_path / name).read_text().split("kite.png")) == 2
    done = run_in_process("data", "diversify", tmp_path / "rows.jsonl", tmp_path / "other.jsonl")
    assert error_code(done) == "no-records"


def test_conversations_with_the_column_images(images: Path, tmp_path: Path) -> None:
    """LLaMA-Factory's files, as JSON lines and as parquet."""
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A kite."}]
    for ending in (".jsonl", ".parquet"):
        file = tmp_path / f"rows{ending}"
        WRITERS[ending](file, [{"conversations": turns, "images": ["kite.png"]}])
        arguments = ("--forget", file, "--retain", file, "--images", images, "--out", tmp_path / ending)
        done = run_in_process("data", "import", "files", *arguments)
        assert done.returncode == 0, done.stderr
        (example,) = UnlearningDataset.from_folder(tmp_path / ending)["forget"]
        assert (example.image, example.question, example.answer) == ("kite.png", "What?", "A kite.")
