"""The benchmarks whose scripts are in Safety Mirage's repository: scores by hand, official files, and broken files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmark_files import WRITERS, put_json, put_lines, put_text
from helpers import raises_code, run_in_process
from stub_server import stub_server
from vlm_unlearn.benchmarks import get_benchmark, score_file
from vlm_unlearn.benchmarks.mme import COGNITION, PERCEPTION
from vlm_unlearn.config import Suite
from vlm_unlearn.evaluation.benchmarks import run_benchmark
from vlm_unlearn.evaluation.runner import evaluate_run

NAMES = ("mme", "seedbench", "mmbench_cn", "llava_bench", "qbench", "qbench_zh")


def command_score(name: str, root: Path, lines: list[dict[str, Any]], *options: str) -> dict[str, Any]:
    """Returns the JSON document of ``benchmark score`` on the fixture's annotations."""
    annotations = root / WRITERS[name](root)["annotations"]
    put_lines(root / "p.jsonl", lines)
    files = ("--predictions", root / "p.jsonl", "--annotations", annotations)
    done = run_in_process("benchmark", "score", name, *files, *options, "--json")
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def parts(document: dict[str, Any]) -> dict[str, float]:
    return {name: rate["value"] for name, rate in document["parts"].items()}


# LLaVA's answer files have the same id for both questions of an image.
MME_ANSWERS = [
    ("count/a.jpg", "Are there 2 of a?", "Yes"),
    ("count/a.jpg", "Are there 9 of a?", "No."),
    ("count/b.jpg", "Are there 2 of b?", "Yes"),
    ("count/b.jpg", "Are there 9 of b?", "Yes"),
    ("scene/images/c.jpg", "Is it a kite?", "It is not a kite."),
    ("scene/images/c.jpg", "Is it a kite on a hill?", "Yes"),
]


def mme_lines(answers: list[tuple[str, str, str]] = MME_ANSWERS) -> list[dict[str, Any]]:
    suffix = "\nAnswer the question using a single word or phrase."
    return [{"question_id": id, "prompt": f"{question}{suffix}", "text": text} for id, question, text in answers]


def test_mme_equals_the_values_by_hand(tmp_path: Path) -> None:
    """Count: 3 of 4 answers, 1 of 2 images. Scene: 2 of 2 answers, 1 of 1 images.

    The headline is the mean of (3/4 + 1/2) / 2 and (1 + 1) / 2, which is (0.625 + 1) / 2 = 0.8125.
    """
    scored = command_score("mme", tmp_path, mme_lines())
    assert (scored["score"], scored["n"], scored["missing"]) == (pytest.approx(5 / 6), 6, 0)
    assert parts(scored) == {"count": 0.75, "scene": 1.0}
    assert (scored["count accuracy+"], scored["scene accuracy+"]) == (0.5, 1.0)
    assert scored["headline"]["value"] == pytest.approx(0.8125)
    assert "perception" not in scored  # never the sum of fewer categories


def test_mme_official_reads_the_first_four_characters(tmp_path: Path) -> None:
    """ "It i" is neither yes nor no. Scene: 1 of 2 answers, 0 of 1 images. Headline: (0.625 + 0.25) / 2 = 0.4375."""
    scored = command_score("mme", tmp_path, mme_lines(), "--official")
    assert (parts(scored)["scene"], scored["scene accuracy+"], scored["unparsed"]) == (0.5, 0.0, 1)
    assert scored["headline"]["value"] == pytest.approx(0.4375)


@pytest.mark.parametrize(
    ("text", "official", "corrected"),
    [
        ("yes", "yes", "yes"),
        ("NO\n", "no", "no"),
        ("Not a kite.", "no", "no"),
        ("I know", None, None),  # "i kn"
        ("Know", "no", None),
        ("Answer: Yes", None, "yes"),
        ("<think>no</think>Yes", None, "yes"),
        ("", None, None),
    ],
)
def test_mme_reads_answers(text: str, official: str | None, corrected: str | None) -> None:
    for is_official, answer in ((True, official), (False, corrected)):
        truths = {label: {"answer": label, "image": "i", "category": "count"} for label in ("yes", "no")}
        scores = [get_benchmark("mme").score_answer("i", truth, text, is_official) for truth in truths.values()]
        assert [score.value for score in scores] == [float(answer == "yes"), float(answer == "no")]
        assert scores[0].unparsed == (answer is None)


