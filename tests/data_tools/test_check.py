"""Tests of `data check` on planted defects: broken files, duplicates, leaks and records over the length limit."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import raises_code
from vlm_unlearn.data_tools.check import Checker, DataSource
from vlm_unlearn.data_tools.diversify import diversify
from vlm_unlearn.data_tools.importers import import_files
from vlm_unlearn.data_tools.near_duplicates import NearQuestions, difference_hash, near_images, normalize_question
from vlm_unlearn.data_tools.pipeline import convert
from vlm_unlearn.errors import Problems


def picture(path: Path, seed: int, size: tuple[int, int] = (64, 48)) -> None:
    """Writes an image of 8 x 6 random cells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(cells).resize(size, Image.Resampling.NEAREST).save(path)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for name, seed in (("a.png", 1), ("b.png", 2), ("c.png", 3), ("test.png", 4)):
        picture(folder / name, seed)
    shutil.copy(folder / "a.png", folder / "a_copy.png")
    Image.open(folder / "b.png").resize((320, 240)).save(folder / "b_large.jpg", quality=90)
    return folder


def jsonl(path: Path, rows: list[tuple[str | None, str, str]]) -> Path:
    path.write_text(
        "".join(json.dumps(dict(zip(("image", "question", "answer"), row, strict=True))) + "\n" for row in rows)
    )
    return path


def leak_counts(report: dict) -> dict[tuple[str, str, str], int]:
    return {(*leak["sets"], leak["what"]): leak["count"] for leak in report["leakage"] if leak["count"]}


def test_report_counts_duplicates_and_leaks(images: Path, tmp_path: Path) -> None:
    forget = [
        ("a.png", "How does one fold the paper kite?", "So."),
        ("b.png", "Which colour has it?", "Red."),
        (None, "Just text?", "Yes."),
    ]
    retain = [
        ("a_copy.png", "how does one fold the paper kite", "No."),
        ("c.png", "What is it?", "A c."),
        ("c.png", "What  is it", "A sea."),
    ]
    test = [("b_large.jpg", "How does one now fold the paper kite?", "x"), ("test.png", "Which colour has it?", "x")]
    import_files(
        {"forget": jsonl(tmp_path / "f.jsonl", forget), "retain": jsonl(tmp_path / "r.jsonl", retain)},
        images,
        tmp_path / "set",
    )
    checker = Checker()
    checker.add(DataSource(tmp_path / "set"))
    checker.add(DataSource(jsonl(tmp_path / "test.jsonl", test), images, against=True))
    report = checker.report()
    assert report["sets"]["forget"] == {"records": 3, "questions": 3, "distinct_questions": 3, "text_only": 1}
    assert report["sets"]["retain"]["distinct_questions"] == 2
    assert report["images"]["same_content"] == {"count": 1, "first": [["a.png", "a_copy.png"]]}
    assert (report["images"]["distinct_paths"], report["images"]["distinct_contents"]) == (6, 5)
    assert report["doubled_questions"]["retain"]["count"] == 1
    assert leak_counts(report) == {
        ("forget", "retain", "same question, same image"): 1,
        ("forget", "retain", "same question"): 1,
        ("forget", "retain", "same image"): 1,
        ("forget", "test", "same question"): 1,
        ("forget", "test", "near image"): 1,
        ("forget", "test", "near question"): 1,
        ("retain", "test", "near question"): 1,
    }
    assert len(report["errors"]) == 1  # the same question about the same image, in forget and retain
    assert [leak["what"] for leak in report["leakage"] if leak["by_design"]] == ["same image"], (
        "SafeEraser retains on the forget images"
    )
    near = next(leak for leak in report["leakage"] if leak["what"] == "near image" and leak["count"])
    assert near["first"] == ["forget: b.png ~ test: b_large.jpg"]


def test_report_of_a_clean_set_is_empty(images: Path, tmp_path: Path) -> None:
    rows = [(f"{name}.png", f"What is the {name} thing?", "It.") for name in "abc"]
    checker = Checker()
    checker.add(DataSource(jsonl(tmp_path / "t.jsonl", rows), images))
    report = checker.report()
    assert (report["errors"], report["warnings"]) == ([], [])
    assert report["images"]["usable"] == 3


def test_records_over_the_length_limit_are_reported(images: Path, tmp_path: Path) -> None:
    rows = [("a.png", "short", "x"), ("b.png", "long", "x"), (None, "cut", "x")]
    lengths = {"short": (10, 20), "long": (100, 120), "cut": (90, 150)}
    checker = Checker()
    checker.add(
        DataSource(jsonl(tmp_path / "t.jsonl", rows), images), lambda example, path: lengths[example.question], 100
    )
    report = checker.report()
    assert report["lengths"]["t"] == {"min": 20, "median": 120, "p90": 150, "p99": 150, "max": 150}
    assert report["too_long"]["question"] == {"count": 1, "first": ['t: "1": 100 tokens']}
    assert report["too_long"]["answer"]["count"] == 1
    assert (len(report["errors"]), len(report["warnings"])) == (1, 1)


def test_token_counts_equal_those_of_training(world: Path, tiny_model: Path) -> None:
    from vlm_unlearn.cli.data_quality import _token_count
    from vlm_unlearn.data.encoding import Turn, encode_with_labels
    from vlm_unlearn.data.readers import read_any
    from vlm_unlearn.modeling.loader import load_processor

    entry = next(read_any(world / "vlguard" / "train.json"))
    path = world / "vlguard" / "train" / str(entry.example.image)
    prompt_tokens, total_tokens = _token_count(str(tiny_model))(entry.example, path)
    turn = Turn("x", path, entry.example.question, entry.example.answer)
    labels = encode_with_labels(load_processor(tiny_model), [turn], 512)["labels"][0]
    assert prompt_tokens == int((labels != -100).nonzero()[0])
    assert total_tokens == len(labels)


