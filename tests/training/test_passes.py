"""Micro-batches that run together have the losses and gradients of micro-batches one by one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import recipe
from trained import METHOD_CONFIGS, StepScene, max_difference, relative_difference
from vlm_unlearn.data.encoding import Batch
from vlm_unlearn.methods import Role
from vlm_unlearn.modeling.packing import NO_IMAGE
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.training.passes import Passes, group_micro_batches, tokens_per_pass
from vlm_unlearn.training.references import FrozenCopyReference, Reference
from vlm_unlearn.training.runner import run_recipe

PAPER_COMPAT = ("npo", "rmu", "gd", "kl", "po", "ga")
CONFIGS = {
    **METHOD_CONFIGS,
    **{f"{name}-paper": {**METHOD_CONFIGS[name], "paper_compat": True} for name in PAPER_COMPAT},
}


@pytest.mark.parametrize("max_tokens", [100, 10_000])
@pytest.mark.parametrize("name", CONFIGS)
def test_micro_batches_together_have_the_gradients_of_micro_batches_one_by_one(
    tiny_model: Path, training_sets: dict[str, Path], name: str, max_tokens: int
) -> None:
    """Answers differ in length, some examples have no image, and some questions share one."""
    data, weight = ("harmful", 0.0) if name == "dpo" else ("safe_eraser", 0.5)
    scene = StepScene(tiny_model, training_sets[data], CONFIGS[name], weight)
    reference = FrozenCopyReference(scene.model)
    scene.perturb()
    batches = scene.micro_batches(rows=2, count=4)
    single = scene.step(batches, reference)
    together = scene.step(batches, reference, max_tokens=max_tokens)
    assert together.terms == pytest.approx(single.terms, abs=1e-5)
    assert together.gradients.keys() == single.gradients.keys()
    assert max_difference(together.gradients, single.gradients) < 1e-5


@pytest.mark.parametrize("name", ["kl", "rmu", "rr", "undial"])
def test_reference_equals_the_model_to_the_bit_at_the_start(
    tiny_model: Path, training_sets: dict[str, Path], name: str
) -> None:
    """Noise of rounding would become full-size steps of Adam."""
    scene = StepScene(tiny_model, training_sets["safe_eraser"], METHOD_CONFIGS[name], 0.5)
    reference = FrozenCopyReference(scene.model)
    scene.model.eval()
    for group in group_micro_batches(scene.micro_batches(rows=1, count=6), 500):
        passes = Passes(VisionLanguageModel(scene.model), group, scene.method, reference, max_tokens=500)
        for number in range(len(group)):
            for requirement in scene.method.requirements.references:
                current = passes.current((number, requirement.role))
                output: Any = passes.reference((number, requirement.role))
                assert current.logits[: len(output.logits)].equal(output.logits) or not len(output.logits)
                for layer, states in output.hidden.items():
                    assert current.hidden[layer].equal(states)


def positions_run(scene: StepScene, batches: list[dict[Role, Batch]], reference: Reference, max_tokens: int) -> int:
    """Returns the number of positions that run through the model in a step."""
    counts: list[int] = []
    layer = VisionLanguageModel(scene.model).decoder_layers[0]
    hook = layer.register_forward_hook(lambda _module, inputs, _output: counts.append(inputs[0][..., 0].numel()))
    scene.step(batches, reference, max_tokens=max_tokens)
    hook.remove()
    return sum(counts)


def test_reference_model_runs_only_what_the_loss_compares(tiny_model: Path, training_sets: dict[str, Path]) -> None:
    scene = StepScene(tiny_model, training_sets["refusals"], "kl")
    batches = scene.micro_batches(rows=1, count=4)
    for batch in batches:  # no image in common
        for role, number in (("forget", 0), ("retain", 1)):
            images = batch[role]["images"]  # type: ignore[index]
            batch[role]["images"] = torch.where(images == NO_IMAGE, images, images + number)  # type: ignore[index]
    reference = FrozenCopyReference(scene.model)
    together, separate = (positions_run(scene, batches, reference, limit) for limit in (10_000, 0))
    assert together < 0.85 * separate


@pytest.mark.parametrize("name", ["gd", "npo", "simnpo", "undial", "idk_dpo"])
def test_retain_examples_without_weight_are_not_run(
    tiny_model: Path, training_sets: dict[str, Path], name: str
) -> None:
    scenes = [
        StepScene(tiny_model, training_sets["refusals"], {**METHOD_CONFIGS[name], "retain_weight": weight})
        for weight in (0.0, 1e-9)
    ]
    results = []
    for scene in scenes:
        reference = FrozenCopyReference(scene.model)
        scene.perturb()
        batches = scene.micro_batches(rows=2)
        results.append((scene.step(batches, reference), positions_run(scene, batches, reference, 0)))
    (without, fewer), (with_retain, more) = results
    assert "retain" not in without.terms
    assert with_retain.terms["forget"] == pytest.approx(without.terms["forget"], abs=1e-5)
    assert max_difference(without.gradients, with_retain.gradients) < 1e-5
    assert fewer < more


def micro_batch(sizes: Mapping[str, int], images: Mapping[str, int] | None = None) -> dict[Role, Batch]:
    """Returns one row per role with a number of tokens, on an image."""
    return {
        role: {  # type: ignore[misc]
            "input_ids": torch.zeros(1, size, dtype=torch.long),
            "images": torch.tensor([(images or {}).get(role, NO_IMAGE)]),
        }
        for role, size in sizes.items()
    }


def sizes_of(groups: list[list[Mapping[Role, Batch]]]) -> list[list[int]]:
    return [[sum(batch["input_ids"].shape[1] for batch in batches.values()) for batches in group] for group in groups]


def test_groups_contain_every_micro_batch_once_and_keep_to_the_limit() -> None:
    micro_batches = [micro_batch({"forget": size, "retain": 10}) for size in (50, 20, 200, 30, 40, 10, 60)]
    groups = sizes_of(group_micro_batches(micro_batches, 120))  # type: ignore[arg-type]
    assert sorted(size for group in groups for size in group) == [20, 30, 40, 50, 60, 70, 210]
    assert all(sum(group) <= 120 or len(group) == 1 for group in groups)
    assert len(groups) <= 5
    assert sizes_of(group_micro_batches(micro_batches, 0)) == [[60], [30], [210], [40], [50], [20], [70]]  # type: ignore[arg-type]
    assert len(group_micro_batches(micro_batches, 10**9)) == 1
    assert group_micro_batches([], 100) == []


def test_auto_is_three_micro_batches_and_at_most_2048_tokens() -> None:
    assert tokens_per_pass("auto", 150) == 450
    assert tokens_per_pass("auto", 1000) == 2048
    assert tokens_per_pass("auto", 0) == 0
    assert tokens_per_pass(123, 150) == 123


def test_micro_batches_with_a_common_image_are_in_one_group() -> None:
    micro_batches = [
        micro_batch({"forget": 10, "retain": 10}, {"forget": forget, "retain": retain})
        for forget, retain in ((1, 2), (3, 4), (5, 6), (7, 2), (8, 9), (1, 10))
    ]
    groups = group_micro_batches(micro_batches, 60)  # type: ignore[arg-type]
    images = [{int(batches["forget"]["images"]) for batches in group} for group in groups]
    assert {1, 7} <= next(group for group in images if 1 in group)


@pytest.mark.parametrize("method", ["gd", {"name": "kl", "paper_compat": True}])
def test_run_has_the_same_weights_and_log_with_any_number_of_tokens_per_pass(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, method: Any
) -> None:
    from safetensors.torch import load_file

    weights, logs = [], []
    for limit in (0, 150, "auto"):
        output = tmp_path / str(limit)
        training = {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 4,
            "tokens_per_pass": limit,
        }
        run_recipe(recipe(tiny_model, training_sets["safe_eraser"], output, method, training=training))
        weights.append(load_file(output / "model" / "model.safetensors"))
        logs.append((output / "log.jsonl").read_text().splitlines())
    assert len(logs[0]) > 2
    start = load_file(tiny_model / "model.safetensors")
    for other in weights[1:]:
        assert relative_difference(weights[0], other, start) < 1e-3
    assert [len(lines) for lines in logs] == [len(logs[0])] * 3