def test_mme_sums_the_points_of_all_categories(tmp_path: Path) -> None:
    """Perception: 10 categories with 100 + 100 points. Cognition: 4 with one of two answers right, 50 + 0 points.

    The headline is (10 * 200 + 4 * 50) / 2800.
    """
    lines = []
    for category in (*PERCEPTION, *COGNITION):
        put_text(tmp_path / "mme" / "MME_Benchmark" / category / "1.txt", "Red?\tYes\nBlue?\tNo\n")
        answers = ("Yes", "No") if category in PERCEPTION else ("Yes", "Yes")
        lines += [{"question_id": f"{category}/1/{n}", "text": text} for n, text in enumerate(answers, start=1)]
    put_lines(tmp_path / "p.jsonl", lines)
    done = run_in_process(
        *("benchmark", "score", "mme", "--predictions", tmp_path / "p.jsonl", "--annotations", tmp_path / "mme")
    )
    assert done.returncode == 0, done.stderr
    assert "points of all categories 78.57 %" in done.stdout
    assert "perception: 2000.00\n" in done.stdout
    assert "cognition: 200.00\n" in done.stdout


def test_mme_without_an_answer_to_every_category_has_no_headline(tmp_path: Path) -> None:
    scored = command_score("mme", tmp_path, mme_lines(MME_ANSWERS[:4]))
    assert (scored["headline"]["value"], scored["missing"]) == (None, 2)


def test_mme_prompts_have_llavas_wording_and_the_images_of_both_layouts(tmp_path: Path) -> None:
    files = WRITERS["mme"](tmp_path)
    questions = get_benchmark("mme").read_questions(tmp_path / files["annotations"], None)
    by_id = {question.id: question for question in questions}
    assert list(by_id) == [f"{image}/{n}" for image in ("count/a", "count/b", "scene/c") for n in (1, 2)]
    assert by_id["count/b/2"].text == "Are there 9 of b?\nAnswer the question using a single word or phrase."
    assert [by_id[id].image for id in ("count/a/1", "scene/c/2")] == ["count/a.jpg", "scene/images/c.jpg"]
    assert (by_id["scene/c/1"].reference, by_id["scene/c/1"].cluster, by_id["scene/c/1"].category) == (
        *("No", "scene/c", "scene"),
    )
    limited = get_benchmark("mme").read_questions(tmp_path / files["annotations"], None, 1)
    assert [question.cluster for question in limited] == ["count/a", "count/a", "scene/c", "scene/c"]


SEED_ANSWERS = [
    {"question_id": 101, "text": "B"},
    {"question_id": "102", "text": "D. 4 kites"},
    {"question_id": "v9", "text": "C"},
]


def test_seedbench_equals_the_values_by_hand(tmp_path: Path) -> None:
    """Right are B and "D. 4 kites", which LLaVA's evaluation takes as wrong, because it is more than the letter."""
    scored = command_score("seedbench", tmp_path, SEED_ANSWERS)
    assert scored["score"] == pytest.approx(2 / 3)
    types = {"Instances Counting": 1.0, "Scene Understanding": 1.0, "Action Recognition": 0.0}
    assert parts(scored) == {**types, "image": 1.0, "video": 0.0}
    official = command_score("seedbench", tmp_path, SEED_ANSWERS, "--official")
    assert official["score"] == pytest.approx(1 / 3)
    assert parts(official) == {**types, "Scene Understanding": 0.0, "image": 0.5, "video": 0.0}


def test_seedbench_prompts_have_llavas_wording_and_image_names(tmp_path: Path) -> None:
    files = WRITERS["seedbench"](tmp_path)
    questions = get_benchmark("seedbench").read_questions(tmp_path / files["annotations"], None)
    letter = "Answer with the option's letter from the given choices directly."
    assert questions[0].text == f"How many in 0?\nA. 1 kites\nB. 2 kites\nC. 3 kites\nD. 4 kites\n{letter}"
    assert [question.image for question in questions] == [
        *("SEED-Bench-image/11_22", "SEED-Bench-image/33_44", "SEED-Bench-video-image/10_v9.png"),
    ]


