"""Checks a recipe against its data and model before anything is written or trained, and says what it would do."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from vlm_unlearn.config import Recipe
from vlm_unlearn.data.batching import PromptMeter, Turn
from vlm_unlearn.data.training_set import TrainingSet, read_training_set
from vlm_unlearn.errors import RequestError
from vlm_unlearn.methods import Method, Role, build_method
from vlm_unlearn.models.layout import decoder_layers
from vlm_unlearn.models.loading import (
    load_processor,
    local_folder,
    model_folder,
    model_skeleton,
    read_config,
    resolve_precision,
    skeleton_of,
)
from vlm_unlearn.models.shapes import KNOWN
from vlm_unlearn.models.trainable import prepare_trainable, trainable_table
from vlm_unlearn.store import digest_model
from vlm_unlearn.training.estimate import Memory, Shape, estimate
from vlm_unlearn.training.references import Source, choose_source
from vlm_unlearn.training.stream import Collator, TrainingStream

INSTALL = {
    "deepspeed": "pip install 'vlm-unlearn[deepspeed]'",
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
    if source == "copy" and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        # ZeRO-3 may hold a layer whole from one pass to the next: the reference pass would see the current weights.
        raise RequestError(
            f"method {recipe.method.name} with trainable.mode=full needs a frozen copy of what trains, which DeepSpeed hides; "
            "use recipes/engines/fsdp2.yaml, or trainable.mode=lora"
        )
    TrainingStream(training_set, method, 1, recipe.training.seed)  # refuses a set without the pairs that the method needs
    skeleton = prepare_trainable(model_skeleton(folder), recipe.trainable)
    prepare_method(method, skeleton, recipe.training.seed)
    _check_text_only(recipe, method, training_set, skeleton)
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
    deepspeed, fsdp = (os.environ.get(f"ACCELERATE_USE_{engine}") == "true" for engine in ("DEEPSPEED", "FSDP"))
    if deepspeed:
        _need("deepspeed", "deepspeed", "this engine")
    sharded = deepspeed or fsdp
    if sharded and trainable.projector == "sine":
        raise RequestError("trainable.projector=sine doesn't work with FSDP or DeepSpeed; use recipes/engines/ddp.yaml")
    if sharded and recipe.probe and recipe.probe.keep_best:
        raise RequestError("probe.keep_best doesn't work with FSDP or DeepSpeed; leave it out, or use recipes/engines/ddp.yaml")


def _check_text_only(recipe: Recipe, method: Method, training_set: TrainingSet, model: PreTrainedModel) -> None:
    """Families that take images in by cross-attention (mllama) leave those layers out where there is no image.

    Raises:
        RequestError: a set mixes examples with and without image and batches hold several, or the loss needs a layer that is left out.
    """
    crossing = getattr(model.config.get_text_config(), "cross_attention_layers", None) or []
    if not crossing:
        return
    for role in method.roles:
        without = [example.id for example in training_set.examples.get(role, ()) if example.image is None]
        if without and len(without) < len(training_set.examples[role]) and recipe.training.batch_size > 1:
            raise RequestError(
                f'{training_set.folder}: {role} example "{without[0]}" has no image, others have, and this model takes no mixed '
                "batches; set training.batch_size=1 (and more accumulation), or give every example of the set an image or none"
            )
        left_out = sorted(set(crossing) & set(method.hidden_layers))
        if without and left_out:
            raise RequestError(
                f'{training_set.folder}: {role} example "{without[0]}" has no image, and decoder layer {left_out[0]} of this model is left '
                f"out then (cross-attention layers: {', '.join(map(str, crossing))}); choose another method.layer"
            )


def _need(module: str, what: str, wish: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise RequestError(f"{wish} needs the package {module}: {INSTALL[what]}")


def prepare_method(method: Method, model: PreTrainedModel, seed: int) -> None:
    """Tells the method the model's sizes and draws its random values."""
    generator = torch.Generator().manual_seed(seed)
    method.prepare(model.config.get_text_config().hidden_size, len(decoder_layers(model)), generator)


