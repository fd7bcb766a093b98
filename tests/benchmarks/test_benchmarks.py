"""Scores equal those of the official evaluators, computed from files in the official layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import raises_code
from vlm_unlearn.benchmarks import BENCHMARKS, score_file
from vlm_unlearn.benchmarks.base import get_benchmark
from vlm_unlearn.benchmarks.pope import parse_yes_no
from vlm_unlearn.benchmarks.scienceqa import parse_option
from vlm_unlearn.benchmarks.vqa_text import leave_one_out, normalize_evalai, strip_punctuation
from vlm_unlearn.benchmarks.vqav2 import accuracy
from vlm_unlearn.errors import UserError
from vlm_unlearn.evaluation.benchmarks import mean_score

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name: str) -> list[dict[str, object]]:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def test_vqa_accuracy_equals_the_official_evaluators() -> None:
    for case in golden("vqa"):
        prediction, answers = case["prediction"], case["answers"]
        assert accuracy(prediction, answers, official=True) == pytest.approx(case["vqav2_official"], abs=1e-9), case
        shared = leave_one_out(normalize_evalai(prediction), [normalize_evalai(answer) for answer in answers])
        assert shared == pytest.approx(case["textvqa_official"], abs=1e-9), case
        assert shared == pytest.approx(case["vizwiz_lmms_eval"], abs=1e-9), case


def test_vqav2_accuracy_by_default_normalizes_unanimous_answers_too() -> None:
    assert accuracy("Red", ["red"] * 10, official=True) == 0.0
    assert accuracy("Red.", ["red"] * 10, official=False) == 1.0


def test_leave_one_out_equals_value_by_hand() -> None:
    """Two of ten annotators match. Eight have two matches among the others (2/3), two have one (1/3): mean 0.6."""
    assert leave_one_out("a", ["a", "a", *"bcdefghi"]) == pytest.approx(0.6)


def test_strip_punctuation_removes_32_full_stops_as_published() -> None:
    assert strip_punctuation("." * 40) == "." * 8


def test_pope_parsing_and_metrics_equal_the_official_evaluator() -> None:
    golden_pope = json.loads((GOLDEN / "pope.json").read_text())
    expect = golden_pope["expect"]
    assert [parse_yes_no(text, official=True) for text in golden_pope["answers"]] == expect["parsed"]
    answers = [
        ({"label": label}, text) for label, text in zip(golden_pope["labels"], golden_pope["answers"], strict=True)
    ]
    metrics = BENCHMARKS["pope"].extra_metrics(answers, official=True)
    assert metrics == {name: pytest.approx(expect[name]) for name in ("precision", "recall", "f1", "yes_ratio")}
    values = [BENCHMARKS["pope"].score_answer("q", truth, text, official=True).value for truth, text in answers]
    assert sum(values) / len(values) == pytest.approx(expect["accuracy"])


@pytest.mark.parametrize(
    ("text", "answer"), [("NO", "no"), ("There isn\u2019t one.", "no"), ("Yes.", "yes"), ("A dog.", None), ("", None)]
)
def test_parse_yes_no_by_default_returns_none_for_other_answers(text: str, answer: str | None) -> None:
    assert parse_yes_no(text, official=False) == answer
    assert parse_yes_no(text, official=True) == "yes"  # everything without "No", "no" or "not"


def test_parse_option_equals_the_official_evaluator() -> None:
    for case in golden("scienceqa"):
        assert parse_option(case["text"], case["num_choices"], official=True) == case["expect"], case


@pytest.mark.parametrize(
    ("text", "option"), [("(B)", 1), ("b", 1), ("B) the cat", 1), ("the cat", 1), ("E", -1), ("maybe", -1), ("", -1)]
)
def test_parse_option_by_default_accepts_common_spellings(text: str, option: int) -> None:
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
def test_score_file_of_a_right_answer_is_1(name: str, tmp_path: Path) -> None:
    annotations, predictions = tmp_path / "a.json", tmp_path / "p.jsonl"
    annotations.write_text(json.dumps(FILES.get(name, {"question_id": 7, "image": "i", "text": "?", "label": "yes"})))
    text = {"pope": "Yes", "scienceqa": "B"}.get(name, "Cat.")
    predictions.write_text(json.dumps({"question_id": 7, "prompt": "x", "text": text}) + "\n")
    scores = score_file(get_benchmark(name), predictions, annotations)
    rate = mean_score(scores)
    assert (rate.value, rate.n, rate.high, scores.missing) == (1.0, 1, 1.0, 0)


def test_mmbench_counts_questions_right_in_every_rotation(tmp_path: Path) -> None:
    """1 is right in both rotations, 2 in one, 3 has one answer to two rotations, 4 has two options and one rotation."""
    rows = ["index\tquestion\tA\tB\tC\tD\tanswer\tl2-category\timage"]
    for index, answer in ((1, "A"), (1_000_001, "B"), (2, "A"), (1_000_002, "B"), (3, "C"), (1_000_003, "D")):
        rows.append(f"{index}\t?\tw\tx\ty\tz\t{answer}\tlogic\t{'i' * 200_000}")
    rows.append("4\t?\tyes\tno\t\t\tB\tlogic\ti")
    (tmp_path / "a.tsv").write_text("\n".join(rows) + "\n")
    texts = {1: "A", 1_000_001: "(B)", 2: "A", 1_000_002: "A", 3: "C", 4: "no"}
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"question_id": id, "text": text}) + "\n" for id, text in texts.items())
    )
    scores = score_file(get_benchmark("mmbench"), tmp_path / "p.jsonl", tmp_path / "a.tsv")
    assert {question.id: question.value for question in scores.questions} == {"1": 1.0, "2": 0.0, "4": 1.0}
    assert scores.missing == 1
    (tmp_path / "a.tsv").write_text("index\tA\tB\tanswer\n1\tx\ty\tC\n")
    with raises_code("invalid-field", file=tmp_path / "a.tsv", record="1 (index 1)", field="answer"):
        score_file(get_benchmark("mmbench"), tmp_path / "p.jsonl", tmp_path / "a.tsv")


def test_score_file_counts_missing_predictions_without_a_score(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({str(n): {"answer": "cat", "imageId": str(n // 2)} for n in range(4)}))
    (tmp_path / "p.jsonl").write_text(
        '{"question_id": "0", "text": "cat"}\n{"question_id": "1", "text": null}\n{"question_id": 2, "text": "dog"}\n'
    )
    scores = score_file(get_benchmark("gqa"), tmp_path / "p.jsonl", tmp_path / "a.json")
    assert [(question.id, question.value) for question in scores.questions] == [("0", 1.0), ("2", 0.0)]
    assert scores.missing == 2


ONE_ANSWER = '{"1": {"answer": "a"}}'


@pytest.mark.parametrize(
    ("name", "annotations", "predictions", "code", "record", "field"),
    [
        ("gqa2", "{}", "", "unknown-name", None, None),
        ("gqa", "[]", "", "invalid-field", None, None),
        ("gqa", '{"1": {"answer": 1}}', "", "invalid-field", '"1"', "answer"),
        ("gqa", ONE_ANSWER, '{"question_id": 2, "text": "a"}', "unknown-name", None, None),
        ("gqa", ONE_ANSWER, '{"question_id": 1}\n{"question_id": "1"}', "duplicate-id", None, None),
        ("vqav2", '{"annotations": [{"question_id": 1}]}', "", "missing-field", 1, "answers"),
        ("vqav2", '{"annotations": [{"question_id": 1, "answers": [1]}]}', "", "invalid-field", '"1"', "answers"),
        ("pope", '{"question_id": 1}', "", "invalid-field", 1, None),
        ("pope", "[", "", "invalid-json", 1, None),
        ("pope", "{", "", "invalid-json", 1, None),
        ("scienceqa", '{"1": {"choices": []}}', "", "invalid-field", '"1"', "answer"),
        ("scienceqa", '{"1": {"answer": 1}}', "", "invalid-field", '"1"', "choices"),
    ],
)
def test_score_file_broken_file_is_an_error(
    name: str, annotations: str, predictions: str, code: str, record: object, field: str | None, tmp_path: Path
) -> None:
    (tmp_path / "a.json").write_text(annotations)
    (tmp_path / "p.jsonl").write_text(predictions)
    with raises_code(code, record=record, field=field) as caught:
        score_file(get_benchmark(name), tmp_path / "p.jsonl", tmp_path / "a.json")
    assert name != "gqa2" or 'did you mean "gqa"' in str(caught.value)


def test_score_file_prediction_without_id_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(ONE_ANSWER)
    (tmp_path / "p.jsonl").write_text('{"text": "a"}')
    with pytest.raises(UserError) as caught:
        score_file(get_benchmark("gqa"), tmp_path / "p.jsonl", tmp_path / "a.json")
    assert "p.jsonl" in str(caught.value)
    assert "1" in str(caught.value).partition("p.jsonl")[2]


def test_score_file_real_pope_files_all_yes(tmp_path: Path) -> None:
    folder = Path(__file__).parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs POPE's annotation files (shared/data), which are not distributed with the project")
    for file in sorted(folder.glob("coco_pope_*.json")):
        entries = [json.loads(line) for line in file.read_text().splitlines()]
        (tmp_path / "p.jsonl").write_text(
            "".join(json.dumps({"question_id": e["question_id"], "text": "Yes"}) + "\n" for e in entries)
        )
        scores = score_file(get_benchmark("pope"), tmp_path / "p.jsonl", file, official=True)
        assert len(scores.questions) == len(entries)
        assert scores.extra_metrics["yes_ratio"] == 1.0
        assert scores.extra_metrics["precision"] == pytest.approx(0.5, abs=0.01)