def test_mmbench_cn_counts_questions_right_in_every_rotation(tmp_path: Path) -> None:
    """The right option is A in one order and B in the other."""
    right = [{"question_id": 7, "text": "答案是A"}, {"question_id": 1_000_007, "text": "选项B"}]
    scored = command_score("mmbench_cn", tmp_path, right)
    assert (scored["score"], scored["n"], parts(scored)) == (1.0, 1, {"logic": 1.0})
    by_words = [{"question_id": 7, "text": "红色。"}, {"question_id": 1_000_007, "text": "正确选项是B"}]
    assert command_score("mmbench_cn", tmp_path, by_words, "--official")["score"] == 1.0
    same_letter = [{"question_id": 7, "text": "A"}, {"question_id": 1_000_007, "text": "A"}]
    assert command_score("mmbench_cn", tmp_path, same_letter)["score"] == 0.0


def test_mmbench_cn_prompt_ends_with_llavas_chinese_line(tmp_path: Path) -> None:
    files = WRITERS["mmbench_cn"](tmp_path)
    questions = get_benchmark("mmbench_cn").read_questions(tmp_path / files["annotations"], None)
    assert questions[0].text == "哪一个?\nA. 红色\nB. 蓝色\n请直接回答选项字母。"
    assert "Answer" not in questions[1].text
    english = get_benchmark("mmbench").read_questions(tmp_path / files["annotations"], None)
    assert english[0].text.endswith("directly.")


def reviews(*pairs: list[float]) -> list[dict[str, Any]]:
    """Returns lines as LLaVA's review script writes them."""
    return [
        {"id": n + 1, "question_id": n, "category": "llava_bench_x", "content": "8 6\nGood.", "tuple": pair}
        for n, pair in enumerate(pairs)
    ]


def test_llava_bench_equals_the_values_by_hand(tmp_path: Path) -> None:
    """The answers have 6 + 5 + 9 = 20 points and the references 8 + 10 + 9 = 27. The mean of the answers is 20/30."""
    scored = command_score("llava_bench", tmp_path, reviews([8, 6], [10.0, 5.0], [9, 9]))
    assert scored["headline"]["value"] == scored["relative"] == pytest.approx(20 / 27)
    assert (scored["score"], scored["answer score"], scored["reference score"]) == pytest.approx((2 / 3, 2 / 3, 0.9))
    relative = {name: scored[f"{name} relative"] for name in ("conv", "detail", "complex")}
    assert relative == pytest.approx({"conv": 0.75, "detail": 0.5, "complex": 1.0})
    assert parts(scored) == pytest.approx({"conv": 0.6, "detail": 0.5, "complex": 0.9})


def test_llava_bench_official_counts_an_unread_review_as_minus_one(tmp_path: Path) -> None:
    """Official: (-1 + 5 + 9) / (-1 + 10 + 9) = 13/18. Without the unread review: 14/19."""
    lines = reviews([-1, -1], [10, 5], [9, 9])
    official = command_score("llava_bench", tmp_path, lines, "--official")
    assert (official["headline"]["value"], official["missing"]) == (pytest.approx(13 / 18), 0)
    corrected = command_score("llava_bench", tmp_path, lines)
    assert (corrected["headline"]["value"], corrected["missing"]) == (pytest.approx(14 / 19), 1)


def test_llava_bench_better_than_the_reference_is_reported_as_1(tmp_path: Path) -> None:
    """Answers of 10 + 10 + 10 points, references of 8 each: 1.25."""
    scored = command_score("llava_bench", tmp_path, reviews([8, 10], [8, 10], [8, 10]))
    assert (scored["headline"]["value"], scored["relative"]) == (1.0, 1.25)


def test_llava_bench_uses_the_verdicts_of_a_judge(tmp_path: Path) -> None:
    lines = [
        {"prompt_id": f"llava_bench/{n}", "judge": "j", "score": 0.5, "numbers": {"reference": 8, "answer": answer}}
        for n, answer in enumerate((4, 8, 6))
    ]
    scored = command_score("llava_bench", tmp_path, lines)
    assert scored["headline"]["value"] == pytest.approx(18 / 24)


