"""Training runs of recipes: which weights change and what the run folder contains."""

from __future__ import annotations

import json
import math
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers import raises_code, recipe
from trained import METHOD_CONFIGS, RMU, StepScene, changed_names, weights
from vlm_unlearn.config import TrainableConfig
from vlm_unlearn.data_tools.importers import import_vlguard
from vlm_unlearn.errors import RunError
from vlm_unlearn.methods import METHODS
from vlm_unlearn.modeling.loader import load_model, load_run_model, run_model_folder
from vlm_unlearn.store import RunDirectory
from vlm_unlearn.training import method_trainer
from vlm_unlearn.training.checkpoints import last_complete_checkpoint
from vlm_unlearn.training.method_trainer import MethodTrainer
from vlm_unlearn.training.plan import plan
from vlm_unlearn.training.references import FrozenCopyReference
from vlm_unlearn.training.runner import run_plan, run_recipe

VISION, PROJECTOR, LANGUAGE = "vision_tower", "multi_modal_projector", "language_model"
SUPERVISED = [name for name, method in METHODS.items() if not method.unlearns]


def base_and_trained(base: Path, run: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns all weights of the base model and of the trained model, with merged adapters."""
    return load_model(base, "fp32").state_dict(), load_run_model(run_model_folder(str(run)), "fp32")[0].state_dict()


@pytest.mark.parametrize(
    ("method", "data", "weight"),
    [
        *((config, "harmful", 0.0) for config in METHOD_CONFIGS.values()),
        *((METHOD_CONFIGS[name], "refusals", 0.0) for name in SUPERVISED),
        *((config, "safe_eraser", 0.5) for config in METHOD_CONFIGS.values() if config["name"] != "dpo"),
        *(({"name": name, "paper_compat": True}, "safe_eraser", 0.5) for name in ("kl", "npo")),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else str(value),
)
def test_step_of_each_method_gives_gradients_to_trainable_parameters_only(
    tiny_model: Path, training_sets: dict[str, Path], method: dict[str, object], data: str, weight: float
) -> None:
    scene = StepScene(tiny_model, training_sets[data], method, weight)
    reference = FrozenCopyReference(scene.model)
    scene.perturb()
    result = scene.step(scene.micro_batches(rows=4), reference)
    assert all(math.isfinite(value) for value in result.terms.values())
    assert ("decouple" in result.terms) == (weight > 0)
    nonzero = {name for name, gradient in result.gradients.items() if gradient.isfinite().all() and gradient.any()}
    assert not any(VISION in name for name in result.gradients)
    assert any(PROJECTOR in name for name in nonzero)
    assert any("layers.0.mlp.down_proj" in name for name in nonzero)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "mode", "data", "weight", "strategy"),
    [
        ("gd", "full", "harmful", 0.0, None),
        ("npo", "full", "safe_eraser", 0.5, "cache"),
        (RMU, "full", "harmful", 0.0, "copy"),
        ("kl", "lora", "harmful", 0.0, "adapter"),
        ("npo", "lora", "harmful", 0.0, "cache"),
    ],
    ids=["gd-full", "npo-full-cache", "rmu-full-copy", "kl-lora-adapter", "npo-lora-cache"],
)
def test_run_of_each_mode_and_reference_strategy_trains_logs_and_saves(
    tiny_model: Path,
    training_sets: dict[str, Path],
    tmp_path: Path,
    method: object,
    mode: str,
    data: str,
    weight: float,
    strategy: str | None,
) -> None:
    planned = plan(
        recipe(
            tiny_model,
            training_sets[data],
            tmp_path / "run",
            method,
            prompt_decouple_weight=weight,
            trainable={"mode": mode},
        )
    )
    assert planned.reference_strategy == strategy
    result = run_plan(planned)
    changed = changed_names(*base_and_trained(tiny_model, tmp_path / "run"))
    assert not any(VISION in name for name in changed)
    assert any(PROJECTOR in name for name in changed)
    assert any("layers.0.mlp.down_proj" in name for name in changed)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert ("decouple" in log[0]) == (weight > 0)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["finished"]
    assert manifest["wall_seconds"] > 0
    assert (result / "adapter_model.safetensors").exists() == (mode == "lora")
    assert (result / "method_state.safetensors").exists() == (method is RMU)
    assert not list(result.glob("*.bin"))  # no pickle files in the saved model


def test_full_training_with_layers_and_patterns_changes_only_these_parameters(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    trainable = TrainableConfig(layers=[1], parameter_patterns=["mlp.down_proj"], projector=False)
    result = run_recipe(
        recipe(
            tiny_model,
            training_sets["harmful"],
            tmp_path / "run",
            "npo",
            trainable=trainable.model_dump(),
            training={"max_steps": 2},
        )
    )
    assert {name.split("layers.")[1] for name in changed_names(weights(tiny_model), weights(result))} == {
        "1.mlp.down_proj.weight"
    }


def test_adapters_when_merged_change_language_model_and_projector(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    training = {"max_steps": 2, "learning_rate": 1e-2}
    lora_recipe = recipe(
        tiny_model, training_sets["safe_eraser"], tmp_path / "run", "po", trainable={"mode": "lora"}, training=training
    )
    folder = run_model_folder(str(run_recipe(lora_recipe).parent))
    assert (folder / "adapter_model.safetensors").exists()
    merged, _ = load_run_model(folder, "fp32")
    base, _ = load_run_model(tiny_model, "fp32")
    changed = changed_names(base.state_dict(), merged.state_dict())
    assert any(LANGUAGE in name for name in changed)
    assert any(PROJECTOR in name for name in changed)
    assert not any(VISION in name for name in changed)


def test_lora_with_layers_adapts_only_these_layers(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    trainable = {"mode": "lora", "layers": [1], "projector": False, "lora": {"r": 4, "lora_alpha": 8}}
    training = {"max_steps": 1}
    run_recipe(
        recipe(tiny_model, training_sets["harmful"], tmp_path / "run", "npo", trainable=trainable, training=training)
    )
    adapters = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert {name.split("layers.")[1].split(".")[0] for name in adapters} == {"1"}
    table = {row["part"]: row for row in json.loads((tmp_path / "run" / "trainable.json").read_text())}
    assert table["adapters"]["trained"] == sum(weight.numel() for weight in adapters.values())
    assert table["language model"]["trained"] == 0


def test_run_in_a_locked_folder_is_rejected(tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run").lock(), raises_code("run-locked"):
        run_recipe(recipe(tiny_model, training_sets["harmful"], tmp_path / "run", "npo"))


def test_run_resumed_with_swapped_images_is_rejected(tiny_model: Path, world: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(world, tmp_path / "world"))
    vlguard = copy / "vlguard"
    import_vlguard(vlguard / "train.json", vlguard / "train", tmp_path / "data")
    sft_recipe = recipe(tiny_model, tmp_path / "data", tmp_path / "run", "mixed_sft", training={"max_steps": 1})
    run_recipe(sft_recipe)
    first, *_, last = sorted((vlguard / "train").rglob("*.png"))
    first_image, last_image = first.read_bytes(), last.read_bytes()
    first.write_bytes(last_image)  # the same images, but with each other's questions
    last.write_bytes(first_image)
    with raises_code("run-mismatch") as caught:
        run_recipe(sft_recipe)
    assert "data.images" in str(caught.value)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_projector_learning_rate_applies_to_the_projector_only(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, mode: str
) -> None:
    """AdamW's first step moves a weight by its learning rate."""
    training = {"max_steps": 1, "learning_rate": 1e-3, "projector_learning_rate": 1e-5, "lr_scheduler_type": "constant"}
    run_recipe(
        recipe(
            tiny_model, training_sets["harmful"], tmp_path / "run", "gd", training=training, trainable={"mode": mode}
        )
    )
    base, trained = base_and_trained(tiny_model, tmp_path / "run")
    moves = {
        part: max(float((trained[name] - base[name]).abs().max()) for name in base if part in name)
        for part in (PROJECTOR, LANGUAGE)
    }
    assert moves[PROJECTOR] == pytest.approx(1e-5, rel=0.05)
    assert moves[LANGUAGE] > 1e-4


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_sine_projector_changes_weights_by_at_most_one(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, mode: str
) -> None:
    """SineProject is W + sin(dW), so that no step changes a weight by more than 1. The saved weights are merged."""
    training = {"max_steps": 6, "learning_rate": 5.0, "max_grad_norm": 1e9, "lr_scheduler_type": "constant"}
    trainable = {"mode": mode, "projector": "sine", "layers": [1], "lora": {"r": 1, "target_modules": ["o_proj"]}}
    if mode == "full":
        trainable |= {"layers": []}
    run_recipe(
        recipe(tiny_model, training_sets["harmful"], tmp_path / "run", "gd", training=training, trainable=trainable)
    )
    base, trained = base_and_trained(tiny_model, tmp_path / "run")
    assert trained.keys() == base.keys()
    moves = [float((trained[name] - base[name]).abs().max()) for name in base if PROJECTOR in name]
    assert 0.5 < max(moves) <= 1.0
    assert not any(LANGUAGE in name for name in base if mode == "full" and not torch.equal(base[name], trained[name]))


def test_finished_run_is_not_repeated(tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path) -> None:
    npo_recipe = recipe(tiny_model, training_sets["harmful"], tmp_path / "run", "npo", training={"max_steps": 1})
    result = run_recipe(npo_recipe)
    modified = (result / "model.safetensors").stat().st_mtime_ns
    assert run_recipe(npo_recipe) == result
    assert (result / "model.safetensors").stat().st_mtime_ns == modified
    with raises_code("run-mismatch") as caught:
        run_recipe(recipe(tiny_model, training_sets["harmful"], tmp_path / "run", {"name": "npo", "beta": 9.0}))
    assert "recipe.method.beta" in str(caught.value)


def test_run_with_non_finite_loss_or_weights_fails(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    training = {"learning_rate": 1e30, "max_steps": 20, "max_grad_norm": 1e30}
    with raises_code("non-finite-loss", RunError):
        run_recipe(recipe(tiny_model, training_sets["harmful"], tmp_path / "run", "mixed_sft", training=training))
    last = {**training, "learning_rate": 1e38, "max_steps": 1, "weight_decay": 1e5, "warmup_ratio": 0}
    with raises_code("non-finite-weights", RunError):  # no loss is computed after the last update
        run_recipe(recipe(tiny_model, training_sets["harmful"], tmp_path / "last", "mixed_sft", training=last))
    assert not (tmp_path / "last" / "model").exists()


def test_divergence_keeps_the_last_good_checkpoint(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    """Weight decay increases the weights from step to step until they overflow."""
    training = {
        "learning_rate": 1.0,
        "weight_decay": 3e5,
        "max_steps": 30,
        "save_steps": 1,
        "lr_scheduler_type": "constant",
    }
    with pytest.raises(RunError) as caught:
        run_recipe(recipe(tiny_model, training_sets["harmful"], tmp_path / "run", "mixed_sft", training=training))
    assert caught.value.code in ("non-finite-loss", "non-finite-gradient")
    checkpoint = last_complete_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    assert str(checkpoint) in str(caught.value)
    assert all(value.isfinite().all() for value in load_file(checkpoint / "trained.safetensors").values())
    assert (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "mode"),
    [("npo", "lora"), ("kl", "full"), (RMU, "lora")],
    ids=["npo-lora-cache", "kl-full-copy", "rmu-lora-adapter"],
)
def test_run_in_bf16_trains_and_saves_finite_weights(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, method: object, mode: str
) -> None:
    """With LoRA, frozen weights are bf16 and trainable ones float32. The sine projector is between the two."""
    trainable = {"mode": mode, "projector": "sine", "lora": {"r": 4}}
    training = {"precision": "bf16", "learning_rate": 1e-2, "gradient_checkpointing": True}
    result = run_recipe(
        recipe(tiny_model, training_sets["harmful"], tmp_path / "run", method, trainable=trainable, training=training)
    )
    base, trained = base_and_trained(tiny_model, result.parent)
    assert all(value.isfinite().all() for value in trained.values())
    assert any(PROJECTOR in name and not torch.equal(base[name], trained[name]) for name in base)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    reference = {"npo": "forget", "kl": "retain_kl"}.get(str(method), "retain_hidden")
    at_reference = {"forget": 2 * math.log(2) / 0.1}.get(reference, 0.0)
    assert float(log[0][reference]) == pytest.approx(
        at_reference, abs=0.05
    )  # the model equals the reference at the first step


@pytest.mark.slow
def test_lora_in_bf16_trains_the_same_weights_as_with_pefts_casts(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(name: str) -> dict[str, torch.Tensor]:
        training = {"precision": "bf16", "gradient_checkpointing": True, "max_steps": 2}
        trainable = {"mode": "lora", "lora": {"r": 4}}
        result = run_recipe(
            recipe(tiny_model, training_sets["harmful"], tmp_path / name, "npo", trainable=trainable, training=training)
        )
        return load_file(result / "adapter_model.safetensors")

    without_casts = train("fast")
    monkeypatch.setattr(method_trainer, "without_lora_input_casts", lambda _model: nullcontext())
    with_casts = train("casts")
    assert without_casts.keys() == with_casts.keys()
    assert all(without_casts[name].equal(with_casts[name]) for name in without_casts)


def test_training_does_not_use_cudnn_attention(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enabled_in_steps = []
    compute_loss = MethodTrainer.compute_loss

    def record(*args: Any, **kwargs: Any) -> Any:
        enabled_in_steps.append(torch.backends.cuda.cudnn_sdp_enabled())
        return compute_loss(*args, **kwargs)

    monkeypatch.setattr(MethodTrainer, "compute_loss", record)
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    training = {"max_steps": 1}
    run_recipe(recipe(tiny_model, training_sets["harmful"], tmp_path / "run", "mixed_sft", training=training))
    assert enabled_in_steps == [False]
    assert torch.backends.cuda.cudnn_sdp_enabled() == enabled
