"""Tables of the user: CSV, JSON lines, parquet, with named columns."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from helpers import raises_code
from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.data.formats.table import Columns, read_table
from vlm_unlearn.data.readers import detect, read_any
from vlm_unlearn.data_tools.audit import labeled_questions
from vlm_unlearn.data_tools.diversify import diversify
from vlm_unlearn.data_tools.importers import import_files
from vlm_unlearn.data_tools.pipeline import convert
from vlm_unlearn.errors import Problems

ROWS = [
    {"pic": "a.png", "ask": 'Say "this", please;\nnow', "reply": "No.", "group": "Harmful", "tag": "weapons"},
    {"pic": "b.png", "ask": "What is it?", "reply": "=1+1", "group": "harmless", "tag": ""},
    {"pic": "", "ask": "日本?", "reply": "3", "group": "harmless", "tag": ""},
]
COLUMNS = Columns(question="ask", answer="reply", image="pic", category="tag", set="group")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4), "red").save(tmp_path / name)
    return tmp_path


def write_rows(folder: Path, suffix: str) -> Path:
    file = folder / f"rows{suffix}"
    if suffix in (".csv", ".tsv"):
        with file.open("w", encoding="utf-8-sig", newline="") as handle:
            writer = csv.DictWriter(handle, list(ROWS[0]), delimiter="," if suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(ROWS)
    elif suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif suffix == ".json":
        file.write_text(json.dumps(ROWS))
    else:
        import datasets

        table = datasets.Dataset.from_list(ROWS)
        if suffix == ".parquet":
            table.to_parquet(str(file))
        else:
            table.save_to_disk(str(file))
    return file


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet", ""])
def test_import_files_same_set_from_every_file_type(folder: Path, suffix: str) -> None:
    imported = import_files({"": write_rows(folder, suffix)}, folder, folder / "out", COLUMNS)
    assert imported.counts == {"forget": 1, "retain": 2}
    assert not imported.problems
    training_set = UnlearningDataset.from_folder(folder / "out")
    (forget,) = training_set["forget"]
    assert (forget.question, forget.answer, forget.category, forget.image) == (
        ROWS[0]["ask"],
        "No.",
        "weapons",
        "a.png",
    )
    assert [(e.image, e.question, e.answer) for e in training_set["retain"]] == [
        ("b.png", "What is it?", "=1+1"),
        (None, "日本?", "3"),
    ]


def test_import_files_unpacks_embedded_images(folder: Path) -> None:
    import datasets

    def content(color: str) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (6, 5), color).save(buffer, format="PNG")
        return buffer.getvalue()

    rows = [
        {"image": {"bytes": content("red"), "path": None}, "question": "Q?", "answer": "A.", "set": "forget"},
        {"image": {"bytes": content("blue"), "path": None}, "question": "Q?", "answer": "A.", "set": "retain"},
        {"image": {"bytes": b"no image", "path": None}, "question": "Q?", "answer": "A.", "set": "retain"},
    ]
    features = datasets.Features(
        {"image": datasets.Image(), **{name: datasets.Value("string") for name in ("question", "answer", "set")}}
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(folder / "t.parquet"))
    imported = import_files({"": folder / "t.parquet"}, folder, folder / "out", Columns(set="set"))
    assert imported.counts == {"forget": 1, "retain": 1}
    assert imported.problems.count == 1
    training_set = UnlearningDataset.from_folder(folder / "out")
    path = training_set.image(training_set["forget"][0])
    assert path is not None
    assert Image.open(path).getpixel((0, 0)) == (255, 0, 0)


def test_import_files_one_file_per_role_with_pairs(folder: Path) -> None:
    forget = folder / "f.jsonl"
    forget.write_text(json.dumps({"image": "a.png", "question": "How?", "answer": "So.", "pair_id": "p1"}) + "\n")
    decouple = folder / "d.csv"
    decouple.write_text("image,question,answer,pair_id\nb.png,How?,A loaf.,p1\n")
    retain = folder / "r.json"
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "It."}]
    retain.write_text(json.dumps([{"id": "x", "image": "b.png", "conversations": turns}]))
    imported = import_files({"forget": forget, "retain": retain, "decouple": decouple}, folder, folder / "out")
    assert imported.counts == {"forget": 1, "retain": 1, "decouple": 1}
    training_set = UnlearningDataset.from_folder(folder / "out")
    assert training_set["decouple"][0].pair_id == training_set["forget"][0].pair_id == "p1"


def test_read_table_required_column_must_exist(folder: Path) -> None:
    file = folder / "a.csv"
    file.write_text("foto,question,answer,set\na.png,Q?,A.,train\nb.png,R?,B.,test\n")
    (first, _) = read_table(file, Columns(), folder)
    assert (first.example.image, first.set) == (None, None)
    (first, _) = read_table(file, Columns(image="foto", required=frozenset({"image"})), folder)
    assert first.example.image == "a.png"
    for field, column in (("image", "fotos"), ("category", "kind"), ("pair", "pairs")):
        with raises_code("missing-field", field=column) as caught:
            list(read_table(file, Columns(**{field: column}, required=frozenset({field})), folder))
        assert f"--{field}-column" in str(caught.value)


def test_read_any_uses_default_set_column(folder: Path) -> None:
    """Without options, an audit finds the same sets as an import."""
    file = folder / "a.csv"
    rows = [
        f"{word} thing {i}?,A.,{name}" for i in range(15) for word, name in (("Share", "harmful"), ("What", "harmless"))
    ]
    file.write_text("\n".join(["question,answer,set", *rows]))
    assert Counter((entry.set, entry.refused) for entry in read_any(file)) == {
        ("forget", True): 15,
        ("retain", False): 15,
    }


def test_read_table_line_numbers_with_blank_lines_and_line_breaks(tmp_path: Path) -> None:
    file = tmp_path / "a.CSV"
    file.write_text('question,answer\n\n"two\nlines",A.\n\nonly one\nQ?,A.\n')
    problems = Problems()
    assert len(list(read_table(file, Columns(), None, problems))) == 2
    assert problems.messages[0].startswith("a.CSV, record 2 (line 6): ")


def test_convert_to_csv_keeps_sets(world: Path, tmp_path: Path) -> None:
    """VLGuard is converted to CSV and keeps its sets."""
    source = world / "vlguard" / "train.json"
    convert(source, tmp_path / "a.csv")
    entries = [(entry.set, entry.example.question) for entry in read_any(source)]
    with (tmp_path / "a.csv").open() as handle:
        assert [(row["set"], row["question"]) for row in csv.DictReader(handle)] == entries


def test_import_files_leaves_out_empty_answers(folder: Path) -> None:
    record = {
        "id": "s",
        "image": "a.png",
        "safe": True,
        "instr-resp": [{"safe_instruction": f"Q{i}?", "response": "A." * i} for i in (0, 1)],
    }
    (folder / "v.json").write_text(json.dumps([record]))
    (folder / "f.jsonl").write_text('{"question": "F?", "answer": "x"}\n')
    imported = import_files({"forget": folder / "f.jsonl", "retain": folder / "v.json"}, folder, folder / "out")
    assert imported.counts == {"forget": 1, "retain": 1}
    assert imported.left_out == {"empty answer": 1}


def test_import_files_decouple_set_without_pairs_raises(folder: Path) -> None:
    (folder / "f.jsonl").write_text('{"question": "F?", "answer": "x"}\n')
    with raises_code("no-records", file=folder / "out") as caught:
        import_files(dict.fromkeys(("forget", "retain", "decouple"), folder / "f.jsonl"), folder, folder / "out")
    assert "decouple" in str(caught.value)
    assert "1 pair without its other half" in str(caught.value)
    assert not (folder / "out").exists()


def test_read_table_removes_image_placeholder(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    rows = [
        {"image": "a.png", "question": "<image>\nWhat?", "answer": "It."},
        {"question": "<image> What?", "answer": "It."},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = Problems()
    assert [row.example.question for row in read_table(file, Columns(), None, problems)] == ["What?"]
    assert problems.codes == ["placeholder-in-text"]


def test_import_files_uses_only_the_role_of_a_file_with_sets(world: Path, tmp_path: Path) -> None:
    file = world / "vlguard" / "train.json"
    imported = import_files({"forget": file, "retain": file}, world / "vlguard" / "train", tmp_path / "out")
    sets = Counter(entry.set for entry in read_any(file))
    assert imported.counts == {"forget": sets["forget"], "retain": sets["retain"]}
    # Unsafe questions about safe images have refusals as answers, so that there is nothing to unlearn.
    assert imported.left_out == {
        "retain pairs of train.json": sets["retain"],
        "forget pairs of train.json": sets["forget"],
        "safe_image_unsafe pairs of train.json": 2 * sets["safe_image_unsafe"],
    }


def test_import_files_uses_only_the_role_of_a_table_with_sets(folder: Path) -> None:
    file = folder / "a.csv"
    file.write_text("question,answer,set\nF?,A.,harmful\nR?,A.,harmless\nS?,A.,harmless\n")
    imported = import_files({"forget": file, "retain": file}, folder, folder / "out")
    assert imported.counts == {"forget": 1, "retain": 2}
    assert imported.left_out == {"retain pairs of a.csv": 2, "forget pairs of a.csv": 1}


def test_import_files_leaves_out_incomplete_pairs(folder: Path) -> None:
    rows = (
        "image,question,answer,set,pair_id\n"
        "a.png,F?,A.,forget,p1\na.png,G?,A.,forget,p2\na.png,H?,A.,forget,\nb.png,R?,A.,retain,\n"
    )
    (folder / "a.csv").write_text(
        rows + "gone.png,F?,N.,decouple,p1\nb.png,G?,N.,decouple,p2\nb.png,X?,N.,decouple,p9\n"
    )
    imported = import_files({"": folder / "a.csv"}, folder, folder / "out", Columns(set="set"))
    assert imported.counts == {"forget": 2, "retain": 1, "decouple": 1}
    assert imported.left_out == {"pair without its other half": 2}


def test_import_files_forget_row_needs_no_preferred_answer(folder: Path) -> None:
    """Only dpo needs preferred answers. One without a forget row is left out. Audit and diversify support them."""
    rows = (
        "image,question,answer,set,pair_id\n"
        "a.png,Why F?,A.,forget,p1\na.png,Why G?,A.,forget,p2\nb.png,Why R?,A.,retain,\n"
    )
    (folder / "a.csv").write_text(rows + "a.png,Why F?,No.,preferred,p1\na.png,Why X?,No.,preferred,p9\n")
    imported = import_files({"": folder / "a.csv"}, folder, folder / "out", Columns(set="set"))
    assert imported.counts == {"forget": 2, "retain": 1, "preferred": 1}
    assert imported.left_out == {"pair without its other half": 1}
    labels = list(labeled_questions(read_any(folder / "out"), "auto", lambda text: False))
    assert [(question, refused) for question, _, refused, _ in labels] == [
        ("Why F?", True),
        ("Why G?", True),
        ("Why R?", False),
    ]
    diversify(folder / "out", folder / "other", words=("tell", "describe"))
    questions = {
        entry.example.pair_id: entry.example.question for entry in read_any(folder / "other") if entry.set == "forget"
    }
    preferred = [entry.example for entry in read_any(folder / "other") if entry.set == "preferred"]
    assert [example.question for example in preferred] == [questions["p1"]]


def test_import_files_removes_decouple_set_of_earlier_import(folder: Path) -> None:
    rows = "image,question,answer,set,pair_id\na.png,F?,A.,forget,p1\nb.png,R?,A.,retain,\n"
    (folder / "a.csv").write_text(rows + "b.png,F?,N.,decouple,p1\n")
    import_files({"": folder / "a.csv"}, folder, folder / "out", Columns(set="set"))
    (folder / "out" / "mine.txt").write_text("mine")
    (folder / "a.csv").write_text(rows)
    import_files({"": folder / "a.csv"}, folder, folder / "out", Columns(set="set"))
    assert {entry.set for entry in read_any(folder / "out")} == {"forget", "retain"}
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "dataset.json",
        "forget.jsonl",
        "mine.txt",
        "retain.jsonl",
    ]


@pytest.mark.parametrize(
    ("name", "text", "code", "tokens"),
    [
        ("a.csv", "ask,reply\nq,a\n", "missing-field", ('"question"', '"ask", "reply"', "--question-column")),
        ("a.csv", "question,answers\nq,a\n", "missing-field", ("--answer-column", 'did you mean "answers"?')),
        ("a.csv", "", "invalid-table", ("empty",)),
        ("a.csv", "question,answer,answer\nq,a,b\n", "invalid-table", ("twice",)),
        ("a.csv", 'question,answer\n"q,a\n', "invalid-table", ("CSV", "line 2")),
        ("a.jsonl", '{"ask": 1}\n', "missing-field", ('"question"',)),
        ("a.parquet", "no parquet", "invalid-table", ("datasets",)),
        ("a.xlsx", "x", "invalid-table", ("CSV",)),
        ("a.csv", "question;answer\nq;a\n", "invalid-table", ('";"', "commas")),
        ("u16.csv", "\ufeffquestion,answer\nq,a\n", "invalid-encoding", ("UTF-16", "UTF-8")),
        ("u16.jsonl", "\ufeff{}", "invalid-encoding", ("UTF-16", "UTF-8")),
        ("gone.csv", None, "file-not-found", ()),
        ("gone.parquet", None, "file-not-found", ("datasets",)),
    ],
)
def test_read_table_invalid_file_raises(
    tmp_path: Path, name: str, text: str | None, code: str, tokens: tuple[str, ...]
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-16-le" if name.startswith("u16") else "utf-8")
    with raises_code(code) as caught:
        list(read_table(tmp_path / name, Columns(), None, Problems()))
    message = str(caught.value)
    assert Path(str(caught.value.file)).name == name
    assert all(token in message for token in tokens), message
    assert "\n" not in message


def test_import_files_reports_broken_rows(folder: Path) -> None:
    file = folder / "a.csv"
    file.write_bytes(
        b"image,question,answer,set\na.png,Q?,A.,forget\na.png,Q?\ngone.png,Q?,A.,retain\na.png,,A.,retain\n"
        b"a.png,Q?,A.,forgte\na.png,\xff?,A.,retain\na.png,Q?,A.,retain\n"
    )
    imported = import_files({"": file}, folder, folder / "out", Columns(set="set"))
    assert imported.counts == {"forget": 1, "retain": 1}
    expected = [
        ("invalid-table", "2 cells"),
        ("image-not-found", "gone.png"),
        ("empty-field", "question:"),
        ("unknown-name", 'did you mean "forget"?'),
        ("invalid-encoding", "question:"),
    ]
    assert imported.problems.codes == [code for code, _ in expected]
    for number, (message, (_, token)) in enumerate(zip(imported.problems.messages, expected, strict=True), start=2):
        assert message.startswith(f"a.csv, record {number} (line {number + 1}): ")
        assert token in message


def test_detect_format_from_content(world: Path, training_sets: dict[str, Path], folder: Path) -> None:
    assert detect(world / "vlguard" / "train.json") == "vlguard"
    assert detect(world / "safe_eraser" / "all_train.json") == "safe_eraser"
    assert detect(world / "general" / "general.json") == "llava"
    assert detect(training_sets["harmful"]) == "training_set"
    assert detect(write_rows(folder, ".jsonl")) == "table"
    sets = {entry.set for entry in read_any(world / "safe_eraser" / "all_train.json")}
    assert sets == {"forget", "retain", "decouple"}