def test_llava_bench_takes_a_single_score_as_relative_to_the_reference(tmp_path: Path) -> None:
    lines = [{"question_id": n, "score": score} for n, score in enumerate((0.2, 0.6, 1.0))]
    scored = command_score("llava_bench", tmp_path, lines)
    assert scored["headline"]["value"] == scored["score"] == pytest.approx(0.6)


def test_llava_bench_runs_with_a_judge(tiny_model: Path, tmp_path: Path) -> None:
    """The judge gets the description, the reference and the answer. One reply has no number for the answer."""
    replies = {"0": "Reference: 8\nAnswer: 2", "1": "Reference: 10\nAnswer: 7", "2": "Reference: 8"}

    def reply(text: str) -> str:
        assert "A kite over hill" in text
        assert "A kite." in text
        return next(reply for number, reply in replies.items() if f"What flies in {number}?" in text)

    with stub_server(reply) as stub:
        judge = {"name": "llm", "rubric": "llava_bench", "model": "j", "server": stub.url, "cache": False}
        suite = Suite.model_validate(
            {
                "model": str(tiny_model),
                "root": tmp_path,
                "benchmarks": [{"name": "llava_bench", **WRITERS["llava_bench"](tmp_path), "judge": "lb"}],
                "judges": {"lb": judge},
                "generation": {"max_new_tokens": 3},
            }
        )
        row = evaluate_run(suite, tmp_path / "run", "random")
    rate = row.metrics["llava_bench"]
    assert (rate.value, rate.n, rate.failed) == (pytest.approx(9 / 18), 2, 1)
    verdicts = next((tmp_path / "run").glob("verdicts-*.jsonl"))
    scored = score_file(get_benchmark("llava_bench"), verdicts, tmp_path / "llava_bench" / "questions.jsonl")
    assert scored.extra_metrics["relative"] == pytest.approx(9 / 18)


QBENCH_ANSWERS = [
    {"img_path": "k1.jpg", "question": "Is the kite sharp?", "response": "A or B"},
    {"img_path": "k2.jpg", "question": "Is the kite sharp?", "response": "Low"},
]


def test_qbench_equals_the_values_by_hand(tmp_path: Path) -> None:
    """Right are B of the first question and A, "Low", of the second.

    Officially, "A or B" contains the right letter, and "Low" does not.
    """
    scored = command_score("qbench", tmp_path, QBENCH_ANSWERS)
    assert (scored["score"], scored["unparsed"]) == (0.5, 1)
    assert parts(scored) == {"yes-or-no": 0.0, "distortion": 0.0, "how": 1.0, "in-context other": 1.0}
    official = command_score("qbench", tmp_path, QBENCH_ANSWERS, "--official")
    assert (official["score"], official["unparsed"]) == (0.5, 0)
    assert parts(official) == {"yes-or-no": 1.0, "distortion": 1.0, "how": 0.0, "in-context other": 0.0}


def test_qbench_reads_answers_without_line_breaks_between_them(tmp_path: Path) -> None:
    """LLaVA's script writes the complete records of the questions, one after the other."""
    annotations = tmp_path / WRITERS["qbench"](tmp_path)["annotations"]
    answers = [
        {**entry, "response": text} for entry, text in zip(json.loads(annotations.read_text()), "BA", strict=True)
    ]
    put_text(tmp_path / "p.jsonl", "".join(map(json.dumps, answers)))
    scores = score_file(get_benchmark("qbench"), tmp_path / "p.jsonl", annotations)
    assert [score.value for score in scores.questions] == [1.0, 1.0]
    put_text(tmp_path / "p.jsonl", "".join(map(json.dumps, answers)) + "x")
    with raises_code("invalid-json", file=tmp_path / "p.jsonl", record=1):
        score_file(get_benchmark("qbench"), tmp_path / "p.jsonl", annotations)


def test_qbench_prompts_have_llavas_wording(tmp_path: Path) -> None:
    texts = {}
    for name in ("qbench", "qbench_zh"):
        files = WRITERS[name](tmp_path)
        texts[name] = get_benchmark(name).read_questions(tmp_path / files["annotations"], None)[0].text
    assert texts["qbench"] == "Is the kite sharp?\nChoose between one of the options as follows:\nA. Yes\nB. No"
    assert texts["qbench_zh"] == "风筝清晰吗?\n在下列选项中选择一个:\nA. 是\nB. 否"


