"""Benchmarks read answers in any usual form, and reject files in which one id stands for two things."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers import raises_code
from vlm_unlearn.benchmarks import score_file
from vlm_unlearn.benchmarks.base import get_benchmark

COLORS = [{"answer": "blue"}] * 10
FILES: dict[str, Any] = {
    "vqav2": {"annotations": [{"question_id": 7, "image_id": 1, "answer_type": "other", "answers": COLORS}]},
    "textvqa": {"data": [{"question_id": 7, "image_id": "i", "question": "what color?", "answers": ["blue"] * 10}]},
    "vizwiz": [{"image": "7", "question": "What color?", "answer_type": "other", "answers": COLORS}],
    "gqa": {"7": {"imageId": "i", "question": "What color?", "answer": "blue", "types": {"structural": "query"}}},
    "pope": {"question_id": 7, "image": "i", "text": "Is there a dog in the image?", "label": "yes"},
    "scienceqa": {"7": {"question": "Which?", "choices": ["dog", "cat"], "answer": 1, "image": None}},
}
SHORT = ("vqav2", "textvqa", "vizwiz", "gqa")


def scored(name: str, text: str, folder: Path, official: bool = False, **fields: Any) -> tuple[float, bool]:
    """The score of an answer, and whether it is unparsed."""
    (folder / "a.json").write_text(json.dumps(FILES[name]))
    (folder / "p.jsonl").write_text(json.dumps({"question_id": 7, "text": text, **fields}) + "\n")
    scores = score_file(get_benchmark(name), folder / "p.jsonl", folder / "a.json", official=official)
    return scores.questions[0].value, scores.questions[0].unparsed


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize(
    "text", ["Answer: blue", "**blue**", "<think>red?</think>blue", "blue</s>", '{"answer": "blue"}']
)
def test_short_answers_are_read_in_decoration(name: str, text: str, tmp_path: Path) -> None:
    assert scored(name, text, tmp_path) == (1.0, False)


@pytest.mark.parametrize("name", SHORT)
def test_short_answers_official_counting_scores_the_text_as_it_is(name: str, tmp_path: Path) -> None:
    assert scored(name, "<think>red?</think>blue", tmp_path, official=True) == (0.0, False)
    assert scored(name, "blue", tmp_path, official=True) == (1.0, False)


@pytest.mark.parametrize("name", FILES)
def test_answer_that_ends_in_its_reasoning_is_unparsed(name: str, tmp_path: Path) -> None:
    assert scored(name, "<think>The answer is B. yes. blue", tmp_path) == (0.0, True)


@pytest.mark.parametrize(
    "text", ["A dog is there.", "There is a dog, but it is blurred.", "**Yes**", "[THINK]no[/THINK]Yes"]
)
def test_pope_reads_statements_about_the_object(text: str, tmp_path: Path) -> None:
    expected = (0.0, True) if text.startswith("A dog") else (1.0, False)
    assert scored("pope", text, tmp_path) == expected
    assert scored("pope", "There is a cat.", tmp_path) == (0.0, True)


@pytest.mark.parametrize("field", ["prompt", "question"])
@pytest.mark.parametrize("name", sorted(set(FILES) - {"vqav2"}))
def test_prediction_of_another_question_with_the_same_id_is_rejected(name: str, field: str, tmp_path: Path) -> None:
    with raises_code("run-mismatch", file=tmp_path / "p.jsonl"):
        scored(name, "blue", tmp_path, **{field: "Who built the tower?\nAnswer with a word."})


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("gqa", "<image>\nWhat color?\nAnswer the question using a single word or phrase."),
        ("textvqa", "What color?\nReference OCR token: A, B"),
        ("pope", "is there a dog  in the image"),
        ("vqav2", "The annotations have no question to compare."),
    ],
)
def test_prediction_with_a_format_prompt_is_accepted(name: str, prompt: str, tmp_path: Path) -> None:
    assert scored(name, "yes" if name == "pope" else "blue", tmp_path, prompt=prompt) == (1.0, False)


@pytest.mark.parametrize("name", SHORT)
def test_an_id_twice_in_the_annotations_is_rejected(name: str, tmp_path: Path) -> None:
    text = json.dumps(FILES[name])
    if isinstance(FILES[name], list):
        text = json.dumps(FILES[name] * 2)
    elif name == "gqa":
        text = f"{text[:-1]}, {text[1:]}"
    else:
        ((key, values),) = FILES[name].items()
        text = json.dumps({key: values * 2})
    (tmp_path / "a.json").write_text(text)
    (tmp_path / "p.jsonl").write_text('{"question_id": 7, "text": "blue"}\n')
    with raises_code("duplicate-key" if name == "gqa" else "duplicate-id", file=tmp_path / "a.json"):
        score_file(get_benchmark(name), tmp_path / "p.jsonl", tmp_path / "a.json")


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ('{"question_id": 7, "text": "blue", "text": "red"}\n', "duplicate-key"),
        ('{"question_id": 7, "text": "blue"}\n{"question_id": "7", "text": "red"}\n', "duplicate-id"),
        ('{"text": "blue"}\n', "invalid-field"),
        ('{"question_id": 7, "text": "bl\n', "invalid-json"),
    ],
)
def test_predictions_that_are_not_clear_are_rejected(line: str, code: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(FILES["gqa"]))
    (tmp_path / "p.jsonl").write_text(line)
    with raises_code(code, file=tmp_path / "p.jsonl"):
        score_file(get_benchmark("gqa"), tmp_path / "p.jsonl", tmp_path / "a.json")


def mmbench(rows: str, answer: str, folder: Path, columns: str = "ABCDEF") -> tuple[float, bool]:
    header = "\t".join(["index", "question", *columns, "answer", "image"])
    (folder / "a.tsv").write_text(f"{header}\n{rows}\n")
    (folder / "p.jsonl").write_text(json.dumps({"question_id": 1, "text": answer}) + "\n")
    scores = score_file(get_benchmark("mmbench"), folder / "p.jsonl", folder / "a.tsv")
    return scores.questions[0].value, scores.questions[0].unparsed


@pytest.mark.parametrize(
    ("options", "truth", "answer", "score"),
    [
        ("a\tb\tc\td\te\tf", "F", "F", (1.0, False)),
        ("a\tb\tc\td\te\tf", "E", "Answer: **E**", (1.0, False)),
        ("a\tb\tc\td\t\t", "D", "E", (0.0, True)),  # E is empty
        ("a\t\tc\tnan\te\t", "C", "C", (1.0, False)),  # empty options keep the letters of the others
        ("a\t\tc\tnan\te\t", "C", "c", (1.0, False)),
        ("a\t\tc\tnan\te\t", "C", "B", (0.0, True)),
    ],
)
def test_mmbench_options_keep_their_letters(
    options: str, truth: str, answer: str, score: tuple[float, bool], tmp_path: Path
) -> None:
    assert mmbench(f"1\t?\t{options}\t{truth}\ti", answer, tmp_path) == score


@pytest.mark.parametrize(
    ("rows", "columns", "code"),
    [
        ("1\t?\ta\tb\t\t\t\t\tE\ti", "ABCDEF", "invalid-field"),  # the right option is empty
        ("1\t?\ta\tb\tB\ti\n1\t?\tc\td\tA\ti", "AB", "duplicate-id"),
        ("1\t?\ta\tb\tB\ti", "AA", "duplicate-key"),
        ("1\t?\ta\tb\tc\tB\ti", "AB", "invalid-table"),
        ("1-3\t?\ta\tb\tB\ti", "AB", "invalid-field"),
    ],
)
def test_mmbench_unclear_file_is_rejected(rows: str, columns: str, code: str, tmp_path: Path) -> None:
    with raises_code(code, file=tmp_path / "a.tsv"):
        mmbench(rows, "A", tmp_path, columns)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_predictions_in_unicode_encodings_are_read(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(FILES["gqa"]))
    (tmp_path / "p.jsonl").write_bytes('{"question_id": 7, "text": "blue", "model": "caf\u00e9"}\n'.encode(encoding))
    scores = score_file(get_benchmark("gqa"), tmp_path / "p.jsonl", tmp_path / "a.json")
    assert scores.questions[0].value == 1.0


@pytest.mark.parametrize("file", ["p.jsonl", "a.json"])
def test_predictions_and_annotations_in_windows_1252_are_rejected(file: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(FILES["gqa"]))
    (tmp_path / "p.jsonl").write_text('{"question_id": 7, "text": "blue"}\n')
    (tmp_path / file).write_bytes('{"question_id": 7, "text": "caf\u00e9"}\n'.encode("cp1252"))
    with raises_code("invalid-encoding", file=tmp_path / file) as caught:
        score_file(get_benchmark("gqa"), tmp_path / "p.jsonl", tmp_path / "a.json")
    assert "Windows-1252" in str(caught.value)
