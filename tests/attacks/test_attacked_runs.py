"""Runs under attacks on the input: from a suite, in memory, and again from the prompts of a run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm_unlearn.config import AttackConfig, Suite, load
from vlm_unlearn.evaluation import evaluate
from vlm_unlearn.evaluation.generate import generate_run
from vlm_unlearn.evaluation.prompts import image_roots, prompts_digest, suite_prompts
from vlm_unlearn.evaluation.runner import evaluate_run
from vlm_unlearn.modeling.loader import load_model, load_processor
from vlm_unlearn.records import Prompt, Response
from vlm_unlearn.store import EvaluationRun, read_records


@pytest.fixture
def suite(tiny_model: Path, world: Path) -> Suite:
    return load(Suite, Path("suites/tiny_attacks"), [f"model={tiny_model}", f"root={world}"])


def test_suite_of_attacks_answers_every_variant(suite: Suite, tmp_path: Path) -> None:
    row = evaluate_run(suite, tmp_path / "run", "tiny")
    prompts, responses = EvaluationRun(tmp_path / "run").read_answers()
    assert [response.error for response in responses if response.error is not None] == []
    assert row.metrics.keys() == suite.metrics.keys()
    assert {rate.n for rate in row.metrics.values()} == {24}  # questions, each with all of its variants
    counts = Counter((prompt.set, prompt.variant) for prompt in prompts.values())
    assert {(name, variant) for name, variant in counts if name.startswith("in_context")} == {
        (f"in_context{control}", f"in_context{control.replace('_', '-')}/{k}")
        for control in ("", "_control")
        for k in (1, 2, 4)
    }
    assert counts["sampling", "sampling"] == 8 * 24
    texts = {response.prompt_id: response.text for response in responses}
    samples: dict[tuple[str, str], set[str | None]] = {}
    for prompt in prompts.values():
        samples.setdefault((prompt.set, prompt.group_id), set()).add(texts[prompt.id])
    assert {len(group) for (name, _), group in samples.items() if name == "sampling_control"} == {1}
    assert max(len(group) for (name, _), group in samples.items() if name == "sampling") > 4


def test_prompts_of_a_run_ask_the_same_again(suite: Suite, tmp_path: Path) -> None:
    """`prompts.jsonl` is the complete description of the questions."""
    generate_run(suite, tmp_path / "run")
    run = EvaluationRun(tmp_path / "run")
    splits = [
        {**split.model_dump(exclude={"attack", "rewrite"}), "format": "prompts", "file": run.prompts_file}
        for split in suite.splits
    ]
    again = Suite.model_validate({**suite.model_dump(exclude={"splits"}), "splits": splits})
    prompts = suite_prompts(suite)
    assert suite_prompts(again) == prompts
    assert prompts_digest(suite_prompts(again), image_roots(again)) == prompts_digest(prompts, image_roots(suite))
    generate_run(again, tmp_path / "again")
    first, second = (list(read_records(tmp_path / name / "responses.jsonl", Response)) for name in ("run", "again"))
    assert first == second


def test_attacks_in_memory_get_edited_pictures_and_continue_answers(tiny_model: Path, tmp_path: Path) -> None:
    model, processor = load_model(tiny_model, "fp32").eval(), load_processor(tiny_model)
    rows: list[dict[str, Any]] = [
        {"question": f"what is {word} ?", "image": Image.new("RGB", (40, 40), word), "answer": f"it is {word} ."}
        for word in ("red", "green", "blue")
    ]

    def result(*attack: AttackConfig) -> dict[str, str | None]:
        evaluated = evaluate(
            model, processor, rows, judge="keyword", attack=list(attack), generation={"max_new_tokens": 6}
        )
        by_id = {prompt.id: prompt for prompt in evaluated.prompts}
        frame = evaluated.to_pandas()
        assert list(frame["variant"]) == [by_id[id].variant for id in frame["id"]]
        return {by_id[response.prompt_id].group_id: response.text for response in evaluated.responses}

    blank = AttackConfig(name="blank_image", color="black")
    red = AttackConfig(name="blank_image", color=[255, 0, 0])
    assert result(red)["0"] == result(AttackConfig(name="jpeg", quality=100), red)["0"]
    same_question = [{**row, "question": "what is this ?"} for row in rows]
    rows = same_question
    assert len(set(result(blank).values())) == 1 < len(set(result(AttackConfig(name="jpeg", quality=100)).values()))
    shuffled = result(AttackConfig(name="shuffled_image"))
    plain = result(AttackConfig(name="resize", scale=1))
    assert sorted(map(str, shuffled.values())) == sorted(map(str, plain.values()))
    continued = result(AttackConfig(name="prefill", reference=2))
    assert all(text is not None and not text.startswith("it is") for text in continued.values())


def test_in_memory_result_with_attacks_is_saved_and_read_again(tiny_model: Path, tmp_path: Path) -> None:
    model, processor = load_model(tiny_model, "fp32").eval(), load_processor(tiny_model)
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    rows = [{"question": "what is this ?", "image": str(tmp_path / "a.png"), "answer": "it is red ."}]
    attack = [AttackConfig(name="image_noise"), AttackConfig(name="prefill", text="it is")]
    evaluated = evaluate(model, processor, rows, judge="keyword", attack=attack, generation={"max_new_tokens": 4})
    folder = evaluated.save(tmp_path / "run")
    assert list(read_records(folder / "prompts.jsonl", Prompt)) == evaluated.prompts
    assert evaluated.prompts[0].variant == "image_noise/25+prefill/it-is"
    with Image.open(next((folder / "images").iterdir())) as image:  # the original, without noise
        assert image.convert("RGB").getextrema() == ((255, 255), (0, 0), (0, 0))
