"""Questions of the benchmarks as a model gets them, image paths, and errors for broken official files."""

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
    AnswersNotPublicError,
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


def read_prompts(name: str, root: Path, **changes: Any) -> list[Prompt]:
    return benchmark_prompts(config(name, root, **changes))


def test_every_benchmark_has_test_files() -> None:
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
def test_benchmark_prompts_question_has_image_group_and_reference(
    name: str, id: str, question: str, image: str | None, group: str, reference: str, tmp_path: Path
) -> None:
    prompts = {prompt.id: prompt for prompt in read_prompts(name, tmp_path)}
    prompt = prompts[f"{name}/{id}"]
    assert (prompt.question, prompt.image, prompt.group_id, prompt.reference) == (question, image, group, reference)
    assert (prompt.set, prompt.kind, prompt.rewrite) == (name, "safe", 0)


def test_mmbench_prompts_have_every_rotation_with_its_image(tmp_path: Path) -> None:
    benchmark_config = config("mmbench", tmp_path)
    rotated, first, second = benchmark_prompts(benchmark_config)
    assert rotated.question == f"Which?\nA. y\nB. x{LETTER}"
    assert second.question == f"See.\nAnd?\nA. p\nB. q\nC. r{LETTER}"
    assert [prompt.id for prompt in (rotated, first, second)] == ["mmbench/1000005", "mmbench/5", "mmbench/6"]
    assert (rotated.group_id, first.group_id, rotated.reference, first.reference) == ("5", "5", "B", "A")
    assert rotated.image == first.image != second.image
    root = benchmark_image_root(benchmark_config)
    colors = [open_image(resolve_image(root, prompt.image or "")).getpixel((0, 0)) for prompt in (first, second)]
    assert colors == [(5, 90, 40), (6, 90, 40)]


@pytest.mark.parametrize("name", WRITERS)
def test_benchmark_prompts_and_load_truths_have_the_same_ids(name: str, tmp_path: Path) -> None:
    benchmark_config = config(name, tmp_path)
    truths = load_truths(get_benchmark(name), benchmark_config.annotations, benchmark_config.questions)
    assert [f"{name}/{id}" for id in truths] == [prompt.id for prompt in benchmark_prompts(benchmark_config)]


@pytest.mark.parametrize("name", WRITERS)
def test_suite_prompts_of_a_benchmark_have_existing_images(name: str, tmp_path: Path) -> None:
    suite = Suite.model_validate(
        {"model": "m", "root": tmp_path, "benchmarks": [{"name": name, **WRITERS[name](tmp_path)}]}
    )
    prompts, roots = suite_prompts(suite), image_roots(suite)
    assert {prompt.set for prompt in prompts} == {name} == roots.keys()
    assert len(prompts_digest(prompts, roots)) == 64  # the digest reads every image


def test_textvqa_with_ocr_file_adds_the_words_in_the_image(tmp_path: Path) -> None:
    first, second = read_prompts("textvqa", tmp_path, questions="textvqa/ocr.json")
    assert first.question == f"What does 0 say?\nReference OCR token: STOP, here{SHORT}"
    assert second.question == f"What does 1 say?{SHORT}"


def test_limit_counts_questions_with_all_rotations_and_each_file(tmp_path: Path) -> None:
    assert [prompt.id for prompt in read_prompts("gqa", tmp_path, limit=2)] == ["gqa/200", "gqa/201"]
    assert [prompt.id for prompt in read_prompts("mmbench", tmp_path, limit=1)] == ["mmbench/1000005", "mmbench/5"]
    assert [prompt.id for prompt in read_prompts("pope", tmp_path, limit=1)] == [
        "pope/coco_pope_random/1",
        "pope/coco_pope_popular/1",
    ]


@pytest.mark.parametrize(
    ("split", "image"),
    [("test-dev2015", "COCO_test2015_000000000007.jpg"), ("val2014", "COCO_val2014_000000000007.jpg")],
)
def test_vqav2_test_split_has_prompts_but_no_truths(split: str, image: str, tmp_path: Path) -> None:
    value = {"data_subtype": split, "questions": [{"question_id": 1, "image_id": 7, "question": "What?"}]}
    file = put_json(tmp_path / "q.json", value)
    prompt = benchmark_prompts(BenchmarkConfig(name="vqav2", annotations=[file]))[0]
    assert (prompt.image, prompt.reference) == (image, None)
    with raises_code("answers-not-public", AnswersNotPublicError, file=file):
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
def test_image_outside_the_image_root_is_an_error(name: str, value: object, tmp_path: Path) -> None:
    file = put_json(tmp_path / "in" / "a.json", value)
    benchmark = {"name": name, "annotations": file, "images": tmp_path / "in"}
    suite = Suite.model_validate({"model": "m", "benchmarks": [benchmark]})
    with raises_code("image-outside-root"):
        prompts_digest(suite_prompts(suite), image_roots(suite))


