"""Training with objects in memory, as in a notebook."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback

from helpers import raises_code, recipe
from vlm_unlearn.modeling.loader import load_model, load_processor
from vlm_unlearn.training.arguments import UnlearningConfig
from vlm_unlearn.training.runner import run_recipe
from vlm_unlearn.training.trainer import UnlearningTrainer

LAYERS = r"model\.language_model\.layers\.\d+\..*\.(q_proj|v_proj)"
STEPS = 6


def arguments(output: Path, **changes: Any) -> UnlearningConfig:
    settings = {
        "method": "npo",
        "method_args": {"beta": 0.5},
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
        "use_cpu": True,
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return UnlearningConfig(output_dir=str(output), **{**settings, **changes})


def trainer(folder: Path, data: Path, output: Path, **options: Any) -> UnlearningTrainer:
    changes = options.pop("arguments", {})
    options.setdefault("peft_config", LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS, task_type="CAUSAL_LM"))
    return UnlearningTrainer(
        model=options.pop("model", None) or load_model(folder, "fp32"),
        args=arguments(output, **changes),
        train_dataset=data,
        processing_class=options.pop("processing_class", None) or load_processor(folder),
        **options,
    )


def test_unlearning_refusals_is_rejected_unless_accepted(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    with raises_code("forget-refusals", file=training_sets["refusals"]) as caught:
        trainer(tiny_model, training_sets["refusals"], tmp_path)
    assert "accept_refusals=True" in str(caught.value)
    trainer(tiny_model, training_sets["refusals"], tmp_path, arguments={"accept_refusals": True})
    trainer(tiny_model, training_sets["refusals"], tmp_path, arguments={"method": "mixed_sft", "method_args": None})


class Interrupt(TrainerCallback):
    """Interrupts training after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            raise KeyboardInterrupt


