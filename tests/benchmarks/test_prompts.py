"""Questions as a model sees them, images inside their root, broken files named."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from benchmark_files import LETTER, SHORT, WRITERS, encoded, mmbench_rows, put_json, put_tsv
from helpers import raises_code
from vlm_unlearn.benchmarks import (
    BENCHMARKS,
    Prediction,
    benchmark_image_root,
    benchmark_prompts,
    get_benchmark,
    load_truths,
    score_predictions,
)
from vlm_unlearn.benchmarks import mmbench as mmbench_module
from vlm_unlearn.config import BenchmarkConfig, Suite
from vlm_unlearn.data.images import open_image, resolve_image
from vlm_unlearn.errors import UserError
from vlm_unlearn.evaluation.prompts import image_roots, prompts_digest, suite_prompts
from vlm_unlearn.records import Prompt

VIZWIZ = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT


def config(name: str, root: Path, **changes: Any) -> BenchmarkConfig:
    fields = {"name": name, **WRITERS[name](root), **changes}
    return Suite.model_validate({"model": "m", "root": root, "benchmarks": [fields]}).benchmarks[0]


def asked(name: str, root: Path, **changes: Any) -> list[Prompt]:
    return benchmark_prompts(config(name, root, **changes))


def test_every_benchmark_is_tried_here() -> None:
    assert WRITERS.keys() == BENCHMARKS.keys()


@pytest.mark.parametrize(
    ("name", "id", "question", "image", "group", "reference"),
    [
        ("vqav2", "3", f"how many in 3 ?{SHORT}", "COCO_val2014_000000000041.jpg", "41", "3"),
        ("textvqa", "1", f"What does 1 say?{SHORT}", "a1.jpg", "a1", "stop"),
        ("vizwiz", "V_1.jpg", f"What is 1?{VIZWIZ}", "V_1.jpg", "V_1.jpg", "cup"),
        ("gqa", "201", f"Is it 1?{SHORT}", "n1.jpg", "n1", "yes"),
        ("scienceqa", "7", f"Context: Count.\nWhich is 2?\nA. 1\nB. 2{LETTER}", "test/7/image.png", "7", "B"),
        ("scienceqa", "8", f"Which is 3?\nA. 3\nB. 4\nC. 5{LETTER}", None, "8", "A"),
        ("pope", "coco_pope_popular/2", f"Is there a 1 in the image?{SHORT}", "p0.jpg", "p0.jpg", "no"),
        ("mmvet", "v1_0", "What is x?", "v1_0.png", "v1_0.png", "-1 <AND> -5"),
    ],
)
def test_a_question_as_the_model_sees_it(
    name: str, id: str, question: str, image: str | None, group: str, reference: str, tmp_path: Path
) -> None:
    prompts = {prompt.id: prompt for prompt in asked(name, tmp_path)}
    found = prompts[f"{name}/{id}"]
    assert (found.question, found.image, found.group_id, found.reference) == (question, image, group, reference)
    assert (found.set, found.kind, found.rewrite) == (name, "safe", 0)


def test_mmbench_asks_every_rotation_about_the_image_it_names(tmp_path: Path) -> None:
    wanted = config("mmbench", tmp_path)
    rotated, first, second = benchmark_prompts(wanted)
    assert rotated.question == f"Which?\nA. y\nB. x{LETTER}"
    assert second.question == f"See.\nAnd?\nA. p\nB. q\nC. r{LETTER}"
    assert [prompt.id for prompt in (rotated, first, second)] == ["mmbench/1000005", "mmbench/5", "mmbench/6"]
    assert (rotated.group_id, first.group_id, rotated.reference, first.reference) == ("5", "5", "B", "A")
    assert rotated.image == first.image != second.image
    root = benchmark_image_root(wanted)
    seen = [open_image(resolve_image(root, prompt.image or "")).getpixel((0, 0)) for prompt in (first, second)]
    assert seen == [(5, 90, 40), (6, 90, 40)]


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_asked_is_what_is_scored(name: str, tmp_path: Path) -> None:
    wanted = config(name, tmp_path)
    truths = load_truths(get_benchmark(name), wanted.annotations, wanted.questions)
    assert [f"{name}/{id}" for id in truths] == [prompt.id for prompt in benchmark_prompts(wanted)]


@pytest.mark.parametrize("name", WRITERS)
def test_a_suite_asks_them_with_their_images(name: str, tmp_path: Path) -> None:
    suite = Suite.model_validate(
        {"model": "m", "root": tmp_path, "benchmarks": [{"name": name, **WRITERS[name](tmp_path)}]}
    )
    prompts, roots = suite_prompts(suite), image_roots(suite)
    assert {prompt.set for prompt in prompts} == {name} == roots.keys()
    assert len(prompts_digest(prompts, roots)) == 64  # it reads every image


def test_the_words_in_the_image_are_told_where_there_is_a_file_of_them(tmp_path: Path) -> None:
    first, second = asked("textvqa", tmp_path, questions="textvqa/ocr.json")
    assert first.question == f"What does 0 say?\nReference OCR token: STOP, here{SHORT}"
    assert second.question == f"What does 1 say?{SHORT}"


def test_a_limit_is_of_questions_with_all_rotations_and_of_each_file(tmp_path: Path) -> None:
    assert [prompt.id for prompt in asked("gqa", tmp_path, limit=2)] == ["gqa/200", "gqa/201"]
    assert [prompt.id for prompt in asked("mmbench", tmp_path, limit=1)] == ["mmbench/1000005", "mmbench/5"]
    assert [prompt.id for prompt in asked("pope", tmp_path, limit=1)] == [
        "pope/coco_pope_random/1",
        "pope/coco_pope_popular/1",
    ]


@pytest.mark.parametrize(
    ("split", "image"),
    [("test-dev2015", "COCO_test2015_000000000007.jpg"), ("val2014", "COCO_val2014_000000000007.jpg")],
)
def test_a_test_split_is_asked_without_answers(split: str, image: str, tmp_path: Path) -> None:
    value = {"data_subtype": split, "questions": [{"question_id": 1, "image_id": 7, "question": "What?"}]}
    file = put_json(tmp_path / "q.json", value)
    prompt = benchmark_prompts(BenchmarkConfig(name="vqav2", annotations=[file]))[0]
    assert (prompt.image, prompt.reference) == (image, None)
    with pytest.raises(UserError, match="has no answers; they are not public"):
        load_truths(get_benchmark("vqav2"), [file], None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vizwiz", [{"image": "../x.png", "question": "?"}]),
        ("gqa", {"1": {"imageId": "../x", "question": "?"}}),
        ("pope", {"question_id": 1, "image": "/etc/passwd", "text": "?", "label": "yes"}),
        ("mmvet", {"1": {"imagename": "..\\x.png", "question": "?", "answer": "a", "capability": []}}),
        ("textvqa", {"data": [{"question_id": 1, "image_id": "../../x", "question": "?"}]}),
        ("scienceqa", {"../..": {"question": "?", "choices": ["a"], "answer": 0, "image": "x.png", "split": "test"}}),
        (
            "scienceqa",
            {"1": {"question": "?", "choices": ["a"], "answer": 0, "image": "../../../x.png", "split": "test"}},
        ),
        ("vqav2", {"data_subtype": "a/../../../b", "questions": [{"question_id": 1, "image_id": 1, "question": "?"}]}),
    ],
)
def test_images_stay_inside_their_root(name: str, value: object, tmp_path: Path) -> None:
    file = put_json(tmp_path / "in" / "a.json", value)
    benchmark = {"name": name, "annotations": file, "images": tmp_path / "in"}
    suite = Suite.model_validate({"model": "m", "benchmarks": [benchmark]})
    with raises_code("image-outside-root"):
        prompts_digest(suite_prompts(suite), image_roots(suite))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("gqa", {"1": {"question": "?"}}, r'question "1": imageId: '),
        ("gqa", {"1": {"imageId": "a", "question": " "}}, r'question "1": question: '),
        ("gqa", {"1": 5}, r'question "1" is not an object'),
        (
            "vqav2",
            {"annotations": [{"question_id": 1, "answers": ["a"]}]},
            "has answers but no questions; pass --questions",
        ),
        ("vqav2", {"questions": [{"question_id": 1, "image_id": 2}]}, 'entry 0 has no "question"'),
        ("textvqa", {"data": [{"question_id": 1, "image_id": "a"}]}, 'entry 0 has no "question"'),
        ("textvqa", [], r'expected \{"data"'),
        ("vizwiz", [{"image": 5, "question": "?"}], 'question "5": image: '),
        ("vizwiz", [{"image": "a", "question": "?", "answers": [1]}], '"answers" must be a list of texts'),
        (
            "scienceqa",
            {"1": {"question": "?", "choices": ["a", "b"], "answer": 2}},
            'problem "1": must have up to 5 "choices"',
        ),
        (
            "scienceqa",
            {"1": {"question": "?", "choices": ["a", 4], "answer": 0}},
            'problem "1": choices: ',
        ),
        ("pope", {"question_id": 1, "label": "yes", "text": "?"}, r'question "1": image: '),
        (
            "mmvet",
            {"v1_0": {"imagename": "a", "question": "?", "capability": []}},
            'question "v1_0": answer: ',
        ),
        (
            "mmvet",
            {"v1_0": {"imagename": "a", "question": "?", "answer": "a"}},
            'question "v1_0": "capability" must be a list',
        ),
        ("mmvet", [], "expected an object"),
    ],
)
def test_broken_records_are_named(name: str, value: object, message: str, tmp_path: Path) -> None:
    file = put_json(tmp_path / "a.json", value)
    with pytest.raises(UserError, match=message):
        benchmark_prompts(BenchmarkConfig(name=name, annotations=[file]))


def test_questions_of_another_split_are_noticed(tmp_path: Path) -> None:
    wanted = config("vqav2", tmp_path)
    put_json(
        tmp_path / "vqav2" / "questions.json", {"questions": [{"question_id": 0, "image_id": 40, "question": "how ?"}]}
    )
    with pytest.raises(UserError, match=r'question "1" of .* is not there; the two must be of one split'):
        benchmark_prompts(wanted)


def test_several_files_are_for_pope_and_have_different_names(tmp_path: Path) -> None:
    one = config("gqa", tmp_path)
    with pytest.raises(UserError, match="gqa: takes one annotation file, 2 were given"):
        benchmark_prompts(one.model_copy(update={"annotations": one.annotations * 2}))
    several = config("pope", tmp_path)
    with pytest.raises(UserError, match="two annotation files have the same name"):
        benchmark_prompts(several.model_copy(update={"annotations": [several.annotations[0]] * 2}))


def test_the_same_question_twice_is_an_error(tmp_path: Path) -> None:
    listed = [{"image": "a.jpg", "question": "?"}] * 2
    with pytest.raises(UserError, match=r'two questions have the id "a\.jpg"'):
        benchmark_prompts(BenchmarkConfig(name="vizwiz", annotations=[put_json(tmp_path / "a.json", listed)]))
    (tmp_path / "p.json").write_text(json.dumps({"question_id": 1, "image": "a", "text": "?", "label": "no"}) + "\n")
    (tmp_path / "p.json").write_text((tmp_path / "p.json").read_text() * 2)
    with pytest.raises(UserError, match='line 2: question "1" is there twice'):
        benchmark_prompts(BenchmarkConfig(name="pope", annotations=[tmp_path / "p.json"]))


def hostile(tmp_path: Path, **changes: Any) -> BenchmarkConfig:
    """MMBench's file with its second row changed."""
    rows = mmbench_rows()
    rows[1] |= changes
    return BenchmarkConfig(name="mmbench", annotations=[put_tsv(tmp_path / "hostile.tsv", rows)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "A" * 400}, r"row 2 \(index 5\): the image is not an image"),
        ({"image": encoded()[:100]}, r"row 2 \(index 5\): the image is (a broken image|not an image)"),
        ({"image": "?" * 400}, r"row 2 \(index 5\): the image is not base64"),
        ({"image": ""}, r'row 2 \(index 5\) must have "question", options from "A" on, and "image"'),
        ({"image": "../../secret.png"}, r"the image of index \d+ is neither base64 nor the index of a row with one"),
        ({"image": "1000005"}, r"neither base64 nor the index of a row with one"),
        ({"index": "../5"}, r'row 2: "index" must be a whole number, found "../5"'),
        ({"index": "²"}, r'row 2: "index" must be a whole number'),
        ({"index": "5" * 5000}, r'row 2: "index" must be a whole number'),
        ({"index": "6"}, r"row 3: the index 6 is there twice"),
        ({"question": ""}, r'row 2 \(index 5\) must have "question"'),
        ({"question": "a\0b"}, r"row 2"),
    ],
)
def test_hostile_mmbench_rows_are_named(changes: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        benchmark_prompts(hostile(tmp_path, **changes))


def test_an_image_too_large_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_UNLEARN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mmbench_module, "LONGEST_IMAGE", 5000)
    with pytest.raises(UserError, match=r"row 2: is not tab-separated text \(field larger than field limit"):
        benchmark_prompts(hostile(tmp_path, image="A" * 6000))
    monkeypatch.undo()
    monkeypatch.setenv("VLM_UNLEARN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("vlm_unlearn.data.images.MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"row 2 \(index 5\): the image has 32 x 32 pixels, more than 1000"):
        benchmark_prompts(hostile(tmp_path))
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]