@pytest.mark.parametrize(
    ("name", "value", "code", "record", "field"),
    [
        ("gqa", {"1": {"question": "?"}}, "missing-field", '"1"', "imageId"),
        ("gqa", {"1": {"imageId": "a", "question": " "}}, "empty-field", '"1"', "question"),
        ("gqa", {"1": 5}, "invalid-field", '"1"', None),
        ("vqav2", {"annotations": [{"question_id": 1, "answers": ["a"]}]}, "missing-setting", None, None),
        ("vqav2", {"questions": [{"question_id": 1, "image_id": 2}]}, "missing-field", 1, "question"),
        ("textvqa", {"data": [{"question_id": 1, "image_id": "a"}]}, "missing-field", 1, "question"),
        ("textvqa", [], "invalid-field", None, None),
        ("vizwiz", [{"image": 5, "question": "?"}], "invalid-field", '"5"', "image"),
        ("vizwiz", [{"image": "a", "question": "?", "answers": [1]}], "invalid-field", '"a"', "answers"),
        ("scienceqa", {"1": {"question": "?", "choices": ["a", "b"], "answer": 2}}, "invalid-field", '"1"', "answer"),
        ("scienceqa", {"1": {"question": "?", "choices": ["a"] * 6, "answer": 2}}, "invalid-field", '"1"', "choices"),
        ("scienceqa", {"1": {"question": "?", "choices": ["a", 4], "answer": 0}}, "invalid-field", '"1"', "choices"),
        ("pope", {"question_id": 1, "label": "yes", "text": "?"}, "missing-field", '"1"', "image"),
        ("mmvet", {"v1_0": {"imagename": "a", "question": "?", "capability": []}}, "missing-field", '"v1_0"', "answer"),
        ("mmvet", {"v1_0": {"imagename": "a", "question": "?"}}, "invalid-field", '"v1_0"', "capability"),
        ("mmvet", [], "invalid-field", None, None),
    ],
)
def test_benchmark_prompts_broken_record_is_an_error(
    name: str, value: object, code: str, record: str | int | None, field: str | None, tmp_path: Path
) -> None:
    file = put_json(tmp_path / "a.json", value)
    with raises_code(code, file=file, record=record, field=field):
        benchmark_prompts(BenchmarkConfig(name=name, annotations=[file]))


def test_vqav2_files_of_two_splits_are_an_error(tmp_path: Path) -> None:
    benchmark_config = config("vqav2", tmp_path)
    put_json(
        tmp_path / "vqav2" / "questions.json", {"questions": [{"question_id": 0, "image_id": 40, "question": "how ?"}]}
    )
    with raises_code("run-mismatch", file=tmp_path / "vqav2" / "questions.json") as caught:
        benchmark_prompts(benchmark_config)
    assert '"1"' in str(caught.value)


def test_several_annotation_files_need_pope_and_different_names(tmp_path: Path) -> None:
    gqa = config("gqa", tmp_path)
    with raises_code("conflicting-settings", field="annotations"):
        benchmark_prompts(gqa.model_copy(update={"annotations": gqa.annotations * 2}))
    pope = config("pope", tmp_path)
    with raises_code("duplicate-key", field="annotations"):
        benchmark_prompts(pope.model_copy(update={"annotations": [pope.annotations[0]] * 2}))


def test_benchmark_prompts_duplicate_question_is_an_error(tmp_path: Path) -> None:
    vizwiz = put_json(tmp_path / "a.json", [{"image": "a.jpg", "question": "?"}] * 2)
    with raises_code("duplicate-id", file=vizwiz) as caught:
        benchmark_prompts(BenchmarkConfig(name="vizwiz", annotations=[vizwiz]))
    assert '"a.jpg"' in str(caught.value)
    pope = tmp_path / "p.json"
    pope.write_text((json.dumps({"question_id": 1, "image": "a", "text": "?", "label": "no"}) + "\n") * 2)
    with raises_code("duplicate-id", file=pope, record=2) as caught:
        benchmark_prompts(BenchmarkConfig(name="pope", annotations=[pope]))
    assert '"1"' in str(caught.value)


def hostile(tmp_path: Path, **changes: Any) -> BenchmarkConfig:
    """Returns a config with MMBench's test file, the second row changed."""
    rows = mmbench_rows()
    rows[1] |= changes
    return BenchmarkConfig(name="mmbench", annotations=[put_tsv(tmp_path / "hostile.tsv", rows)])