@pytest.mark.parametrize("name", ["qbench", "seedbench"])
def test_test_split_without_answers_runs_and_writes_a_submission(name: str, tiny_model: Path, tmp_path: Path) -> None:
    files = WRITERS[name](tmp_path)
    value = json.loads((tmp_path / files["annotations"]).read_text())
    for entry in value["questions"] if name == "seedbench" else value:
        entry.pop("answer", None)
        entry.pop("correct_ans", None)
    put_json(tmp_path / files["annotations"], value)
    suite = Suite.model_validate(
        {
            "model": str(tiny_model),
            "root": tmp_path,
            "benchmarks": [{"name": name, **files}],
            "generation": {"max_new_tokens": 2},
        }
    )
    done = run_benchmark(suite, tmp_path / "run", "random")
    assert done.scores is None
    assert "not public" in done.unscored_reason
    if name == "qbench":
        assert done.submission is not None
        assert [entry["img_path"] for entry in json.loads(done.submission.read_text())] == ["k1.jpg", "k2.jpg"]


@pytest.mark.parametrize("name", ["mme", "seedbench", "mmbench_cn", "qbench"])
def test_run_benchmark_asks_every_question_and_scores_it(name: str, tiny_model: Path, tmp_path: Path) -> None:
    suite = Suite.model_validate(
        {
            "model": str(tiny_model),
            "root": tmp_path,
            "benchmarks": [{"name": name, **WRITERS[name](tmp_path)}],
            "generation": {"max_new_tokens": 2},
        }
    )
    done = run_benchmark(suite, tmp_path / "run", "random")
    assert done.scores is not None
    assert done.scores.missing == 0
    assert done.scores.questions


def edited(file: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(file.read_text())
    put_json(file, change(value) or value)


@pytest.mark.parametrize(
    ("name", "change", "code", "field"),
    [
        ("seedbench", lambda value: value.pop("question_type"), "invalid-field", None),
        ("seedbench", lambda value: value["questions"][0].update(answer="E"), "invalid-field", "answer"),
        ("seedbench", lambda value: value["questions"][0].pop("choice_c"), "missing-field", "choice_c"),
        ("seedbench", lambda value: value["questions"][0].update(data_type="sound"), "invalid-field", "data_type"),
        ("seedbench", lambda value: value["questions"][1].update(question_id=101), "duplicate-id", "question_id"),
        ("qbench", lambda value: {"a": 1}, "invalid-field", None),
        ("qbench", lambda value: value[0].update(correct_ans="Maybe"), "invalid-field", "correct_ans"),
        ("qbench", lambda value: value[0].pop("correct_ans") and None, "invalid-field", "correct_ans"),
        ("qbench", lambda value: value[0].update(candidates=["Yes"]), "invalid-field", "candidates"),
        ("qbench", lambda value: value[0].update(candidates=["No", "No"]), "invalid-field", "candidates"),
        ("qbench", lambda value: value[1].update(img_path="k1.jpg"), "duplicate-id", "img_path"),
    ],
)
def test_broken_annotations_are_one_error(
    name: str, change: Callable[[Any], Any], code: str, field: str | None, tmp_path: Path
) -> None:
    annotations = tmp_path / WRITERS[name](tmp_path)["annotations"]
    edited(annotations, lambda value: result if isinstance(result := change(value), dict) and "a" in result else None)
    put_text(tmp_path / "p.jsonl", "")
    with raises_code(code, file=annotations, **({} if field is None else {"field": field})):
        score_file(get_benchmark(name), tmp_path / "p.jsonl", annotations)


@pytest.mark.parametrize(
    ("text", "record"),
    [("Red?\tYes\n", None), ("Red?\tYes\nBlue? No\n", 2), ("Red?\tYes\nBlue?\tMaybe\n", 2), ("", None)],
)
def test_mme_broken_question_file_is_one_error(text: str, record: int | None, tmp_path: Path) -> None:
    folder = tmp_path / WRITERS["mme"](tmp_path)["annotations"]
    file = put_text(folder / "count" / "a.txt", text)
    put_text(tmp_path / "p.jsonl", "")
    with raises_code("invalid-field", file=file, record=record):
        score_file(get_benchmark("mme"), tmp_path / "p.jsonl", folder)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"\xff\tYes\nBlue?\tNo\n", "invalid-encoding"),
        (b"R\0d?\tYes\nBlue?\tNo\n", "invalid-encoding"),
        (b"\tYes\nB?\tNo", "empty-field"),
    ],
)
def test_mme_question_that_cannot_be_asked_is_one_error(content: bytes, code: str, tmp_path: Path) -> None:
    folder = tmp_path / WRITERS["mme"](tmp_path)["annotations"]
    (folder / "count" / "a.txt").write_bytes(content)
    with raises_code(code, file=folder / "count" / "a.txt"):
        get_benchmark("mme").read_questions(folder, None)