def saved_weights(trained: UnlearningTrainer, folder: Path) -> dict[str, torch.Tensor]:
    trained.save_model(str(folder))
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["npo", "kl"])
def test_trainer_recipe_and_resumed_trainer_train_the_same_weights(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, method: str
) -> None:
    data = training_sets["harmful"]
    changes = {"method": method, "method_args": {"beta": 0.5} if method == "npo" else None}
    configured = recipe(
        tiny_model,
        data,
        tmp_path / "recipe",
        {"name": method, **(changes["method_args"] or {})},  # type: ignore[dict-item]
        trainable={
            "mode": "lora",
            "projector": False,
            "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        },
        training={
            "max_steps": STEPS,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 2,
            "warmup_ratio": 1 / STEPS,
            "seed": 42,
            "lr_scheduler_type": "cosine",
            "precision": "fp32",
        },
    )
    from_recipe = load_file(run_recipe(configured) / "adapter_model.safetensors")

    in_memory = trainer(tiny_model, data, tmp_path / "in_memory", arguments=changes)
    in_memory.train()
    from_memory = saved_weights(in_memory, tmp_path / "saved")

    interrupted = trainer(tiny_model, data, tmp_path / "resumed", arguments=changes, callbacks=[Interrupt(5)])
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    resumed = trainer(tiny_model, data, tmp_path / "resumed", arguments=changes)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS

    for weights in (from_memory, saved_weights(resumed, tmp_path / "saved_resumed")):
        assert weights.keys() == from_recipe.keys()
        different = {name: (weights[name] - from_recipe[name]).abs().max().item() for name in weights}
        assert max(different.values()) == 0, different


@pytest.mark.slow
def test_eval_fn_and_the_probe_of_a_recipe_measure_the_same_weights_at_the_same_steps(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    class WeightNorm:
        """A probe whose rate depends on every trained weight."""

        digest = "norm"

        def __call__(self, model: Any) -> Mapping[str, float | None]:
            assert not model.training
            squares = [float(value.square().sum()) for value in model.parameters() if value.requires_grad]
            return {"norm": sum(squares) ** 0.5, "unmeasured": None}

    data, lora = training_sets["harmful"], {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    configured = recipe(
        tiny_model,
        data,
        tmp_path / "recipe",
        {"name": "npo", "beta": 0.5},
        trainable={"mode": "lora", "projector": False, "lora": lora},
        training={
            "max_steps": STEPS,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 2,
            "warmup_ratio": 1 / STEPS,
            "seed": 42,
            "precision": "fp32",
        },
        probe={"suite": "suites/tiny", "eval_steps": 2},
    )
    run_recipe(configured, probe=WeightNorm())
    log = [json.loads(line) for line in (tmp_path / "recipe" / "log.jsonl").read_text().splitlines()]
    in_memory = trainer(
        tiny_model,
        data,
        tmp_path / "in_memory",
        eval_fn=WeightNorm(),
        arguments={"eval_strategy": "steps", "eval_steps": 2},
    )
    in_memory.train()
    probed = [(line["step"], line["probe/norm"]) for line in log if "probe/norm" in line]
    assert probed == [(line["step"], line["eval_norm"]) for line in in_memory.state.log_history if "eval_norm" in line]
    assert [step for step, _ in probed] == [2, 4, 6]
    assert len({rate for _, rate in probed}) == 3
    assert not any("unmeasured" in name for line in log for name in line)


def test_trainer_leaves_the_model_as_it_was_besides_its_trained_parameters(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    model = load_model(tiny_model, "fp32")
    forward = model.model.vision_tower.forward
    before = {name: value.clone() for name, value in model.named_parameters()}
    in_memory = trainer(tiny_model, training_sets["harmful"], tmp_path / "run", model=model, peft_config=None)
    in_memory.train()
    assert model.model.vision_tower.forward == forward
    changed = {name for name, value in model.named_parameters() if not value.equal(before[name])}
    assert changed
    assert not any("vision_tower" in name for name in changed)


def test_reference_of_trained_adapters_is_the_model_with_them(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    """Disabling the adapters would give the model from before their first training."""
    losses: dict[str, list[float]] = {}
    for reference in ("auto", "copy", "adapter"):
        torch.manual_seed(0)
        adapted = get_peft_model(load_model(tiny_model, "fp32"), LoraConfig(r=4, target_modules=LAYERS))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
        run = trainer(
            tiny_model,
            training_sets["harmful"],
            tmp_path / reference,
            model=adapted,
            peft_config=None,
            arguments={"method": "kl", "method_args": None, "reference": reference, "logging_steps": 1, "max_steps": 2},
        )
        run.train()
        losses[reference] = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses["auto"] == losses["copy"]
    assert losses["auto"] != losses["adapter"]


def test_any_kind_of_adapter_trains(tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path) -> None:
    for number, config in enumerate(
        (
            LoraConfig(r=4, target_modules=LAYERS, use_dora=True),
            LoraConfig(r=4, target_modules=LAYERS, use_rslora=True),
            IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        )
    ):
        run = trainer(
            tiny_model,
            training_sets["harmful"],
            tmp_path / str(number),
            peft_config=config,
            arguments={"max_steps": 2, "method": "rmu", "method_args": {"layer": 0}},
        )
        before = {name: value.clone() for name, value in run.vlm.model.named_parameters() if value.requires_grad}
        run.train()
        assert any(not value.equal(before[name]) for name, value in run.vlm.model.named_parameters() if name in before)


def test_eval_fn_is_called_and_logged(tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path) -> None:
    modes = []

    def measure(model: Any) -> Mapping[str, float | None]:
        modes.append(model.training)
        return {"asr": 0.25, "refusal_rate": None}

    run = trainer(
        tiny_model,
        training_sets["harmful"],
        tmp_path / "run",
        eval_fn=measure,
        arguments={"eval_strategy": "steps", "eval_steps": 3},
    )
    run.train()
    assert modes == [False, False]
    logged = [entry for entry in run.state.log_history if "eval_asr" in entry]
    assert [(entry["step"], entry["eval_asr"]) for entry in logged] == [(3, 0.25), (6, 0.25)]
    assert not any("eval_refusal_rate" in entry for entry in logged)


def test_nothing_but_output_dir_is_written(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = load_processor(tiny_model)  # which may write to the cache
    monkeypatch.setenv("VLM_UNLEARN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    trainer(tiny_model, training_sets["harmful"], tmp_path / "run", processing_class=processor).train()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_invalid_arguments_are_errors(tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path) -> None:
    data = training_sets["harmful"]
    with raises_code("unknown-name"):
        arguments(tmp_path, method="npoo")
    with raises_code("invalid-field"):
        arguments(tmp_path, reference="cached")
    with raises_code("invalid-field"):
        arguments(tmp_path, prompt_decouple_weight=-1.0)
    with raises_code("missing-setting"):
        trainer(tiny_model, data, tmp_path, arguments={"eval_strategy": "steps"})
    with raises_code("conflicting-settings"):
        trainer(tiny_model, data, tmp_path, eval_fn=lambda _model: {})
    frozen = load_model(tiny_model, "fp32").requires_grad_(False)
    with raises_code("conflicting-settings"):
        trainer(tiny_model, data, tmp_path, model=frozen, peft_config=None)
    adapted = get_peft_model(load_model(tiny_model, "fp32"), LoraConfig(r=4, target_modules=LAYERS))
    with raises_code("conflicting-settings"):
        trainer(tiny_model, data, tmp_path, model=adapted)
    with raises_code("invalid-field"):
        trainer(tiny_model, data, tmp_path, peft_config=LoraConfig(r=4, target_modules=["no_such_layer"]))
    assert not list(tmp_path.iterdir())


def test_checkpoint_of_another_run_is_an_error(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    data = training_sets["harmful"]
    first = trainer(tiny_model, data, tmp_path, arguments={"max_steps": 2})
    first.train()
    for changes in ({"seed": 1}, {"max_steps": 4}, {"method_args": {"beta": 0.9}}):
        other = trainer(tiny_model, data, tmp_path, arguments={"max_steps": 2, **changes})
        with raises_code("run-mismatch"):
            other.train(resume_from_checkpoint=True)