@pytest.mark.parametrize(
    ("changes", "code", "record", "field"),
    [
        ({"image": "A" * 400}, "invalid-image", "2 (index 5)", "image"),
        ({"image": encoded()[:100]}, "invalid-image", "2 (index 5)", "image"),
        ({"image": "?" * 400}, "invalid-image", "2 (index 5)", "image"),
        ({"image": ""}, "empty-field", "2 (index 5)", "image"),
        ({"image": "../../secret.png"}, "image-not-found", None, "image"),
        ({"image": "1000005"}, "image-not-found", None, "image"),
        ({"index": "../5"}, "invalid-field", 2, "index"),
        ({"index": "²"}, "invalid-field", 2, "index"),
        ({"index": "5" * 5000}, "invalid-field", 2, "index"),
        ({"index": "6"}, "duplicate-id", "3 (index 6)", "index"),
        ({"question": ""}, "empty-field", "2 (index 5)", "question"),
        ({"A": "", "B": ""}, "empty-field", "2 (index 5)", "A"),
        ({"question": "a\0b"}, "invalid-encoding", "2 (index 5)", "question"),
    ],
)
def test_mmbench_hostile_row_is_an_error(
    changes: dict[str, str], code: str, record: str | int | None, field: str, tmp_path: Path
) -> None:
    benchmark_config = hostile(tmp_path, **changes)
    with raises_code(code, file=benchmark_config.annotations[0], record=record, field=field):
        benchmark_prompts(benchmark_config)


def test_mmbench_image_too_large_is_an_error_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLM_UNLEARN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mmbench_module, "MAX_IMAGE_CHARS", 5000)
    with raises_code("invalid-table", record=2):
        benchmark_prompts(hostile(tmp_path, image="A" * 6000))
    monkeypatch.undo()
    monkeypatch.setenv("VLM_UNLEARN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("vlm_unlearn.data.images.MAX_IMAGE_PIXELS", 1000)
    with raises_code("image-too-large", record="2 (index 5)", field="image") as caught:
        benchmark_prompts(hostile(tmp_path))
    assert "32 x 32" in str(caught.value)
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]


def test_mmbench_images_are_cached_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_UNLEARN_CACHE", str(tmp_path / "cache"))
    first = read_prompts("mmbench", tmp_path)[1]
    cached = tmp_path / "cache" / "mmbench" / (first.image or "")
    cached.touch()
    modified = cached.stat().st_mtime_ns
    assert read_prompts("mmbench", tmp_path)[1] == first
    assert cached.stat().st_mtime_ns == modified  # not unpacked again
    other = benchmark_prompts(hostile(tmp_path, image=encoded(77)))[1]
    assert other.image != first.image  # the same index, another image


def test_mmbench_test_files_have_no_answers(tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != "answer"} for row in mmbench_rows()]
    file = put_tsv(tmp_path / "test.tsv", rows)
    assert [prompt.reference for prompt in benchmark_prompts(BenchmarkConfig(name="mmbench", annotations=[file]))] == [
        None
    ] * 3
    with raises_code("answers-not-public", AnswersNotPublicError, file=file):
        load_truths(get_benchmark("mmbench"), [file], None)


def mutate(value: Any, generator: random.Random) -> Any:
    """Returns the value with one part of it, at any depth, removed or replaced by something invalid."""
    invalid_values = (None, True, -1, 1.5, "", "\ud800", "\0", "../a", [], ["a"], {}, {"a": 1}, 10**30, "²")
    if not isinstance(value, dict | list) or not value or generator.random() < 0.1:
        return generator.choice(invalid_values)
    key = generator.choice(list(value)) if isinstance(value, dict) else generator.randrange(len(value))
    if isinstance(value, dict) and generator.random() < 0.2:
        return {name: item for name, item in value.items() if name != key}
    mutated = mutate(value[key], generator)
    return {**value, key: mutated} if isinstance(value, dict) else [*value[:key], mutated, *value[key + 1 :]]


@pytest.mark.parametrize("name", [name for name in WRITERS if name not in ("mmbench", "mmbench_cn", "mme")])
def test_mutated_file_is_read_or_gives_a_one_line_error(name: str, tmp_path: Path) -> None:
    generator = random.Random(name)
    benchmark, benchmark_config = get_benchmark(name), config(name, tmp_path)
    texts = {file: file.read_text() for file in (*benchmark_config.annotations, benchmark_config.questions) if file}
    has_lines = name in ("pope", "llava_bench")
    numbers = {"reference": 8, "answer": 4}
    errors = []
    for _ in range(120):
        file = generator.choice(list(texts))
        value = [json.loads(line) for line in texts[file].splitlines()]
        mutated = mutate(value if has_lines else value[0], generator)
        lines = mutated if has_lines and isinstance(mutated, list) else [mutated]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        try:
            prompts = benchmark_prompts(benchmark_config)
            truths = load_truths(benchmark, benchmark_config.annotations, benchmark_config.questions)
            predictions = {id: Prediction(question_id=id, text="A", score=0.5, numbers=numbers) for id in truths}
            score_predictions(benchmark, truths, predictions, official=False)
        except UserError as error:
            errors.append(error)
        else:
            assert all(prompt.question.encode() for prompt in prompts)
        file.write_text(texts[file])
    assert 10 < len(errors) < 120
    assert all(str(error).isprintable() and error.code for error in errors)