def test_mme_wrong_folder_and_wrong_question_are_errors(tmp_path: Path) -> None:
    put_text(tmp_path / "p.jsonl", "")
    with raises_code("not-a-folder", file=tmp_path / "gone"):
        score_file(get_benchmark("mme"), tmp_path / "p.jsonl", tmp_path / "gone")
    folder = tmp_path / WRITERS["mme"](tmp_path)["annotations"]
    put_lines(tmp_path / "p.jsonl", mme_lines([("count/a.jpg", "Is it red?", "Yes")]))
    with raises_code("unknown-name", file=tmp_path / "p.jsonl"):
        score_file(get_benchmark("mme"), tmp_path / "p.jsonl", folder)
    put_lines(tmp_path / "p.jsonl", mme_lines(MME_ANSWERS[:1] * 2))
    with raises_code("duplicate-id", file=tmp_path / "p.jsonl"):
        score_file(get_benchmark("mme"), tmp_path / "p.jsonl", folder)


@pytest.mark.parametrize(
    ("line", "code", "field"),
    [
        ({"question_id": 0, "text": "A kite."}, "missing-field", "score"),
        ({"question_id": 0, "tuple": [8]}, "invalid-field", "tuple"),
        ({"question_id": 0, "tuple": [8, 11]}, "invalid-field", "tuple"),
        ({"question_id": 0, "score": 7}, "invalid-field", "score"),
        ({"question_id": 0, "score": "good"}, "invalid-field", "score"),
        ({"question_id": 0, "tuple": [8, True]}, "invalid-field", "tuple"),
        ({"question_id": 0, "numbers": {"answer": 3}}, "invalid-field", "numbers"),
        ({"question_id": 9, "tuple": [8, 8]}, "unknown-name", None),
    ],
)
def test_llava_bench_without_valid_scores_is_an_error(
    line: dict[str, Any], code: str, field: str | None, tmp_path: Path
) -> None:
    annotations = tmp_path / WRITERS["llava_bench"](tmp_path)["annotations"]
    put_lines(tmp_path / "p.jsonl", [line])
    with raises_code(code, field=field):
        score_file(get_benchmark("llava_bench"), tmp_path / "p.jsonl", annotations)


def test_llava_bench_files_that_do_not_belong_together_are_errors(tmp_path: Path) -> None:
    files = WRITERS["llava_bench"](tmp_path)
    benchmark = get_benchmark("llava_bench")
    annotations, references = (tmp_path / files[name] for name in ("annotations", "questions"))
    with raises_code("missing-setting", field="questions"):
        benchmark.read_questions(annotations, None)
    put_lines(references, [{"question_id": 0, "text": "A kite."}])
    with raises_code("run-mismatch", file=annotations, field="question_id"):
        benchmark.read_questions(annotations, references)
    WRITERS["llava_bench"](tmp_path)
    put_lines(tmp_path / "llava_bench" / "context.jsonl", [{"image": "001.jpg", "caption": ["One.", "Two."]}])
    with raises_code("run-mismatch", file=annotations, field="image"):
        benchmark.read_questions(annotations, references)
    assert "One.\nTwo." in str(benchmark.read_questions(annotations, references, 2)[0].reference)
    (tmp_path / "llava_bench" / "context.jsonl").unlink()
    with raises_code("file-not-found", file=tmp_path / "llava_bench" / "context.jsonl"):
        benchmark.read_questions(annotations, references)


@pytest.mark.parametrize("name", NAMES)
def test_benchmark_is_listed_with_its_files(name: str) -> None:
    benchmark = get_benchmark(name)
    assert benchmark.annotation_file
    assert benchmark.image_folder
    assert bool(benchmark.question_file) == benchmark.needs_judge