def test_mmbench_images_are_kept_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_UNLEARN_CACHE", str(tmp_path / "cache"))
    first = asked("mmbench", tmp_path)[1]
    kept = tmp_path / "cache" / "mmbench" / (first.image or "")
    kept.touch()
    written = kept.stat().st_mtime_ns
    assert asked("mmbench", tmp_path)[1] == first
    assert kept.stat().st_mtime_ns == written  # not unpacked again
    other = benchmark_prompts(hostile(tmp_path, image=encoded(77)))[1]
    assert other.image != first.image  # the same index, another picture


def test_mmbench_test_files_have_no_answers(tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != "answer"} for row in mmbench_rows()]
    file = put_tsv(tmp_path / "test.tsv", rows)
    assert [prompt.reference for prompt in benchmark_prompts(BenchmarkConfig(name="mmbench", annotations=[file]))] == [
        None
    ] * 3
    with pytest.raises(UserError, match="has no answers"):
        load_truths(get_benchmark("mmbench"), [file], None)


def spoiled(value: Any, generator: random.Random) -> Any:
    """The value with one place in it, at any depth, gone or replaced by something that should not be there."""
    junk = (None, True, -1, 1.5, "", "\ud800", "\0", "../a", [], ["a"], {}, {"a": 1}, 10**30, "²")
    if not isinstance(value, dict | list) or not value or generator.random() < 0.1:
        return generator.choice(junk)
    place = generator.choice(list(value)) if isinstance(value, dict) else generator.randrange(len(value))
    if isinstance(value, dict) and generator.random() < 0.2:
        return {key: kept for key, kept in value.items() if key != place}
    changed = spoiled(value[place], generator)
    return {**value, place: changed} if isinstance(value, dict) else [*value[:place], changed, *value[place + 1 :]]


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "mmbench"])
def test_spoiled_files_are_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    generator = random.Random(name)
    refused = []
    for _ in range(120):
        wanted = config(name, tmp_path)
        file = generator.choice([*wanted.annotations, *([wanted.questions] if wanted.questions else [])])
        value = [json.loads(line) for line in file.read_text().splitlines()]
        changed = spoiled(value if name == "pope" else value[0], generator)
        lines = changed if name == "pope" and isinstance(changed, list) else [changed]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        try:
            prompts = benchmark_prompts(wanted)
            truths = load_truths(get_benchmark(name), wanted.annotations, wanted.questions)
            score_predictions(
                get_benchmark(name),
                truths,
                {id: Prediction(question_id=id, text="A", score=0.5) for id in truths},
                official=False,
            )
        except UserError as error:
            refused.append(str(error))
        else:
            assert all(prompt.question.encode() for prompt in prompts)
    assert 10 < len(refused) < 120
    assert all(message.isprintable() for message in refused)
