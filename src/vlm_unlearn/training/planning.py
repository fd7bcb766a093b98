"""Checks a recipe against its data and model before anything is written or trained, and says what it would do."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from vlm_unlearn.config import Recipe
from vlm_unlearn.data.training_set import TrainingSet, read_training_set
from vlm_unlearn.errors import RequestError
from vlm_unlearn.methods import Method, build_method
from vlm_unlearn.models.layout import decoder_layers
from vlm_unlearn.models.loading import load_processor, model_folder, model_skeleton, resolve_precision
from vlm_unlearn.models.trainable import prepare_trainable, trainable_table
from vlm_unlearn.store import digest_model
from vlm_unlearn.training.references import Source, choose_source
from vlm_unlearn.training.stream import Collator, TrainingStream

INSTALL = {
    "tensorboard": "pip install tensorboard",
    "wandb": "pip install wandb",
    "trackio": "pip install trackio",
    "flash_attention_2": "pip install flash-attn",
    "qlora": "pip install 'vlm-unlearn[quantization]'",
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
    source: Source | None  # of reference values
    precision: str
    model_digest: str
    data_digest: dict[str, str]
    trainable: list[tuple[str, int, int]]  # part, trained parameters, all parameters

    @property
    def identity(self) -> dict[str, object]:
        """What decides the run's weights; a run folder is resumed only by the same."""
        recipe = self.recipe.model_dump(mode="json", exclude={"output", "model", "data"})
        return {
            "kind": "train",
            "recipe": recipe,
            "precision": self.precision,
            "processes": processes(),
            "model": self.model_digest,
            "data": self.data_digest,
        }


def processes() -> int:
    """How many processes train together: what torchrun and accelerate launch say."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def steps_of(recipe: Recipe, forget_examples: int, world_size: int) -> int:
    """Optimizer steps of a run: ``max_steps``, else the passes over the forget set."""
    training = recipe.training
    per_step = training.batch_size * training.gradient_accumulation_steps * world_size
    return training.max_steps or max(1, -(-int(training.epochs * forget_examples) // per_step))


def plan(recipe: Recipe) -> Plan:
    """Checks a recipe against its data and model.

    Raises:
        RequestError: unknown method or option, a missing or broken training set, a model folder without weights, ...
    """
    method = build_method(recipe.method, recipe.prompt_decouple_weight)
    check_machine(recipe)
    folder = model_folder(recipe.model)
    training_set = read_training_set(recipe.data)
    source = choose_source(recipe.reference, method.needs, recipe.trainable.mode != "full")
    TrainingStream(training_set, method, 1, recipe.training.seed)  # refuses a set without the pairs that the method needs
    skeleton = prepare_trainable(model_skeleton(folder), recipe.trainable)
    prepare_method(method, skeleton, recipe.training.seed)
    processor = load_processor(folder, recipe.image_aspect_ratio)
    Collator(processor, training_set, method, recipe.training.max_length, {}).check_lengths()
    return Plan(
        recipe=recipe,
        method=method,
        folder=folder,
        training_set=training_set,
        source=source,
        precision=resolve_precision(recipe.training.precision),
        model_digest=digest_model(folder),
        data_digest=training_set.digest(),
        trainable=trainable_table(skeleton),
    )


def check_machine(recipe: Recipe, gpu: bool | None = None) -> None:
    """Looks whether this machine can do what the recipe asks for.

    Raises:
        RequestError: a GPU or a package is missing, or two wishes don't go together.
    """
    gpu = torch.cuda.is_available() if gpu is None else gpu
    training, trainable = recipe.training, recipe.trainable
    if trainable.mode == "qlora":
        if not gpu:
            raise RequestError("trainable.mode=qlora needs a CUDA GPU; use trainable.mode=lora")
        _need("bitsandbytes", "qlora", "trainable.mode=qlora")
    if training.attn_implementation == "flash_attention_2":
        if not gpu:
            raise RequestError("training.attn_implementation=flash_attention_2 needs a CUDA GPU; use sdpa")
        if resolve_precision(training.precision) != "bf16":
            raise RequestError("training.attn_implementation=flash_attention_2 computes in bf16; set training.precision=bf16, or use sdpa")
        _need("flash_attn", "flash_attention_2", "training.attn_implementation=flash_attention_2")
    for name in training.report_to:
        _need(name, name, f"training.report_to={name}")
    if training.projector_learning_rate is not None and not trainable.projector:
        raise RequestError("training.projector_learning_rate: the projector doesn't train; set trainable.projector=true, or leave it out")
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true" or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if sharded and trainable.projector == "sine":
        raise RequestError("trainable.projector=sine doesn't work with FSDP or DeepSpeed; use recipes/engines/ddp.yaml")
    if sharded and recipe.probe and recipe.probe.keep_best:
        raise RequestError("probe.keep_best doesn't work with FSDP or DeepSpeed; leave it out, or use recipes/engines/ddp.yaml")


def _need(module: str, what: str, wish: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise RequestError(f"{wish} needs the package {module}: {INSTALL[what]}")


def prepare_method(method: Method, model: PreTrainedModel, seed: int) -> None:
    """Tells the method the model's sizes and draws its random values."""
    generator = torch.Generator().manual_seed(seed)
    method.prepare(model.config.get_text_config().hidden_size, len(decoder_layers(model)), generator)
