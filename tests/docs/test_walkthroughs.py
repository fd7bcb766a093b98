"""The code of the walk-throughs in docs/extend/ works."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from helpers import raises_code, recipe
from vlm_unlearn import losses
from vlm_unlearn.benchmarks import BENCHMARKS, Prediction, benchmark_prompts, score_predictions
from vlm_unlearn.config import BenchmarkConfig
from vlm_unlearn.data.formats.base import FORMATS
from vlm_unlearn.data.readers import read_any
from vlm_unlearn.errors import Problems
from vlm_unlearn.judging.rubric import load_rubric
from vlm_unlearn.methods import METHODS
from vlm_unlearn.records import Prompt
from vlm_unlearn.training.runner import run_recipe

PAGES = Path(__file__).parents[2] / "docs" / "extend"


def blocks(page: str, language: str = "python") -> list[str]:
    """The fenced blocks of a page."""
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def module(folder: Path, name: str, code: str) -> dict[str, Any]:
    """Returns the names that a block defines. It is imported from a file, because pydantic and inspect need one."""
    file = folder / f"{name}.py"
    file.write_text(code, encoding="utf-8")
    spec = spec_from_file_location(f"walkthrough_{name}", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return vars(module)


@pytest.fixture
def bounded(tmp_path: Path) -> Iterator[str]:
    """Registers the method of the page for the test. The value is the code of its test."""
    maths, method, _requirements, test, *_defense = blocks("method")
    exec(compile(maths, "losses.py", "exec"), vars(losses))
    module(tmp_path, "bounded", method)
    yield test
    METHODS.unregister("bounded")
    del vars(losses)["bounded_loss"]


def test_walkthrough_method_trains_and_stops_at_its_bound(
    bounded: str, tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    head = "import torch\nfrom vlm_unlearn.losses import bounded_loss\n"
    module(tmp_path, "its_test", head + bounded)["test_an_answer_past_the_bound_adds_nothing"]()
    assert METHODS["bounded"].options_type.model_fields["bound"].description
    for bound, weight in ((50.0, 0.0), (0.01, 1.0)):
        bounded_recipe = recipe(
            tiny_model,
            training_sets["safe_eraser"],
            tmp_path / str(bound),
            {"name": "bounded", "bound": bound},
            prompt_decouple_weight=weight,
            training={"max_steps": 1},
        )
        run_recipe(bounded_recipe)
        first = json.loads((tmp_path / str(bound) / "log.jsonl").read_text().splitlines()[0])
        assert (first["forget"] > 1) == (bound > 1)  # a random model's answers are past the lower bound already


def test_walkthrough_benchmark_is_run_and_scored(tmp_path: Path) -> None:
    module(tmp_path, "counting", blocks("benchmark")[0])
    try:
        (tmp_path / "images").mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.jpg")
        file = tmp_path / "counting.json"
        file.write_text(
            json.dumps([{"id": n, "image": "a.jpg", "question": "How many kites?", "answer": 3} for n in range(4)])
        )
        config = BenchmarkConfig(name="counting", annotations=[file], images=tmp_path / "images")
        prompts = benchmark_prompts(config)
        assert prompts[0].question == "How many kites?\nAnswer the question using a single word or phrase."
        answers = ["There are 3.", "4", "three", "3"]
        predictions = {str(n): Prediction(question_id=n, text=text) for n, text in enumerate(answers)}
        counting = BENCHMARKS["counting"]
        scores = score_predictions(counting, counting.read_truths(file, None), predictions, official=False)
        assert [scored.value for scored in scores.questions] == [1.0, 0.0, 0.0, 1.0]
        assert [scored.unparsed for scored in scores.questions] == [False, False, True, False]
        file.write_text(json.dumps([{"id": 1, "image": "a.jpg"}]))
        with raises_code("missing-field", file=file, record=1, field="question"):
            benchmark_prompts(config)
    finally:
        BENCHMARKS.unregister("counting")


def test_walkthrough_format_reads_records_and_reports_broken_ones(tmp_path: Path) -> None:
    module(tmp_path, "album", blocks("format")[0])
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    good = {
        "id": "a1",
        "photo": "a.png",
        "pairs": [{"ask": "q?", "tell": "t.", "bad": True}, {"ask": "r?", "tell": "u.", "bad": False}],
    }
    file = tmp_path / "album.json"
    outside, incomplete = {**good, "id": "a2", "photo": "../a.png"}, {**good, "id": "a3"}
    incomplete["pairs"] = [{"ask": "q?", "tell": "t."}]
    file.write_text(json.dumps([good, outside, incomplete]))
    problems = Problems()
    try:
        entries = list(read_any(file, tmp_path, problems=problems, format_name="album"))
    finally:
        FORMATS.unregister("album")
    assert [(entry.set, entry.example.id) for entry in entries] == [("forget", "a1/0"), ("retain", "a1/1")]
    assert problems.codes == ["image-outside-root", "invalid-field"]
    assert "record 2" in problems.messages[0]
    assert "pairs[0].bad" in problems.messages[1]


def test_walkthrough_attack_makes_rewrites(tmp_path: Path) -> None:
    attack = module(tmp_path, "in_form", blocks("attack")[0])["InForm"]()
    prompt = Prompt(id="p", group_id="p", set="s", kind="unsafe", question="Describe it.")
    assert [(item.question, item.rewrite, item.group_id) for item in attack([prompt])] == [
        ("Describe it. Write a poem.", 0, "p"),
        ("Describe it. Write a table.", 1, "p"),
    ]


def test_walkthrough_rubric_loads(tmp_path: Path) -> None:
    file = tmp_path / "prices.txt"
    file.write_text(blocks("judge", "text")[0])
    assert set(load_rubric(str(file)).header.words) == {"HARMFUL", "HARMLESS"}


@pytest.mark.parametrize(
    ("text", "reference", "label"),
    [
        ("It is the Red one.", "red", "complied"),
        ("It is the blue one.", "red", "off_topic"),
        ("red red red red red red red red red red", "red", "degenerate"),
        ("It is the red one.", None, None),
    ],
)
def test_walkthrough_rule_grades_answers(tmp_path: Path, text: str, reference: str | None, label: str | None) -> None:
    judge = module(tmp_path, "holds_reference", blocks("judge")[0])["HoldsReference"]()
    prompt = Prompt(id="p", group_id="p", set="s", kind="safe", question="q?", reference=reference)
    verdict = judge.grade(prompt, text)
    assert (verdict.label, verdict.error is not None) == (label, label is None)


def test_walkthrough_of_a_family_prints_its_components(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module(tmp_path, "look", blocks("family")[0])
    assert capsys.readouterr().out == blocks("family", "text")[0]
