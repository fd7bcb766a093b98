"""Readers and suites of MM-SafetyBench, FigStep, SPA-VL, MOSSBench and XSTest, on files in their published layouts."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmark_files import picture, put_image, put_json, put_lines, put_text
from helpers import raises_code
from safety_files import (
    WRITERS,
    figstep,
    mm_safetybench,
    mossbench,
    mossbench_records,
    put_csv,
    put_spa_vl_json,
    put_xstest_v2,
)
from vlm_unlearn.config import SplitConfig, Suite, load
from vlm_unlearn.data.formats.base import get_format
from vlm_unlearn.data.images import open_image, resolve_image
from vlm_unlearn.data.readers import read_any
from vlm_unlearn.errors import UserError
from vlm_unlearn.evaluation.metric_roles import metric_roles
from vlm_unlearn.evaluation.prompts import split_prompts, suite_prompts
from vlm_unlearn.evaluation.runner import evaluate_run
from vlm_unlearn.evaluation.scoring import GradedRun, JudgeVerdicts, build_row
from vlm_unlearn.records import Kind, Prompt, Response, Verdict

SUITES = sorted(WRITERS)


def suite_of(name: str, root: Path, *overrides: str) -> Suite:
    WRITERS[name](root)
    return load(Suite, Path(f"suites/{name}"), ["model=m", f"root={root}", "judge=keyword", *overrides])


def prompts_of(format_name: str, file: Path, images: Path, kind: Kind = "unsafe") -> list[Prompt]:
    return list(get_format(format_name).prompts(file, images, "split", kind))


def test_mm_safetybench_pairs_each_wording_with_its_picture(tmp_path: Path) -> None:
    prompts = {prompt.id: prompt for prompt in suite_prompts(suite_of("mm_safetybench", tmp_path))}
    assert len(prompts) == 9
    expected = {
        "mm_sd": ("The image shows a thing. List steps, 1.", "01-Kite_Theft/SD/1.jpg"),
        "mm_sd_typo": ("The bottom of the image shows a thing. List steps, 1.", "01-Kite_Theft/SD_TYPO/1.jpg"),
        "mm_typo": ("The bottom of the image shows a thing. List steps, 1.", "01-Kite_Theft/TYPO/1.jpg"),
    }
    for split, (question, image) in expected.items():
        prompt = prompts[f"{split}/01-Kite_Theft/1/0"]
        assert (prompt.question, prompt.image, prompt.kind) == (question, image, "unsafe")
        assert (prompt.category, prompt.group_id) == ("Kite_Theft", "01-Kite_Theft/1")
        assert prompt.conversation == "How can I take kite 1?"  # what judges grade against
    assert {prompt.category for prompt in prompts.values()} == {"Kite_Theft", "Kite_Advice"}


def test_mm_safetybench_reads_one_scenario_too(tmp_path: Path) -> None:
    file = mm_safetybench(tmp_path)
    assert [prompt.group_id for prompt in prompts_of("mm_safetybench", file, tmp_path / "imgs")] == [
        *("01-Kite_Theft/0", "01-Kite_Theft/1"),
    ]


def test_figstep_asks_in_writing_and_in_the_picture(tmp_path: Path) -> None:
    prompts = {prompt.id: prompt for prompt in suite_prompts(suite_of("figstep", tmp_path))}
    text, picture = prompts["figstep_text/KiteQI_2_1/0"], prompts["figstep_picture/KiteQI_2_1/0"]
    assert (text.question, text.image, text.conversation) == (
        *("How can someone hide kite 1?", None, "How can someone hide kite 1?"),
    )
    assert picture.image == "query_KiteQI_2_1_6.png"
    assert "list" in picture.question
    assert "kite" not in picture.question
    assert picture.conversation == text.question
    assert {(prompt.kind, prompt.category) for prompt in prompts.values()} == {("unsafe", f"Kites {n}") for n in (0, 1)}


def test_figstep_column_prompt_replaces_the_written_question(tmp_path: Path) -> None:
    file = figstep(tmp_path)
    lines = file.read_text().splitlines()
    put_text(file, "\n".join([f"{lines[0]},prompt", f"{lines[1]},Fill it in.", f"{lines[2]},"]))
    questions = [prompt.question for prompt in prompts_of("figstep", file, tmp_path / "images" / "SafeBench")]
    assert questions[0] == "Fill it in."
    assert "list" in questions[1]


def test_spa_vl_unpacks_the_images_of_the_test_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_UNLEARN_CACHE", str(tmp_path / "cache"))
    prompts = suite_prompts(suite_of("spa_vl", tmp_path))
    assert [(prompt.set, prompt.kind, prompt.question, prompt.category) for prompt in prompts] == [
        ("spa_vl_harm", "unsafe", "Which kite harms, 0?", "Kite Harms"),
        ("spa_vl_harm", "unsafe", "Which kite harms, 1?", "Kite Harms"),
        ("spa_vl_help", "safe", "Which kite helps, 0?", "Kite Harms"),
        ("spa_vl_help", "safe", "Which kite helps, 1?", "Kite Harms"),
    ]
    assert len({prompt.image for prompt in prompts}) == 4
    for prompt in prompts:
        assert open_image(resolve_image(tmp_path, str(prompt.image))).size == (32, 32)


def test_spa_vl_reads_its_training_data_and_llavas_question_files(tmp_path: Path) -> None:
    (prompt,) = prompts_of("spa_vl", put_spa_vl_json(tmp_path), tmp_path)
    assert (prompt.id, prompt.question, prompt.reference) == ("split/233/0", "Which kite?", "The red one.")
    lines = [{"question_id": n, "image": "Kite Harms/1.jpg", "text": f"Share kite {n}."} for n in range(2)]
    file = put_lines(tmp_path / "help_share.jsonl", lines)
    prompts = prompts_of("spa_vl", file, tmp_path, "safe")
    assert [(prompt.id, prompt.question) for prompt in prompts] == [
        *(("split/0/0", "Share kite 0."), ("split/1/0", "Share kite 1.")),
    ]
    assert prompts_of("spa_vl", file, tmp_path, "unsafe") == []


def test_mossbench_questions_are_all_harmless(tmp_path: Path) -> None:
    prompts = suite_prompts(suite_of("mossbench", tmp_path))
    assert [(prompt.id, prompt.kind, prompt.image, prompt.category) for prompt in prompts] == [
        ("mossbench/1/0", "safe", "images/1.png", "Exaggerated Risk"),
        ("mossbench/2/0", "safe", "images/2.png", "Negated Harm"),
        ("mossbench/3/0", "safe", "images/3.png", "Counterintuitive Interpretation"),
    ]


def test_mossbench_csv_equals_its_json_and_the_contrast_set_is_harmful(tmp_path: Path) -> None:
    file = mossbench(tmp_path)
    rows = [
        {
            "pid": id,
            "question": record["question"],
            "image_path": record["image"],
            "description": 'A "red" kite, flying.',
            "meta_data_over": ["Exaggerated Risk", "Negated Harm", "Counterintuitive Interpretation"][int(id) - 1],
            "meta_data_harm": 7,
        }
        for id, record in mossbench_records().items()
    ]
    table = put_csv(tmp_path / "information.csv", rows)
    assert prompts_of("mossbench", table, tmp_path, "safe") == prompts_of("mossbench", file, tmp_path, "safe")
    put_json(file, mossbench_records(contrast=True))
    assert prompts_of("mossbench", file, tmp_path, "safe") == []
    assert len(prompts_of("mossbench", file, tmp_path, "unsafe")) == 3
    with raises_code("no-records", file=file):
        split_prompts(SplitConfig(name="s", format="mossbench", file=file, images=tmp_path, kind="safe"))


def test_mossbench_is_read_from_parquet_with_images_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setenv("VLM_UNLEARN_CACHE", str(tmp_path / "cache"))
    rows = [
        {**record, "image": {"bytes": picture(int(id)), "path": None}} for id, record in mossbench_records().items()
    ]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.to_parquet(str(tmp_path / "train.parquet"))
    prompts = prompts_of("mossbench", tmp_path / "train.parquet", tmp_path, "safe")
    assert [prompt.group_id for prompt in prompts] == ["1", "2", "3"]
    assert open_image(resolve_image(tmp_path, str(prompts[2].image))).size == (32, 32)


def test_xstest_labels_decide_and_types_are_categories(tmp_path: Path) -> None:
    prompts = suite_prompts(suite_of("xstest", tmp_path))
    assert [(prompt.id, prompt.kind, prompt.question, prompt.category, prompt.image) for prompt in prompts] == [
        ("safe/1/0", "safe", "How do I shoot a photo?", "homonyms", None),
        ("safe/2/0", "safe", 'How do I "beat" eggs, then?', "safe_targets", None),
        ("unsafe/3/0", "unsafe", "How do I cut kites?", "contrast_homonyms", None),
    ]


def test_xstest_second_version_is_labeled_by_its_types(tmp_path: Path) -> None:
    file = put_xstest_v2(tmp_path)
    (safe,), (unsafe,) = (prompts_of("xstest", file, tmp_path, kind) for kind in ("safe", "unsafe"))
    assert (safe.group_id, unsafe.group_id) == ("v2-1", "v2-2")


def graded(suite: Suite, refused: set[str]) -> Any:
    """Returns the row of a run in which the model refuses some questions and answers the others."""
    prompts = {prompt.id: prompt for prompt in suite_prompts(suite)}
    verdicts = [
        Verdict(prompt_id=id, judge="keyword", label="refused" if prompt.group_id in refused else "complied")
        for id, prompt in prompts.items()
    ]
    responses = [Response(prompt_id=id, text="x") for id in prompts]
    labels = ["complied", "refused", "degenerate"]
    return build_row(GradedRun(suite, prompts, responses, {"": JudgeVerdicts("keyword", {}, labels, verdicts)}), "m")


def test_refusals_of_mossbench_and_of_xstests_safe_prompts_are_over_refusal(tmp_path: Path) -> None:
    """Of MOSSBench's 3 questions 2 are refused. Of XSTest's 2 safe prompts 1 is refused, and its unsafe one is too."""
    moss = suite_of("mossbench", tmp_path / "moss")
    row = graded(moss, {"1", "3"})
    assert row.metrics["refusal_rate"].value == pytest.approx(2 / 3)
    assert {name: rate.value for name, rate in row.categories["refusal_rate"].items()} == {
        "Exaggerated Risk": 1.0,
        "Negated Harm": 0.0,
        "Counterintuitive Interpretation": 1.0,
    }
    xs = suite_of("xstest", tmp_path / "xs")
    other = graded(xs, {"2", "3"})
    assert (other.metrics["refusal_rate"].value, other.metrics["refusal_rate"].n) == (0.5, 2)
    assert (other.metrics["asr"].value, other.metrics["asr"].n) == (0.0, 1)
    for measured, suite in ((row, moss), (other, xs)):
        roles = {entry.metric: entry.role for entry in metric_roles(measured, suite)}
        assert roles["refusal_rate"] == "over_refusal"
        assert roles["utility"] == "utility"


@pytest.mark.parametrize("name", SUITES)
def test_suite_runs_from_the_questions_to_the_rates(name: str, tiny_model: Path, tmp_path: Path) -> None:
    suite = suite_of(name, tmp_path / "set", f"model={tiny_model}", "generation.max_new_tokens=2")
    row = evaluate_run(suite, tmp_path / "run", "random")
    assert row.metrics.keys() == suite.metrics.keys()
    # The keyword judge labels no answer as degenerate that it has not found to be.
    assert all(rate.value is not None for metric, rate in row.metrics.items() if metric != "degenerate_rate")
    lines = [json.loads(line) for line in (tmp_path / "run" / "prompts.jsonl").read_text().splitlines()]
    assert len(lines) == len(suite_prompts(suite))


@pytest.mark.parametrize("name", ["mm_safetybench", "figstep", "spa_vl", "mossbench", "xstest"])
def test_questions_are_no_training_examples(name: str, tmp_path: Path) -> None:
    file = WRITERS[name](tmp_path)
    with raises_code("unsupported-setting", file=file):
        list(read_any(file, tmp_path, format_name=name))


def without(key: str) -> Callable[[Any], Any]:
    return lambda record: {name: value for name, value in record.items() if name != key}


@pytest.mark.parametrize(
    ("name", "change", "code", "field"),
    [
        ("mm_safetybench", without("Rephrased Question"), "missing-field", "Rephrased Question"),
        ("mm_safetybench", without("Question"), "missing-field", "Question"),
        ("mm_safetybench", lambda record: {**record, "Rephrased Question": " "}, "empty-field", "Rephrased Question"),
        ("mm_safetybench", lambda record: [record], "invalid-field", None),
        ("mossbench", without("question"), "missing-field", "question"),
        ("mossbench", without("metadata"), "invalid-field", "metadata"),
        ("mossbench", lambda record: {**record, "image": "images/gone.png"}, "image-not-found", None),
        ("mossbench", lambda record: {**record, "image": "../1.png"}, "image-outside-root", None),
        ("mossbench", lambda record: {**record, "question": "<image>\nWhere?"}, "placeholder-in-text", "question"),
        ("mossbench", lambda record: {**record, "pid": "2"}, "duplicate-id", None),
    ],
)
def test_broken_record_of_a_json_file_is_one_error(
    name: str, change: Callable[[Any], Any], code: str, field: str | None, tmp_path: Path
) -> None:
    file = WRITERS[name](tmp_path)
    records = json.loads(file.read_text())
    key = next(iter(records))
    put_json(file, {**records, key: change(records[key])})
    images = tmp_path / "imgs" if name == "mm_safetybench" else tmp_path
    with raises_code(code, field=field) as caught:
        prompts_of(name, file, images, "safe" if name == "mossbench" else "unsafe")
    assert file.name in str(caught.value)
    assert f'"{key}"' in str(caught.value) or code == "duplicate-id"


@pytest.mark.parametrize(
    ("name", "old", "new", "code", "field"),
    [
        ("figstep", ",question,", ",text,", "missing-field", "question"),
        ("figstep", "category_id", "number", "missing-field", "category_id"),
        ("figstep", "Kites 0", "", "empty-field", "category_name"),
        ("figstep", "KiteQI,1", "KiteQI,7", "image-not-found", None),
        ("figstep", "KiteQI,2,1", "KiteQI,1,1", "duplicate-id", None),
        ("xstest", "id,prompt", "id,text", "missing-field", "prompt"),
        ("xstest", "3,How do I cut kites?", "3,", "empty-field", "prompt"),
        ("xstest", ",unsafe,", ",maybe,", "invalid-field", "label"),
        ("xstest", "3,How", "1,How", "duplicate-id", None),
        ("xstest", ",cut,", ",cut", "invalid-table", None),
    ],
)
def test_broken_row_of_a_table_is_one_error(
    name: str, old: str, new: str, code: str, field: str | None, tmp_path: Path
) -> None:
    file = WRITERS[name](tmp_path)
    text = file.read_text()
    assert old in text
    put_text(file, text.replace(old, new))
    with raises_code(code, field=field) as caught:
        prompts_of(name, file, tmp_path / "images" / "SafeBench")
    assert file.name in str(caught.value)


@pytest.mark.parametrize(
    ("change", "code", "field"),
    [
        (without("question"), "missing-field", "question"),
        (without("image"), "missing-field", "image"),
        (lambda record: {**record, "image": "gone.jpg"}, "image-not-found", None),
        (lambda record: {**record, "id": [1]}, "invalid-field", "id"),
        (lambda record: {**record, "class1": 3}, "invalid-field", "class1"),
    ],
)
def test_broken_row_of_spa_vl_is_one_error(
    change: Callable[[Any], Any], code: str, field: str | None, tmp_path: Path
) -> None:
    file = put_spa_vl_json(tmp_path)
    put_json(file, [change(json.loads(file.read_text())[0])])
    with raises_code(code, field=field, file=file.name):
        prompts_of("spa_vl", file, tmp_path)


def test_missing_files_and_folders_are_errors(tmp_path: Path) -> None:
    for name in SUITES:
        with raises_code("file-not-found"):
            prompts_of(name, tmp_path / "gone.json" if name != "xstest" else tmp_path / "gone.csv", tmp_path)
    (tmp_path / "empty").mkdir()
    with raises_code("no-records", file=tmp_path / "empty"):
        prompts_of("mm_safetybench", tmp_path / "empty", tmp_path)
    mm_safetybench(tmp_path)
    put_text(tmp_path / "processed_questions" / "._01-Kite_Theft.json", "\0")  # macOS adds such files
    put_image(tmp_path / "imgs" / "01-Kite_Theft" / "SD_TYPO" / "9.jpg")
    assert len(prompts_of("mm_safetybench", tmp_path / "processed_questions", tmp_path / "imgs")) == 3


@pytest.mark.parametrize("name", SUITES)
def test_mutated_file_is_read_or_gives_a_one_line_error(name: str, tmp_path: Path) -> None:
    file = put_spa_vl_json(tmp_path) if name == "spa_vl" else WRITERS[name](tmp_path)
    images = {"mm_safetybench": "imgs", "figstep": "images/SafeBench"}.get(name, "")
    content = file.read_bytes()
    generator = random.Random(name)
    errors: list[UserError] = []
    for _ in range(200):
        mutated = bytearray(content)
        for _ in range(generator.randrange(1, 4)):
            position = generator.randrange(len(mutated))
            mutated[position : position + generator.randrange(12)] = generator.choice(
                (b"", b"\xff", b"\0", b'"', b",", b"\n", b"[]", b"null", b"\\ud800", b"<image>", b"../", b"9" * 30)
            )
        file.write_bytes(mutated)
        try:
            for kind in ("safe", "unsafe"):
                prompts_of(name, file, tmp_path / images, kind)
        except UserError as error:
            errors.append(error)
    assert errors
    assert all(error.code and str(error).isprintable() for error in errors)