@dataclass(frozen=True)
class Preview:
    """What a recipe would do, as far as it can be told without weights and without a network."""

    name: str
    method: str
    model: str
    model_found: bool  # False: only its shape is known
    examples: dict[str, int]  # by role
    trainable: list[tuple[str, int, int]]
    reference: Source | None
    precision: str
    processes: int
    steps: int
    samples_per_step: int  # forget samples an optimizer step, over all processes
    tokens_per_sample: dict[str, float]  # by role, image tokens included
    tokens: int  # of the whole run
    memory: Memory


def preview(recipe: Recipe) -> Preview:
    """Resolves a recipe: what would train, on what, for how many steps, in how much memory. Loads no weights and asks no network.

    Raises:
        RequestError: what `plan` refuses, as far as it shows without weights; a model that is neither here nor known.
    """
    method = build_method(recipe.method, recipe.prompt_decouple_weight)
    training_set = read_training_set(recipe.data)
    source = choose_source(recipe.reference, method.needs, recipe.trainable.mode != "full")
    count = processes()
    steps = steps_of(recipe, len(training_set.examples["forget"]), count)
    training = recipe.training
    per_step = training.batch_size * training.gradient_accumulation_steps * count
    stream = TrainingStream(training_set, method, steps * per_step, training.seed)
    folder = local_folder(recipe.model)
    if folder is None and recipe.model not in KNOWN:
        raise RequestError(f"model {recipe.model}: its config.json is not on this machine; download the model, or name a folder")
    bare = skeleton_of(read_config(folder) if folder else KNOWN[recipe.model](), recipe.model)
    config = bare.config.get_text_config()
    skeleton = prepare_trainable(bare, recipe.trainable)
    prepare_method(method, skeleton, training.seed)
    table = trainable_table(skeleton)
    tokens, answers = _lengths(recipe, stream, training_set, folder, bare.config)
    shape = Shape(
        parameters=sum(total for _, _, total in table),
        trained=sum(trained for _, trained, _ in table),
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        vocabulary=config.vocab_size,
    )
    precision = "bf16" if training.precision == "auto" else training.precision  # what a GPU gets
    batch = training.batch_size * sum(tokens.values())
    memory = estimate(
        shape,
        recipe.trainable.mode,
        precision,
        batch,
        training.batch_size * sum(answers.values()),
        training.gradient_checkpointing,
        source == "copy",
    )
    return Preview(
        name=recipe_name(recipe),
        method=recipe.method.name,
        model=recipe.model,
        model_found=folder is not None,
        examples={role: len(training_set.examples[role]) for role in method.roles if role in training_set.examples},
        trainable=table,
        reference=source,
        precision=precision,
        processes=count,
        steps=steps,
        samples_per_step=per_step,
        tokens_per_sample={role: round(value, 1) for role, value in tokens.items()},
        tokens=int(steps * per_step * sum(tokens.values())),
        memory=memory,
    )


def _lengths(
    recipe: Recipe, stream: TrainingStream, training_set: TrainingSet, folder: Path | None, config: Any, most: int = 64
) -> tuple[dict[Role, float], dict[Role, float]]:
    """Mean tokens a sample and mean answer tokens a sample by role, over the first samples of the stream.

    Without the model's tokenizer, four characters count as a token, and an image as what the configuration says.
    """
    roles = stream[0].keys()
    meter = PromptMeter(load_processor(folder, recipe.image_aspect_ratio)) if folder else None
    image_tokens = int(getattr(config, "image_seq_length", 0))  # none where images come in by cross-attention
    whole: dict[Role, float] = dict.fromkeys(roles, 0.0)
    answers: dict[Role, float] = dict.fromkeys(roles, 0.0)
    looked = min(most, len(stream))
    for position in range(looked):
        for role, example in stream[position].items():
            answer = len(example.answer) / 4
            if meter:
                history = tuple((turn.question, turn.answer) for turn in example.history)
                turn = Turn(example.id, training_set.image_path(example), example.question, example.answer, history)
                tokens, answer = meter.tokens_in_all(turn), meter.tokens_in_all(turn) - meter.tokens(turn)
            else:
                rounds = sum(len(turn.question) + len(turn.answer) for turn in example.history)
                tokens = int((rounds + len(example.question)) / 4 + answer) + (image_tokens if example.image else 0)
            whole[role] += min(tokens, recipe.training.max_length) / looked
            answers[role] += answer / looked
    return whole, answers
