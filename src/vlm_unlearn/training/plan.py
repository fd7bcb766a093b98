"""Checks a recipe against its data and model before anything is written or trained, and says what it would do."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from vlm_unlearn.config import Recipe
from vlm_unlearn.data.training_set import TrainingSet, read_training_set
from vlm_unlearn.distributed import world_size
from vlm_unlearn.errors import UserError
from vlm_unlearn.methods import Method, build_method
from vlm_unlearn.models.layout import decoder_layers, get_base_model
from vlm_unlearn.models.loader import load_processor, model_folder, model_skeleton, resolve_precision
from vlm_unlearn.models.trainable import prepare_trainable, trainable_table
from vlm_unlearn.store import digest_model
from vlm_unlearn.training.packing import prefix_sharing_unsupported_reason
from vlm_unlearn.training.references import ReferenceStrategy, resolve_reference_strategy
from vlm_unlearn.training.stream import UnlearningCollator, UnlearningStream

INSTALL = {
    "deepspeed": "pip install '.[deepspeed]'",
    "tensorboard": "pip install tensorboard",
    "wandb": "pip install wandb",
    "trackio": "pip install trackio",
    "flash_attention_2": "pip install flash-attn",
    "qlora": "pip install '.[quantization]'",
}


def recipe_name(recipe: Recipe) -> str:
    """The run's name in tables: the recipe's own, else the method with ``+pd`` where prompts are decoupled."""
    return recipe.name or recipe.method.name + ("+pd" if recipe.prompt_decouple_weight > 0 else "")


@dataclass(frozen=True)
class Plan:
    """A recipe that was checked against its data and model; nothing has been written."""

    recipe: Recipe
    method: Method
    folder: Path  # the base model's
    training_set: TrainingSet
    reference_strategy: ReferenceStrategy | None  # of reference values
    precision: str
    model_digest: str
    data_digest: dict[str, str]
    trainable: list[tuple[str, int, int]]  # part, trained parameters, all parameters
    prefix_sharing_unsupported_reason: (
        str | None
    )  # why each question runs its own image; None: those of a batch on one image run it once

    @property
    def identity(self) -> dict[str, object]:
        """What decides the run's weights; a run folder is resumed only by the same."""
        # Digests stand for paths; a name and what is logged or kept where change no weight. The probe's own digest comes with the probe.
        training = {"report_to", "feature_cache", "feature_cache_gb", "dataloader_num_workers"}
        left_out: Any = {
            "name": True,
            "output": True,
            "model": True,
            "data": True,
            "training": training,
            "probe": {"suite", "root"},
        }
        recipe = self.recipe.model_dump(mode="json", exclude=left_out)
        return {
            "kind": "train",
            "recipe": recipe,
            "precision": self.precision,
            "engine": engine(),
            "processes": world_size(),
            "model": self.model_digest,
            "data": self.data_digest,
        }


