"""Scores equal the official evaluators', and official files are read as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import run
from vlm_unlearn.benchmarks import BENCHMARKS, score_file
from vlm_unlearn.benchmarks.base import get_benchmark
from vlm_unlearn.benchmarks.pope import parse_yes_no
from vlm_unlearn.benchmarks.scienceqa import parse_option
from vlm_unlearn.benchmarks.vqa_text import leave_one_out, normalize_evalai, strip_punctuation
from vlm_unlearn.benchmarks.vqav2 import accuracy
from vlm_unlearn.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name: str) -> list[dict[str, object]]:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def test_vqa_texts_score_as_official() -> None:
    for case in golden("vqa"):
        prediction, answers = case["prediction"], case["answers"]
        assert accuracy(prediction, answers, official=True) == pytest.approx(case["vqav2_official"], abs=1e-9), case
        shared = leave_one_out(normalize_evalai(prediction), [normalize_evalai(answer) for answer in answers])
        assert shared == pytest.approx(case["textvqa_official"], abs=1e-9), case
        assert shared == pytest.approx(case["vizwiz_lmms_eval"], abs=1e-9), case


def test_by_default_texts_are_normalised_where_annotators_agree_too() -> None:
    assert accuracy("Red", ["red"] * 10, official=True) == 0.0
    assert accuracy("Red.", ["red"] * 10, official=False) == 1.0


def test_leave_one_out_by_hand() -> None:
    """Two of ten say it: eight annotators see two matches (2/3), two see one (1/3): 8/10 * 2/3 + 2/10 * 1/3 = 0.6."""
    assert leave_one_out("a", ["a", "a", *"bcdefghi"]) == pytest.approx(0.6)


def test_the_published_count_of_full_stops_is_kept() -> None:
    assert strip_punctuation("." * 40) == "." * 8


def test_pope_is_read_and_counted_as_official() -> None:
    found = json.loads((GOLDEN / "pope.json").read_text())
    expect = found["expect"]
    assert [parse_yes_no(text, official=True) for text in found["answers"]] == expect["parsed"]
    graded = [({"label": label}, text) for label, text in zip(found["labels"], found["answers"], strict=True)]
    numbers = BENCHMARKS["pope"].extra_metrics(graded, official=True)
    assert numbers == {name: pytest.approx(expect[name]) for name in ("precision", "recall", "f1", "yes_ratio")}
    right = [BENCHMARKS["pope"].score_answer("q", truth, text, official=True).value for truth, text in graded]
    assert sum(right) / len(right) == pytest.approx(expect["accuracy"])


@pytest.mark.parametrize(
    ("text", "said"), [("NO", "no"), ("There isn\u2019t one.", "no"), ("Yes.", "yes"), ("A dog.", None), ("", None)]
)
def test_pope_by_default_tells_no_from_nothing(text: str, said: str | None) -> None:
    assert parse_yes_no(text, official=False) == said
    assert parse_yes_no(text, official=True) == "yes"  # whatever is not "No", "no" or "not"


def test_scienceqa_is_read_as_official() -> None:
    for case in golden("scienceqa"):
        assert parse_option(case["text"], case["num_choices"], official=True) == case["expect"], case


@pytest.mark.parametrize(
    ("text", "option"), [("(B)", 1), ("b", 1), ("B) the cat", 1), ("the cat", 1), ("E", -1), ("maybe", -1), ("", -1)]
)
def test_scienceqa_by_default_reads_letters_as_people_write_them(text: str, option: int) -> None:
    assert parse_option(text, ["the dog", "the cat"], official=False) == option


FILES = {
    "vqav2": {
        "annotations": [{"question_id": 7, "image_id": 1, "answer_type": "other", "answers": [{"answer": "cat"}] * 10}]
    },
    "textvqa": {"data": [{"question_id": 7, "image_id": "i", "answers": ["cat"] * 10}]},
    "vizwiz": [{"image": "7", "answer_type": "other", "answers": [{"answer": "cat"}] * 10}],
    "gqa": {"7": {"imageId": "i", "question": "?", "answer": "cat", "types": {"structural": "query"}}},
    "scienceqa": {"7": {"choices": ["dog", "cat"], "answer": 1, "image": None}},
}


@pytest.mark.parametrize("name", [*FILES, "pope"])
def test_official_files_score(name: str, tmp_path: Path) -> None:
    annotations, predictions = tmp_path / "a.json", tmp_path / "p.jsonl"
    annotations.write_text(json.dumps(FILES.get(name, {"question_id": 7, "image": "i", "text": "?", "label": "yes"})))
    predictions.write_text(
        json.dumps({"question_id": 7, "prompt": "x", "text": {"pope": "Yes", "scienceqa": "B"}.get(name, "Cat.")})
        + "\n"
    )
    done = run("benchmark", "score", name, "--predictions", predictions, "--annotations", annotations, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["score"], found["n"], found["missing"], found["high"]) == (1.0, 1, 0, 1.0)


def test_mmbench_counts_what_is_right_under_every_rotation(tmp_path: Path) -> None:
    """Question 1 is right both times, 2 once, 3 lacks an answer to its second order, 4 has two options and no rotation."""
    rows = ["index\tquestion\tA\tB\tC\tD\tanswer\tl2-category\timage"]
    for index, answer in ((1, "A"), (1_000_001, "B"), (2, "A"), (1_000_002, "B"), (3, "C"), (1_000_003, "D")):
        rows.append(f"{index}\t?\tw\tx\ty\tz\t{answer}\tlogic\t{'i' * 200_000}")
    rows.append("4\t?\tyes\tno\t\t\tB\tlogic\ti")
    (tmp_path / "a.tsv").write_text("\n".join(rows) + "\n")
    said = {1: "A", 1_000_001: "(B)", 2: "A", 1_000_002: "A", 3: "C", 4: "no"}
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"question_id": id, "text": text}) + "\n" for id, text in said.items())
    )
    found = score_file(get_benchmark("mmbench"), tmp_path / "p.jsonl", tmp_path / "a.tsv")
    assert {one.id: one.value for one in found.questions} == {"1": 1.0, "2": 0.0, "4": 1.0}
    assert found.missing == 1
    (tmp_path / "a.tsv").write_text("index\tA\tB\tanswer\n1\tx\ty\tC\n")
    with pytest.raises(UserError, match='row 1 must have "index", options'):
        score_file(get_benchmark("mmbench"), tmp_path / "p.jsonl", tmp_path / "a.tsv")


def test_what_is_missing_is_counted_and_scored_nowhere(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({str(n): {"answer": "cat", "imageId": str(n // 2)} for n in range(4)}))
    (tmp_path / "p.jsonl").write_text(
        '{"question_id": "0", "text": "cat"}\n{"question_id": "1", "text": null}\n{"question_id": 2, "text": "dog"}\n'
    )
    found = score_file(get_benchmark("gqa"), tmp_path / "p.jsonl", tmp_path / "a.json")
    assert [(one.id, one.value) for one in found.questions] == [("0", 1.0), ("2", 0.0)]
    assert found.missing == 2


@pytest.mark.parametrize(
    ("name", "annotations", "predictions", "message"),
    [
        ("gqa2", "{}", "", r'unknown benchmark "gqa2"; did you mean "gqa"\?; known: '),
        ("gqa", "[]", "", "expected an object, question id -> question"),
        ("gqa", '{"1": {"answer": "a"}}', '{"question_id": 2, "text": "a"}', 'question "2" is not in'),
        (
            "gqa",
            '{"1": {"answer": "a"}}',
            '{"question_id": 1, "text": "a"}\n{"question_id": "1", "text": "b"}',
            'question "1" is answered twice',
        ),
        ("gqa", '{"1": {"answer": "a"}}', '{"text": "a"}', "line 1"),
        ("vqav2", '{"annotations": [{"question_id": 1}]}', "", 'entry 0 has no "answers"'),
        ("vqav2", '{"annotations": [{"question_id": 1, "answers": [1]}]}', "", '"answers" must be a list of texts'),
        ("pope", '{"question_id": 1}', "", 'line 1 must have "question_id", and "label" yes or no'),
        ("pope", "[", "", "record 1: line 1, column 2"),
        ("pope", "{", "", "line 1 is not JSON; POPE's files have a question a line"),
        ("scienceqa", '{"1": {"choices": []}}', "", 'problem "1" must have "choices"'),
    ],
)
def test_wrong_files_are_named(name: str, annotations: str, predictions: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(annotations)
    (tmp_path / "p.jsonl").write_text(predictions)
    with pytest.raises(UserError, match=message):
        score_file(get_benchmark(name), tmp_path / "p.jsonl", tmp_path / "a.json")


def test_real_pope_files(tmp_path: Path) -> None:
    folder = Path(__file__).parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs POPE's annotation files (shared/data), which are not distributed with the project")
    for file in sorted(folder.glob("coco_pope_*.json")):
        entries = [json.loads(line) for line in file.read_text().splitlines()]
        (tmp_path / "p.jsonl").write_text(
            "".join(json.dumps({"question_id": e["question_id"], "text": "Yes"}) + "\n" for e in entries)
        )
        found = score_file(get_benchmark("pope"), tmp_path / "p.jsonl", file, official=True)
        assert len(found.questions) == len(entries)
        assert found.extra_metrics["yes_ratio"] == 1.0
        assert found.extra_metrics["precision"] == pytest.approx(0.5, abs=0.01)
