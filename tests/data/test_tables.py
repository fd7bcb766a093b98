"""Your own data: CSV, JSON lines, parquet, with columns by name."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from vlm_unlearn.data.audit import labeled_questions
from vlm_unlearn.data.diversify import diversify
from vlm_unlearn.data.formats.table import Columns, read_table
from vlm_unlearn.data.importers import import_files
from vlm_unlearn.data.pipeline import convert
from vlm_unlearn.data.readers import detect, read_any
from vlm_unlearn.data.training_set import read_training_set
from vlm_unlearn.errors import Problems, UserError

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


def written(folder: Path, suffix: str) -> Path:
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
def test_every_form_gives_the_same_set(folder: Path, suffix: str) -> None:
    imported = import_files({"": written(folder, suffix)}, folder, folder / "out", COLUMNS)
    assert imported.counts == {"forget": 1, "retain": 2}
    assert not imported.problems
    found = read_training_set(folder / "out")
    (forget,) = found.examples["forget"]
    assert (forget.question, forget.answer, forget.category, forget.image) == (
        ROWS[0]["ask"],
        "No.",
        "weapons",
        "a.png",
    )
    assert [(e.image, e.question, e.answer) for e in found.examples["retain"]] == [
        ("b.png", "What is it?", "=1+1"),
        (None, "日本?", "3"),
    ]


def test_images_inside_a_table_are_kept(folder: Path) -> None:
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
    found = read_training_set(folder / "out")
    path = found.image_path(found.examples["forget"][0])
    assert path is not None
    assert Image.open(path).getpixel((0, 0)) == (255, 0, 0)


def test_a_file_for_each_set_with_pairs(folder: Path) -> None:
    forget = folder / "f.jsonl"
    forget.write_text(json.dumps({"image": "a.png", "question": "How?", "answer": "So.", "pair_id": "p1"}) + "\n")
    decouple = folder / "d.csv"
    decouple.write_text("image,question,answer,pair_id\nb.png,How?,A loaf.,p1\n")
    retain = folder / "r.json"
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "It."}]
    retain.write_text(json.dumps([{"id": "x", "image": "b.png", "conversations": turns}]))
    imported = import_files({"forget": forget, "retain": retain, "decouple": decouple}, folder, folder / "out")
    assert imported.counts == {"forget": 1, "retain": 1, "decouple": 1}
    found = read_training_set(folder / "out")
    assert found.examples["decouple"][0].pair_id == found.examples["forget"][0].pair_id == "p1"


def test_a_named_column_must_be_there_and_a_usual_one_need_not(folder: Path) -> None:
    file = folder / "a.csv"
    file.write_text("foto,question,answer,set\na.png,Q?,A.,train\nb.png,R?,B.,test\n")
    (first, _) = read_table(file, Columns(), folder)
    assert (first.example.image, first.set) == (None, None)
    (first, _) = read_table(file, Columns(image="foto", named=frozenset({"image"})), folder)
    assert first.example.image == "a.png"
    for field, column in (("image", "fotos"), ("category", "kind"), ("pair", "pairs")):
        with pytest.raises(UserError, match=f'no column "{column}".*pass --{field}-column'):
            list(read_table(file, Columns(**{field: column}, named=frozenset({field})), folder))


def test_the_usual_set_column_is_seen(folder: Path) -> None:
    """An audit without options sees what an import sees."""
    file = folder / "a.csv"
    rows = [
        f"{word} thing {i}?,A.,{name}" for i in range(15) for word, name in (("Share", "harmful"), ("What", "harmless"))
    ]
    file.write_text("\n".join(["question,answer,set", *rows]))
    assert Counter((entry.set, entry.refused) for entry in read_any(file)) == {
        ("forget", True): 15,
        ("retain", False): 15,
    }


def test_lines_are_counted_through_blank_and_long_cells(tmp_path: Path) -> None:
    file = tmp_path / "a.CSV"
    file.write_text('question,answer\n\n"two\nlines",A.\n\nonly one\nQ?,A.\n')
    problems = Problems()
    assert len(list(read_table(file, Columns(), None, problems))) == 2
    assert problems.messages[0].startswith("a.CSV: line 6:")


def test_a_table_knows_its_sets_again(world: Path, tmp_path: Path) -> None:
    """VLGuard to CSV and back to a training set."""
    source = world / "vlguard" / "train.json"
    convert(source, tmp_path / "a.csv")
    before = [(entry.set, entry.example.question) for entry in read_any(source)]
    with (tmp_path / "a.csv").open() as handle:
        assert [(row["set"], row["question"]) for row in csv.DictReader(handle)] == before


def test_what_answers_nothing_is_left_out(folder: Path) -> None:
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


def test_a_decouple_set_that_pairs_with_nothing_is_refused(folder: Path) -> None:
    (folder / "f.jsonl").write_text('{"question": "F?", "answer": "x"}\n')
    with pytest.raises(
        UserError, match="the decouple set is empty; nothing was written; left out: 1 pair without its other half"
    ):
        import_files(dict.fromkeys(("forget", "retain", "decouple"), folder / "f.jsonl"), folder, folder / "out")


def test_an_image_mark_is_no_part_of_the_question(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    rows = [
        {"image": "a.png", "question": "<image>\nWhat?", "answer": "It."},
        {"question": "<image> What?", "answer": "It."},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = Problems()
    assert [row.example.question for row in read_table(file, Columns(), None, problems)] == ["What?"]
    assert "there is no image" in problems.messages[0]


def test_of_a_file_with_sets_only_the_named_set_is_taken(world: Path, tmp_path: Path) -> None:
    file = world / "vlguard" / "train.json"
    imported = import_files({"forget": file, "retain": file}, world / "vlguard" / "train", tmp_path / "out")
    sets = Counter(entry.set for entry in read_any(file))
    assert imported.counts == {"forget": sets["forget"], "retain": sets["retain"]}
    # Unsafe questions on safe images are answered by refusals: nothing to unlearn.
    assert imported.left_out == {
        "retain pairs of train.json": sets["retain"],
        "forget pairs of train.json": sets["forget"],
        "safe_image_unsafe pairs of train.json": 2 * sets["safe_image_unsafe"],
    }


def test_of_a_table_with_sets_only_the_named_set_is_taken(folder: Path) -> None:
    file = folder / "a.csv"
    file.write_text("question,answer,set\nF?,A.,harmful\nR?,A.,harmless\nS?,A.,harmless\n")
    imported = import_files({"forget": file, "retain": file}, folder, folder / "out")
    assert imported.counts == {"forget": 1, "retain": 2}
    assert imported.left_out == {"retain pairs of a.csv": 2, "forget pairs of a.csv": 1}


def test_half_a_pair_is_left_out(folder: Path) -> None:
    rows = "image,question,answer,set,pair_id\na.png,F?,A.,forget,p1\na.png,G?,A.,forget,p2\na.png,H?,A.,forget,\nb.png,R?,A.,retain,\n"
    (folder / "a.csv").write_text(
        rows + "gone.png,F?,N.,decouple,p1\nb.png,G?,N.,decouple,p2\nb.png,X?,N.,decouple,p9\n"
    )
    imported = import_files({"": folder / "a.csv"}, folder, folder / "out", Columns(set="set"))
    assert imported.counts == {"forget": 2, "retain": 1, "decouple": 1}
    assert imported.left_out == {"pair without its other half": 2}


def test_a_missing_preferred_answer_costs_no_forget_row(folder: Path) -> None:
    """Only dpo wants it, and says so; a preferred answer to no question is left out. Audit and diversify know what it is."""
    rows = "image,question,answer,set,pair_id\na.png,Why F?,A.,forget,p1\na.png,Why G?,A.,forget,p2\nb.png,Why R?,A.,retain,\n"
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
    asked = {
        entry.example.pair_id: entry.example.question for entry in read_any(folder / "other") if entry.set == "forget"
    }
    preferred = [entry.example for entry in read_any(folder / "other") if entry.set == "preferred"]
    assert [example.question for example in preferred] == [asked["p1"]]


def test_importing_again_leaves_no_old_decouple_set(folder: Path) -> None:
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
    ("name", "text", "message"),
    [
        ("a.csv", "ask,reply\nq,a\n", 'no column "question"; its columns are "ask", "reply"; pass --question-column'),
        ("a.csv", "question,answers\nq,a\n", 'pass --answer-column; did you mean "answers"?'),
        ("a.csv", "", "is empty; it must name the columns"),
        ("a.csv", "question,answer,answer\nq,a,b\n", "names a column twice"),
        ("a.csv", 'question,answer\n"q,a\n', "not CSV"),
        ("a.jsonl", '{"ask": 1}\n', 'no column "question"'),
        ("a.parquet", "no parquet", "datasets could not load it"),
        ("a.xlsx", "x", "spreadsheets are not read; save it as CSV"),
        ("a.csv", "question;answer\nq;a\n", 'separated by ";"; save it with commas'),
        ("u16.csv", "\ufeffquestion,answer\nq,a\n", "is UTF-16; save it as UTF-8"),
        ("u16.jsonl", "\ufeff{}", "is UTF-16; save it as UTF-8"),
        ("gone.csv", None, "No such file"),
        ("gone.parquet", None, "could not load it"),
    ],
)
def test_a_wrong_table_is_one_clear_line(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-16-le" if name.startswith("u16") else "utf-8")
    with pytest.raises(UserError) as error:
        list(read_table(tmp_path / name, Columns(), None, Problems()))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_broken_rows_are_listed(folder: Path) -> None:
    file = folder / "a.csv"
    file.write_bytes(
        b"image,question,answer,set\na.png,Q?,A.,forget\na.png,Q?\ngone.png,Q?,A.,retain\na.png,,A.,retain\na.png,Q?,A.,forgte\n"
        b"a.png,\xff?,A.,retain\na.png,Q?,A.,retain\n"
    )
    imported = import_files({"": file}, folder, folder / "out", Columns(set="set"))
    assert imported.counts == {"forget": 1, "retain": 1}
    told = imported.problems.messages
    assert [message.split(":")[1].strip() for message in told] == [f"line {n}" for n in range(3, 8)]
    for message, words in zip(
        told,
        ("has 2 cells, the header 4", "not found", "non-empty", 'did you mean "forget"?', "broken character"),
        strict=True,
    ):
        assert words in message


def test_formats_are_told_by_their_content(world: Path, training_sets: dict[str, Path], folder: Path) -> None:
    assert detect(world / "vlguard" / "train.json") == "vlguard"
    assert detect(world / "safe_eraser" / "all_train.json") == "safe_eraser"
    assert detect(world / "general" / "general.json") == "llava"
    assert detect(training_sets["harmful"]) == "training_set"
    assert detect(written(folder, ".jsonl")) == "table"
    sets = {entry.set for entry in read_any(world / "safe_eraser" / "all_train.json")}
    assert sets == {"forget", "retain", "decouple"}