def steps_of(recipe: Recipe, forget_examples: int, world_size: int) -> int:
    """Optimizer steps of a run: ``max_steps``, else the passes over the forget set."""
    training = recipe.training
    per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * world_size
    return training.max_steps or max(1, -(-int(training.num_train_epochs * forget_examples) // per_step))


def plan(recipe: Recipe) -> Plan:
    """Checks a recipe against its data and model.

    Raises:
        UserError: unknown method or option, a missing or broken training set, a model folder without weights, ...
    """
    method, training_set, strategy = check_recipe(recipe)
    check_machine(recipe)
    folder = model_folder(recipe.model)
    skeleton = check_model(recipe, method, training_set, model_skeleton(folder))
    processor = load_processor(folder, recipe.image_aspect_ratio)
    UnlearningCollator(processor, training_set, method, recipe.training.max_length, {}).check_lengths()
    return Plan(
        recipe=recipe,
        method=method,
        folder=folder,
        training_set=training_set,
        reference_strategy=strategy,
        precision=resolve_precision(recipe.training.precision),
        model_digest=digest_model(folder),
        data_digest=training_set.digest(),
        trainable=trainable_table(skeleton),
        prefix_sharing_unsupported_reason=sharing_unsupported_reason(recipe, method, skeleton),
    )


def sharing_unsupported_reason(recipe: Recipe, method: Method, skeleton: PreTrainedModel) -> str | None:
    """Why questions on one image will not share it, or None."""
    attention = recipe.training.attn_implementation
    return prefix_sharing_unsupported_reason(
        get_base_model(skeleton), method, "sdpa" if attention == "auto" else attention
    )


def engine() -> Literal["deepspeed", "fsdp", "ddp", "none"]:
    """What accelerate launch says that splits the work."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return "deepspeed"
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return "fsdp"
    return "ddp" if world_size() > 1 else "none"


def check_recipe(recipe: Recipe) -> tuple[Method, TrainingSet, ReferenceStrategy | None]:
    """The recipe's method, training set and source of reference values, if they go together.

    Raises:
        UserError: what is wrong on any machine: options, data, wishes that don't go together.
    """
    method = build_method(recipe.method, recipe.prompt_decouple_weight)
    training_set = read_training_set(recipe.data)
    strategy = resolve_reference_strategy(
        recipe.reference, method.reference_requirements, recipe.trainable.mode != "full"
    )
    UnlearningStream(
        training_set, method, 1, recipe.training.seed
    )  # refuses a set without the pairs that the method needs
    if recipe.training.projector_learning_rate is not None and not recipe.trainable.projector:
        raise UserError(
            "training.projector_learning_rate: the projector doesn't train; set trainable.projector=true, or leave it out"
        )
    sharded = engine() in ("deepspeed", "fsdp")
    if sharded and recipe.trainable.projector == "sine":
        raise UserError("trainable.projector=sine doesn't work with FSDP or DeepSpeed; use recipes/engines/ddp.yaml")
    if sharded and recipe.probe:
        raise UserError("probe doesn't work with FSDP or DeepSpeed; leave it out, or use recipes/engines/ddp.yaml")
    if strategy == "copy" and engine() == "deepspeed":
        # ZeRO-3 may hold a layer whole from one pass to the next: the reference pass would see the current weights.
        way_out = "trainable.mode=lora" if recipe.trainable.mode == "full" else "reference=auto"
        raise UserError(
            f"method {recipe.method.name} needs a frozen copy of what trains, which DeepSpeed hides; "
            f"use recipes/engines/fsdp2.yaml, or {way_out}"
        )
    return method, training_set, strategy


def check_model(
    recipe: Recipe, method: Method, training_set: TrainingSet, skeleton: PreTrainedModel
) -> PreTrainedModel:
    """The skeleton with what trains marked, adapters in place; the method is told its sizes.

    Raises:
        UserError: the recipe or the data don't fit the model.
    """
    prepared = prepare_trainable(skeleton, recipe.trainable)
    prepare_method(method, prepared, recipe.training.seed)
    _check_text_only(recipe, method, training_set, prepared)
    return prepared


def check_machine(recipe: Recipe) -> None:
    """Looks whether this machine can do what the recipe asks for.

    Raises:
        UserError: a GPU or a package is missing.
    """
    gpu = torch.cuda.is_available()
    training, trainable = recipe.training, recipe.trainable
    if trainable.mode == "qlora":
        if not gpu:
            raise UserError("trainable.mode=qlora needs a CUDA GPU; use trainable.mode=lora")
        _need("bitsandbytes", "qlora", "trainable.mode=qlora")
    if training.attn_implementation == "flex_attention" and not gpu:
        raise UserError("training.attn_implementation=flex_attention computes no gradients on a CPU; use sdpa")
    if training.attn_implementation == "flash_attention_2":
        if not gpu:
            raise UserError("training.attn_implementation=flash_attention_2 needs a CUDA GPU; use sdpa")
        if resolve_precision(training.precision) != "bf16":
            raise UserError(
                "training.attn_implementation=flash_attention_2 computes in bf16; set training.precision=bf16, or use sdpa"
            )
        _need("flash_attn", "flash_attention_2", "training.attn_implementation=flash_attention_2")
    for name in training.report_to:
        _need(name, name, f"training.report_to={name}")
    if engine() == "deepspeed":
        _need("deepspeed", "deepspeed", "this engine")


def _check_text_only(recipe: Recipe, method: Method, training_set: TrainingSet, model: PreTrainedModel) -> None:
    """Families that take images in by cross-attention (mllama) leave those layers out where there is no image.

    Raises:
        UserError: a set mixes examples with and without image and batches hold several, or the loss needs a layer that is left out.
    """
    crossing = getattr(model.config.get_text_config(), "cross_attention_layers", None) or []
    if not crossing:
        return
    for role in method.roles:
        without = [example.id for example in training_set.examples.get(role, ()) if example.image is None]
        if (
            without
            and len(without) < len(training_set.examples[role])
            and recipe.training.per_device_train_batch_size > 1
        ):
            raise UserError(
                f'{training_set.folder}: {role} example "{without[0]}" has no image, others have, and this model takes no mixed '
                "batches; set training.per_device_train_batch_size=1 (and more accumulation), or give every example of the set an image or none"
            )
        left_out = sorted(set(crossing) & set(method.hidden_layers))
        if without and left_out:
            raise UserError(
                f'{training_set.folder}: {role} example "{without[0]}" has no image, and decoder layer {left_out[0]} of this model is left '
                f"out then (cross-attention layers: {', '.join(map(str, crossing))}); choose another method.layer"
            )


def _need(module: str, what: str, wish: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{wish} needs the package {module}: {INSTALL[what]}")


def prepare_method(method: Method, model: PreTrainedModel, seed: int) -> None:
    """Tells the method the model's sizes and draws its random values."""
    generator = torch.Generator().manual_seed(seed)
    method.prepare(model.config.get_text_config().hidden_size, len(decoder_layers(model)), generator)
