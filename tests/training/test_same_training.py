"""Equivalent settings train the same: reference strategies, micro-batches, workers, gradient checkpointing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from helpers import raises_code, recipe
from trained import METHOD_CONFIGS, RMU, RR, StepScene, changed_names, max_difference, weights
from vlm_unlearn.data.encoding import Batch
from vlm_unlearn.data_tools.importers import import_vlguard
from vlm_unlearn.methods import METHODS, ReferenceNLL, Role
from vlm_unlearn.modeling.forward import ForwardOutput, forward
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.training.plan import plan
from vlm_unlearn.training.references import (
    AdapterReference,
    CachedReference,
    FrozenCopyReference,
    Outputs,
    Reference,
    answer_key,
    resolve_reference_strategy,
)
from vlm_unlearn.training.runner import run_plan, run_recipe

LORA = {"mode": "lora", "lora": {"r": 4, "lora_alpha": 8}}
LORA_WITH_DROPOUT = {"mode": "lora", "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}, "projector": "sine"}
SUPERVISED = [name for name, method in METHODS.items() if not method.unlearns]
REFERENCE_METHODS = [name for name, method in METHODS.items() if method(method.options_type()).requirements.references]


def log_lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


# References


class CurrentModel:
    """Uses the model in training, whose values differ from those of the reference model."""

    def outputs(self, _model: nn.Module, _batches: object, run: Callable[[], Outputs]) -> Outputs:
        return run()


def reference_output(reference: Reference, scene: StepScene, batch: Batch) -> ForwardOutput:
    output = reference.outputs(
        scene.model, {(0, "retain"): batch}, lambda: {(0, "retain"): forward(VisionLanguageModel(scene.model), batch)}
    )[0, "retain"]
    assert isinstance(output, ForwardOutput)
    return output


@pytest.mark.parametrize(
    "method",
    [
        *(METHOD_CONFIGS[name] for name in REFERENCE_METHODS),
        {"name": "npo", "beta": 0.5, "retain_npo_weight": 1.0},
        {"name": "npo", "paper_compat": True},
    ],
    ids=[*REFERENCE_METHODS, "npo-retain", "npo-paper"],
)
def test_step_with_any_reference_strategy_has_the_same_gradients(
    tiny_model: Path, training_sets: dict[str, Path], method: dict[str, object]
) -> None:
    """With dropout, which the reference does not have, and a sine projector, whose frozen weights must stay frozen."""
    scene = StepScene(tiny_model, training_sets["harmful"], method, trainable=LORA_WITH_DROPOUT)
    frozen_copy = FrozenCopyReference(scene.model)
    requirements = scene.method.requirements.references
    batches = scene.micro_batches(rows=4)
    values: dict[Role, dict[int, tuple[float, int]]] = {}
    if all(isinstance(requirement, ReferenceNLL) for requirement in requirements):
        for role in (requirement.role for requirement in requirements):
            nll_sum, tokens = reference_output(frozen_copy, scene, batches[0][role]).answer_nll
            keys = [answer_key(item[role]) for item in map(scene.stream(4).__getitem__, range(4))]
            values[role] = dict(zip(keys, zip(nll_sum.tolist(), tokens.tolist(), strict=True), strict=True))
    scene.perturb()
    names = scene.trainable_parameters().keys()
    results = {
        "copy": scene.step(batches, frozen_copy),
        "adapter": scene.step(batches, AdapterReference()),
    }
    if values:
        results["cache"] = scene.step(batches, CachedReference(values))
    assert scene.trainable_parameters().keys() == names
    assert scene.step(batches, CurrentModel()).terms != pytest.approx(results["copy"].terms, rel=1e-4)
    for result in results.values():
        assert result.gradients.keys() == names
        assert result.terms == pytest.approx(results["copy"].terms, abs=1e-5)
        assert max_difference(result.gradients, results["copy"].gradients) < 1e-5


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_reference_model_runs_without_dropout_and_gradient_and_restores_the_weights(
    tiny_model: Path, training_sets: dict[str, Path], mode: str
) -> None:
    scene = StepScene(tiny_model, training_sets["harmful"], "kl", trainable={"mode": mode})
    for module in scene.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    reference: Reference = FrozenCopyReference(scene.model) if mode == "full" else AdapterReference()
    batch = scene.micro_batches(rows=4)[0]["retain"]
    scene.model.eval()
    expected = forward(VisionLanguageModel(scene.model), batch).logits.detach()
    scene.perturb()
    scene.model.train()
    assert not torch.allclose(
        forward(VisionLanguageModel(scene.model), batch).logits, forward(VisionLanguageModel(scene.model), batch).logits
    )  # dropout
    weights_before = {name: value.detach().clone() for name, value in scene.trainable_parameters().items()}
    logits = reference_output(reference, scene, batch).logits
    assert not logits.requires_grad
    torch.testing.assert_close(logits, expected)
    assert scene.model.training
    assert not changed_names(weights_before, scene.trainable_parameters())


@pytest.mark.parametrize(
    ("method", "trainable", "strategies"),
    [("npo", {}, ("cache", "copy")), ("idk_dpo", LORA_WITH_DROPOUT, ("cache", "adapter"))],
    ids=["full", "lora"],
)
@pytest.mark.slow
def test_run_with_any_reference_strategy_trains_the_same_weights(
    tiny_model: Path,
    training_sets: dict[str, Path],
    tmp_path: Path,
    method: str,
    trainable: dict[str, object],
    strategies: tuple[str, str],
) -> None:
    results = []
    for strategy in strategies:
        output = tmp_path / strategy
        run_recipe(
            recipe(tiny_model, training_sets["harmful"], output, method, trainable=trainable, reference=strategy)
        )
        name = "adapter_model" if trainable else "model"
        results.append(load_file(output / "model" / f"{name}.safetensors"))
    assert max_difference(*results) < 1e-5


def test_reference_strategy_auto_resolves_to_the_one_with_least_memory() -> None:
    def resolve(name: str, lora: bool) -> str | None:
        method = METHODS[name](METHODS[name].options_type())
        return resolve_reference_strategy("auto", method.requirements.references, lora)

    strategies = {name: (resolve(name, lora=False), resolve(name, lora=True)) for name in ("gd", "npo", "kl", "rmu")}
    assert strategies == {
        "gd": (None, None),
        "npo": ("cache", "cache"),
        "kl": ("copy", "adapter"),
        "rmu": ("copy", "adapter"),
    }


def test_rmu_in_full_and_lora_training_has_the_same_first_loss(
    tiny_model: Path, training_sets: dict[str, Path]
) -> None:
    terms = {}
    for mode in ("full", "lora"):
        scene = StepScene(tiny_model, training_sets["harmful"], RMU, trainable={"mode": mode})
        reference: Reference = AdapterReference() if mode == "lora" else FrozenCopyReference(scene.model)
        terms[mode] = scene.step(scene.micro_batches(rows=4), reference).terms
        assert terms[mode]["retain_hidden"] == pytest.approx(0.0, abs=1e-9)  # the model still equals the reference
    assert terms["full"]["forget"] == pytest.approx(terms["lora"]["forget"], abs=1e-5)


# Accumulation


@pytest.mark.parametrize(
    ("method", "data", "weight"),
    [
        # Decoupling adds a term to the others. Without it, some representative methods are enough for test-fast.
        pytest.param(config, data, weight, id=f"{name}-{kind}", marks=marks)
        for name, config in METHOD_CONFIGS.items()
        for kind, data, weight, marks in (
            ("alone", "refusals", 0.0, () if name in ("npo", "rmu", "po", *SUPERVISED) else pytest.mark.slow),
            ("decoupled", "safe_eraser", 0.5, ()),
        )
    ],
)
def test_step_of_four_micro_batches_has_the_gradients_of_one_batch(
    tiny_model: Path, training_sets: dict[str, Path], method: dict[str, object], data: str, weight: float
) -> None:
    """4 x 2 samples give the gradients of 1 x 8, although answers differ in length: each token has the same weight."""
    if method["name"] == "dpo":  # no other set has preferred examples
        data, weight = "harmful", 0.0
    scene = StepScene(tiny_model, training_sets[data], method, weight)
    reference = FrozenCopyReference(scene.model)
    scene.perturb()
    single = scene.step(scene.micro_batches(rows=8), reference)
    split = scene.step(scene.micro_batches(rows=2, count=4), reference)
    assert split.terms == pytest.approx(single.terms, abs=1e-4, rel=1e-4)
    assert max_difference(split.gradients, single.gradients) < 1e-5


@pytest.mark.slow
def test_run_with_accumulation_trains_the_weights_of_one_batch(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    """Through the Trainer: 4 x 2 samples per step train the weights that 1 x 8 samples train."""
    results, logs = [], []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        output = tmp_path / str(batch_size)
        training = {
            "max_steps": 3,
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": accumulation,
        }
        # Without the embeddings: the gradient of a token that occurs only where a term has none yet is a rounding
        # error, which Adam turns into a full-size step.
        trainable = {"mode": "full", "layers": [0, 1], "projector": True}
        run_recipe(
            recipe(
                tiny_model,
                training_sets["safe_eraser"],
                output,
                RMU,
                training=training,
                trainable=trainable,
                prompt_decouple_weight=0.5,
            )
        )
        results.append(weights(output / "model"))
        logs.append(log_lines(output))
    assert max_difference(*results) < 1e-5
    for single, split in zip(*logs, strict=True):
        assert split == {key: pytest.approx(value, abs=1e-4, rel=1e-4) for key, value in single.items()}


@pytest.mark.slow
def test_run_with_paper_compat_gives_micro_batches_the_same_weight(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    losses = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        output = tmp_path / str(batch_size)
        training = {
            "max_steps": 1,
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": accumulation,
        }
        method = {"name": "gd", "paper_compat": True}
        run_recipe(recipe(tiny_model, training_sets["harmful"], output, method, training=training))
        losses.append(log_lines(output)[0]["retain"])
    assert abs(losses[0] - losses[1]) > 1e-4


# Gradient checkpointing and DataLoader workers


@pytest.mark.parametrize("method", [RMU, RR, "npo"], ids=["rmu", "rr", "npo"])
def test_step_with_gradient_checkpointing_has_the_same_gradients(
    tiny_model: Path, training_sets: dict[str, Path], method: object
) -> None:
    """The backward pass recomputes layers and runs their hooks again, after the reference's values are swapped out."""
    scene = StepScene(tiny_model, training_sets["harmful"], method)
    reference = FrozenCopyReference(scene.model)
    scene.perturb()
    batches = scene.micro_batches(rows=4)
    passes: list[torch.Tensor] = []
    norm = scene.model.model.language_model.layers[0].input_layernorm
    norm.register_forward_hook(lambda module, inputs, output: passes.append(output))
    plain = scene.step(batches, reference)
    plain_passes = len(passes)
    scene.model.activation_checkpointing_enable({"use_reentrant": False})
    checkpointed = scene.step(batches, reference)
    assert len(passes) - plain_passes > plain_passes  # the backward pass ran the layer again
    assert checkpointed.terms == pytest.approx(plain.terms, abs=1e-6)
    assert max_difference(checkpointed.gradients, plain.gradients) < 1e-6


