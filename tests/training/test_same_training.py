"""Ways to the same training: references wherever they come from, micro-batches, processes that load data, checkpointed activations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from helpers import recipe
from trained import RMU, RR, moved, weights
from vlm_unlearn.data.importers import import_vlguard
from vlm_unlearn.errors import UserError
from vlm_unlearn.training.plan import plan
from vlm_unlearn.training.runner import run_plan, run_recipe

LORA = {"mode": "lora", "lora": {"r": 4, "lora_alpha": 8}}


def test_weight_zero_is_the_bare_method_to_the_bit(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    bare = run_recipe(recipe(tiny_model, training_sets["safe_eraser"], tmp_path / "bare", "npo"))
    zero = run_recipe(
        recipe(tiny_model, training_sets["safe_eraser"], tmp_path / "zero", "npo", prompt_decouple_weight=0.0)
    )
    assert not moved(weights(bare), weights(zero))


def test_processes_that_load_data_change_nothing(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    results = []
    for workers in (0, 2):
        training = {"max_steps": 4, "per_device_train_batch_size": 2, "dataloader_num_workers": workers}
        results.append(
            weights(
                run_recipe(
                    recipe(tiny_model, training_sets["harmful"], tmp_path / str(workers), "npo", training=training)
                )
            )
        )
    assert not moved(*results)


def test_what_a_process_that_loads_data_finds_wrong_is_said_in_a_line(
    tiny_model: Path, world: Path, tmp_path: Path
) -> None:
    """An image that breaks once the run is planned."""
    copied = Path(shutil.copytree(world / "vlguard", tmp_path / "vlguard"))
    import_vlguard(copied / "train.json", copied / "train", tmp_path / "data", copied / "harmful_answers.json")
    training = {"max_steps": 4, "per_device_train_batch_size": 2, "dataloader_num_workers": 1}
    planned = plan(recipe(tiny_model, tmp_path / "data", tmp_path / "run", "ga", training=training))
    for image in (copied / "train").rglob("*.png"):
        image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(UserError, match=r"^[^\n]*: is a broken image[^\n]*$"):
        run_plan(planned)


@pytest.mark.parametrize(
    ("method", "sources"),
    [
        ({"name": "npo", "beta": 0.5, "retain_npo_weight": 1.0}, ("cache", "copy", "adapter")),
        ({"name": "npo", "paper_compat": True}, ("cache", "copy", "adapter")),
        ({"name": "dpo"}, ("cache", "copy", "adapter")),
        ({"name": "idk_dpo"}, ("cache", "copy", "adapter")),
        ("kl", ("copy", "adapter")),
        ("undial", ("copy", "adapter")),
        (RMU, ("copy", "adapter")),
        (RR, ("copy", "adapter")),
    ],
    ids=["npo", "npo-paper", "dpo", "idk_dpo", "kl", "undial", "rmu", "rr"],
)
def test_references_agree_wherever_they_come_from(
    tiny_model: Path,
    training_sets: dict[str, Path],
    tmp_path: Path,
    method: dict[str, object],
    sources: tuple[str, ...],
) -> None:
    """With dropout: the reference is the model without it. With a sine projector: what it is added to stays frozen."""
    trainable = {**LORA, "lora": {**LORA["lora"], "lora_dropout": 0.1}, "projector": "sine"}  # type: ignore[dict-item]
    results = []
    for source in sources:
        output = tmp_path / source
        run_recipe(recipe(tiny_model, training_sets["harmful"], output, method, trainable=trainable, reference=source))
        results.append(load_file(output / "model" / "adapter_model.safetensors"))
    for other in results[1:]:
        assert max(float((results[0][name] - other[name]).abs().max()) for name in other) < 1e-5


def test_a_frozen_copy_is_the_cache_in_full_training(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    for source in ("cache", "copy"):
        run_recipe(recipe(tiny_model, training_sets["harmful"], tmp_path / source, "npo", reference=source))
    cached, copied = (weights(tmp_path / source / "model") for source in ("cache", "copy"))
    assert max(float((cached[name] - copied[name]).abs().max()) for name in cached) < 1e-5


def test_rmu_under_lora_and_full_see_the_same_reference(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    first = {}
    for name, trainable in (("full", {}), ("lora", {"mode": "lora"})):
        run_recipe(recipe(tiny_model, training_sets["harmful"], tmp_path / name, RMU, trainable=trainable))
        first[name] = json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0])
    # Before the first update the model is the reference.
    assert float(first["full"]["retain_hidden"]) == pytest.approx(0.0, abs=1e-9)
    assert float(first["lora"]["retain_hidden"]) == pytest.approx(0.0, abs=1e-9)
    assert float(first["full"]["forget"]) == pytest.approx(float(first["lora"]["forget"]), abs=1e-5)


@pytest.mark.parametrize("method", ["gd", "kl", "npo", "po", "undial", "idk_dpo", RMU, RR], ids=str)
def test_accumulation_is_the_whole_batch(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, method: object
) -> None:
    """4 x 2 trains what 1 x 8 trains, though answers differ in length: each token of the step weighs the same."""
    results = []
    for name, batch, accumulation in (("whole", 8, 1), ("parts", 2, 4)):
        training = {"max_steps": 3, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        # Not the embeddings: a token that is only where a term has no gradient yet gets rounding errors, of which Adam makes whole steps.
        trainable = {"mode": "full", "layers": [0, 1], "projector": True}
        wanted = recipe(
            tiny_model,
            training_sets["safe_eraser"],
            tmp_path / name,
            method,
            training=training,
            trainable=trainable,
            prompt_decouple_weight=0.5,
        )
        results.append(weights(run_recipe(wanted)))
    assert max(float((results[0][name] - results[1][name]).abs().max()) for name in results[0]) < 1e-5
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    for whole, parts in zip(*logs, strict=True):
        assert parts == {key: pytest.approx(value, abs=1e-4, rel=1e-4) for key, value in whole.items()}


def test_the_published_counting_weighs_micro_batches_alike(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    losses = []
    for name, batch, accumulation in (("whole", 8, 1), ("parts", 2, 4)):
        training = {"max_steps": 1, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        run_recipe(
            recipe(
                tiny_model,
                training_sets["harmful"],
                tmp_path / name,
                {"name": "gd", "paper_compat": True},
                training=training,
            )
        )
        losses.append(float(json.loads((tmp_path / name / "log.jsonl").read_text())["retain"]))
    assert abs(losses[0] - losses[1]) > 1e-4


@pytest.mark.parametrize("method", [RMU, RR, "npo"], ids=["rmu", "rr", "npo"])
def test_gradient_checkpointing_changes_nothing(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, method: object
) -> None:
    """Recomputed layers run their hooks again, and the reference's values are out of the way by then."""
    results = []
    for checkpointing in (False, True):
        training = {"gradient_checkpointing": checkpointing}
        output = tmp_path / str(checkpointing)
        results.append(
            weights(run_recipe(recipe(tiny_model, training_sets["harmful"], output, method, training=training)))
        )
    assert max(float((results[0][name] - results[1][name]).abs().max()) for name in results[0]) < 1e-6
