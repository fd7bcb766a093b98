"""Arguments of the trainer and of `evaluate` that users of TRL and transformers pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers
from PIL import Image

from helpers import raises_code
from vlm_unlearn import UnlearningConfig, UnlearningTrainer, evaluate, judge
from vlm_unlearn.methods import METHODS
from vlm_unlearn.methods.base import LossOutput, Method, Step
from vlm_unlearn.records import Prompt

IMAGE = Image.new("RGB", (32, 32), "red")
ROWS = [{"question": f"What is it {n} ?", "answer": "A cat .", "image": IMAGE} for n in range(4)]
DATA = {"forget": ROWS, "retain": ROWS}


def config(folder: Path, **arguments: Any) -> UnlearningConfig:
    return UnlearningConfig(output_dir=str(folder), max_steps=1, report_to="none", use_cpu=True, **arguments)


class Ascent(Method):
    """Gradient ascent, defined in a test."""

    def loss(self, step: Step) -> LossOutput:
        forget = -step.cross_entropy("forget")
        return LossOutput(forget + step.cross_entropy("retain"), {"forget": forget})


def test_model_can_be_a_folder_and_brings_its_processor(tiny_model: Path, tmp_path: Path) -> None:
    trainer = UnlearningTrainer(str(tiny_model), config(tmp_path, max_length=None), DATA)
    assert trainer.train().global_step == 1
    with raises_code("missing-setting", field="eval_fn"):
        trainer.evaluate()
    with raises_code("unsupported-setting"):
        trainer.predict(DATA)


def test_method_can_be_a_class(tiny_model: Path, tmp_path: Path) -> None:
    try:
        arguments = config(tmp_path, method=Ascent)
        assert arguments.method == "Ascent"
        assert config(tmp_path, method=Ascent).method == "Ascent"
        assert UnlearningTrainer(str(tiny_model), arguments, DATA).train().global_step == 1
    finally:
        METHODS.unregister("Ascent")
    with raises_code("invalid-plugin", field="method"):
        config(tmp_path, method=int)


def test_rows_of_prompt_and_completion_are_an_error_that_names_the_columns(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": "a", "image": IMAGE}]
    with raises_code("unsupported-setting", field="prompt"):
        UnlearningTrainer(str(tiny_model), config(tmp_path), {"forget": rows, "retain": rows})


def test_evaluate_takes_a_dict_of_generation_settings(tiny_model: Path) -> None:
    model = transformers.AutoModelForImageTextToText.from_pretrained(tiny_model)
    processor = transformers.AutoProcessor.from_pretrained(tiny_model)
    result = evaluate(model, processor, ROWS[:1], judge="keyword", generation={"max_new_tokens": 3})
    assert len(processor.tokenizer(str(result.responses[0].text))["input_ids"]) <= 5
    wrong: Any = transformers.GenerationConfig(max_new_tokens=3)
    with raises_code("invalid-field", field="generation"):
        evaluate(model, processor, ROWS[:1], judge="keyword", generation=wrong)


@pytest.mark.parametrize("names", ["completion_text, prompt_text", "prompts, completions", "x, y"])
def test_judge_with_other_argument_names_is_an_error(names: str) -> None:
    with raises_code("invalid-judge"):
        judge(labels=("refused",))(eval(f"lambda {names}: 'refused'"))


def assign(prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    prompts[0].question = "other"  # type: ignore[misc]
    return prompts


def change_one(prompts: Any) -> Any:
    return [prompts.model_copy()]


def forget_return(prompts: Sequence[Prompt]) -> Any:
    list(prompts)


@pytest.mark.parametrize("attack", [assign, change_one, forget_return])
def test_broken_attack_is_an_error_that_says_what_an_attack_is(attack: Any) -> None:
    from vlm_unlearn.attacks.base import FunctionAttack

    with raises_code("invalid-attack", field="attack") as caught:
        FunctionAttack(attack, {})([Prompt(id="p", group_id="p", set="s", kind="unsafe", question="q")])
    assert "prompts" in str(caught.value)