@pytest.mark.slow
@pytest.mark.multiprocess
def test_run_with_dataloader_workers_trains_the_same_weights(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    results = []
    for workers in (0, 2):
        training = {"max_steps": 4, "per_device_train_batch_size": 2, "dataloader_num_workers": workers}
        output = tmp_path / str(workers)
        results.append(
            weights(run_recipe(recipe(tiny_model, training_sets["harmful"], output, "npo", training=training)))
        )
    assert not changed_names(*results)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_dataloader_worker_with_a_broken_image_raises_one_line(tiny_model: Path, world: Path, tmp_path: Path) -> None:
    """The image breaks after the run was planned."""
    vlguard = Path(shutil.copytree(world / "vlguard", tmp_path / "vlguard"))
    import_vlguard(vlguard / "train.json", vlguard / "train", tmp_path / "data", vlguard / "harmful_answers.json")
    training = {"max_steps": 4, "per_device_train_batch_size": 2, "dataloader_num_workers": 1}
    planned = plan(recipe(tiny_model, tmp_path / "data", tmp_path / "run", "ga", training=training))
    for image in (vlguard / "train").rglob("*.png"):
        image.write_bytes(image.read_bytes()[:60])
    with raises_code("invalid-image") as caught:
        run_plan(planned)
    assert str(vlguard / "train") in str(caught.value)
    assert "\n" not in str(caught.value)