def test_a_record_that_training_rejects_is_an_error(images: Path, tmp_path: Path, tiny_model: Path) -> None:
    from vlm_unlearn.cli.data_quality import _token_count

    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps({"image": "a.png", "question": "Q?", "answer": "see <image> here"}) + "\n")
    checker = Checker()
    checker.add(DataSource(file, images), _token_count(str(tiny_model)), 100)
    assert checker.problems.codes[0] == "placeholder-in-text"


def test_near_images_finds_up_to_three_different_bits() -> None:
    """Three different bits are near wherever they are. Four different bits, one in each band, are not."""
    base = 0x0123_4567_89AB_CDEF
    values = [
        base,
        base ^ 0b111,
        base ^ (1 << 63 | 1 << 40 | 1 << 3),
        base ^ 0xF,
        base ^ (1 << 5 | 1 << 20 | 1 << 36 | 1 << 60),
    ]
    hashes = np.array([*values, 0, 0], dtype=np.uint64)
    assert sorted(near_images(hashes, {"x": [0], "y": [1, 2, 3, 4, 5]}, "x", "y")) == [(0, 1), (0, 2)]
    assert list(near_images(hashes, {"x": [5], "y": [6]}, "x", "y")) == [], "images without structure are ignored"
    assert difference_hash(Image.new("RGB", (50, 50), "red")) == 0


def test_normalize_question_keeps_signs_with_meaning() -> None:
    assert normalize_question("  What's THIS,\nthen? ") == "what s this then"
    assert normalize_question("日本 は？") == "日本 は"
    for different in (("2+2", "2-2", "2*2"), ("C++", "C#", "C"), ("दिन क्या है", "दान क्या है"), ("😀", "😡")):
        assert len({normalize_question(text) for text in different}) == len(different)


def test_near_questions_finds_similar_pairs() -> None:
    """All of 1,000 pairs share 8 of 10 distinct words, which is exactly the threshold. The index may miss 5 of them."""
    rng = random.Random(0)
    words = [f"word{i}" for i in range(5000)]
    index = NearQuestions()
    pairs = []
    for number in range(1000):
        indexed = rng.sample(words, 9)
        pairs.append((number, " ".join([*indexed[:8], f"new{number}"])))  # 8 shared of 10 distinct words
        index.add([(number, " ".join(indexed))])
    assert len(list(index.matches(pairs))) >= 995


def test_files_with_the_same_name_become_numbered_sets(images: Path, tmp_path: Path) -> None:
    rows = [("a.png", "What is the thing in it?", "It.")]
    for name in ("x", "y", "z"):
        (tmp_path / name).mkdir()
        jsonl(tmp_path / name / "data.jsonl", rows)
    checker = Checker()
    checker.add(DataSource(tmp_path / "x" / "data.jsonl", images))
    for name in ("y", "z"):
        checker.add(DataSource(tmp_path / name / "data.jsonl", images, against=True))
    report = checker.report()
    assert {name: counts["records"] for name, counts in report["sets"].items()} == {"data": 1, "data#2": 1, "data#3": 1}
    assert leak_counts(report)["data", "data#2", "same question, same image"] == 1
    assert ("data#2", "data#3", "same question") not in leak_counts(report), (
        "an overlap of two test sets is not a leak of the checked set"
    )


def check_folder(folder: Path) -> Checker:
    checker = Checker()
    checker.add(DataSource(folder))
    return checker


def test_a_changed_training_set_is_an_error(training_sets: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(training_sets["harmful"], tmp_path / "changed"))
    description = json.loads((folder / "dataset.json").read_text())
    description["images"] = {
        name: str((training_sets["harmful"] / root).resolve()) for name, root in description["images"].items()
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    assert check_folder(folder).report()["errors"] == []
    lines = (folder / "retain.jsonl").read_text().splitlines()
    empty = json.dumps(json.loads(lines[0]) | {"id": "new", "answer": " "})
    elsewhere = json.dumps(json.loads(lines[0]) | {"id": "other", "source": "nowhere"})
    (folder / "retain.jsonl").write_text("\n".join([*lines, lines[0], empty, elsewhere, "{broken"]))
    checker = check_folder(folder)
    report = checker.report()
    assert sorted(checker.problems.codes) == ["empty-answer", "file-changed", "invalid-json", "missing-field"]
    assert report["doubled_ids"] == {"forget": 0, "retain": 1, "preferred": 0}
    assert len(report["errors"]) == 2  # broken records, duplicate ids
    (folder / "retain.jsonl").unlink()
    with raises_code("file-not-found", file=folder / "retain.jsonl"):
        check_folder(folder)


def test_an_empty_table_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,answer\n")
    checker = check_folder(tmp_path / "a.csv")
    assert checker.problems.codes == ["no-records"]
    assert str(tmp_path / "a.csv") in checker.report()["broken"]["first"][0]


def test_images_inside_a_table_are_an_error_of_their_own(tmp_path: Path) -> None:
    import datasets

    picture(tmp_path / "a.png", 1)
    row = {"image": {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}, "question": "Q?", "answer": "A."}
    features = datasets.Features(
        {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    datasets.Dataset.from_list([row], features=features).to_parquet(str(tmp_path / "t.parquet"))
    assert check_folder(tmp_path / "t.parquet").problems.codes == ["unsupported-setting"]
    problems = Problems()
    with raises_code("no-records"):
        convert(tmp_path / "t.parquet", tmp_path / "out.json", problems=problems)
    assert problems.codes == ["unsupported-setting"]
    with raises_code("unsupported-setting", file=tmp_path / "t.parquet"):
        diversify(tmp_path / "t.parquet", tmp_path / "out.json")
