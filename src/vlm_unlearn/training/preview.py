"""Previews what a recipe would do, without weights and without a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlm_unlearn.config import Recipe
from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.data.encoding import PromptMeter, Turn
from vlm_unlearn.data.processor_call import Processor
from vlm_unlearn.distributed import world_size
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.methods import Role
from vlm_unlearn.methods.wrappers import build_defenses
from vlm_unlearn.modeling.loader import (
    build_skeleton,
    default_device,
    find_local_model,
    load_processor,
    read_config,
    resolve_precision,
)
from vlm_unlearn.modeling.shapes import PUBLISHED_CONFIGS
from vlm_unlearn.modeling.trainable import trainable_table
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.records import Example
from vlm_unlearn.store import RunDirectory
from vlm_unlearn.training.device_memory import free_memory
from vlm_unlearn.training.estimate import Memory, estimate, largest_pass, model_size
from vlm_unlearn.training.gradient_checkpointing import CheckpointingChoice, choose_checkpointing
from vlm_unlearn.training.plan import (
    batch_layout,
    check_model,
    check_recipe,
    engine,
    recipe_name,
    sharing_unsupported_reason,
    steps_of,
    training_threads,
)
from vlm_unlearn.training.published_order import build_stream
from vlm_unlearn.training.references import ReferenceStrategy
from vlm_unlearn.training.stream import UnlearningCollator, UnlearningStream


@dataclass(frozen=True)
class Preview:
    """What a recipe would do. ``train --plan --json`` prints these fields."""

    name: str
    method: str
    model: str
    model_found: bool  # False if only the shape of the model is available
    examples: dict[str, int]  # by role
    trainable: list[tuple[str, int, int]]  # as in `Plan`
    reference: ReferenceStrategy | None
    precision: str
    threads: int | None  # of the CPU of this machine that compute, None with a GPU
    processes: int
    steps: int
    samples_per_step: int  # forget samples per optimizer step, over all processes
    tokens_per_sample: dict[str, float]  # mean by role, including image tokens
    tokens: int  # of the entire run
    gradient_checkpointing: CheckpointingChoice  # on this machine if the setting is ``auto``
    memory: Memory  # of the largest pass that the data can give
    memory_with_checkpointing: bool  # True if the setting is ``true`` or ``auto``
    prefix_sharing_unsupported_reason: str | None  # None if the questions of a batch share their images


def preview(recipe: Recipe) -> Preview:
    """Returns what a recipe would train, on which data, for how many steps, and in how much memory.

    Loads no weights and accesses no network.

    Raises:
        UserError: `plan` would reject the recipe, as far as this shows without weights, or the model is neither on this
            machine nor among the models whose shape the package contains.
    """
    method, training_set, strategy = check_recipe(recipe)
    RunDirectory(recipe.output).validate_contents()
    processes, training = world_size(), recipe.training
    steps, layout = steps_of(recipe, method, training_set), batch_layout(recipe)
    batch_size, samples_per_step = layout.batch_size, layout.samples_per_step
    stream = build_stream(training_set, method, layout, steps, training.seed)
    folder = find_local_model(recipe.model)
    if folder is None and recipe.model not in PUBLISHED_CONFIGS:
        raise UserError(
            f"config.json of {quoted(recipe.model)} is not on this machine. Download the model, or pass a folder.",
            code="model-not-found",
            field="model",
        )
    config: Any = read_config(folder) if folder else PUBLISHED_CONFIGS[recipe.model]()
    processor = load_processor(folder, recipe.image_aspect_ratio) if folder else None
    if processor:
        collator = UnlearningCollator(processor, training_set, method, training.max_length)
        collator.check_lengths()
        longest = {role: collator.longest_sample(role) for role in method.requirements.roles}
    else:
        longest = {
            role: _approximate_longest(training_set, role, training.max_length, config)
            for role in method.requirements.roles
        }
    skeleton = VisionLanguageModel(build_skeleton(config, recipe.model), processor)
    prepared = check_model(recipe, method, training_set, skeleton)
    table = trainable_table(prepared)
    tokens = _mean_lengths(recipe, stream, training_set, processor, config)
    precision = "bf16" if training.precision == "auto" else training.precision  # bf16 is the default of a GPU
    pass_tokens, logit_tokens = largest_pass(
        longest, method, batch_size, training.gradient_accumulation_steps, training.tokens_per_pass
    )

    def memory_of(checkpointing: bool, compute_precision: str) -> Memory:
        return estimate(
            size=model_size(prepared),
            mode=recipe.trainable.mode,
            precision=compute_precision,
            tokens=pass_tokens,
            answer_tokens=logit_tokens,
            checkpointing=checkpointing,
            frozen_copy=strategy == "copy",
            defense_copies=sum(defense.weight_copies for defense in build_defenses(recipe.defense)),
        )

    setting = training.gradient_checkpointing
    choice = CheckpointingChoice(setting is True, "set in the recipe")
    if setting == "auto":
        device, shards = default_device(), processes if engine() in ("deepspeed", "fsdp") else 1
        needed = memory_of(False, resolve_precision(training.precision)).on_each_device(shards)
        choice = choose_checkpointing(needed, free_memory(device), device)
    return Preview(
        name=recipe_name(recipe),
        method=recipe.method.name,
        model=recipe.model,
        model_found=folder is not None,
        examples={role: len(training_set[role]) for role in method.requirements.roles if role in training_set},
        trainable=table,
        reference=strategy,
        precision=precision,
        threads=training_threads(table),
        processes=processes,
        steps=steps,
        samples_per_step=samples_per_step,
        tokens_per_sample={role: round(value, 1) for role, value in tokens.items()},
        tokens=int(steps * samples_per_step * sum(tokens.values())),
        gradient_checkpointing=choice,
        memory=memory_of(setting is not False, precision),
        memory_with_checkpointing=setting is not False,
        prefix_sharing_unsupported_reason=sharing_unsupported_reason(recipe, prepared),
    )


def _approximate_longest(training_set: UnlearningDataset, role: Role, max_length: int, config: Any) -> tuple[int, int]:
    """Returns the tokens of a role's longest sample and of its longest answer, by the number of characters."""
    examples = training_set.get(role) or training_set["forget"]  # none for refusals as answers
    tokens = max(_approximate_length(example, config) for example in examples)
    answer_tokens = max(len(example.answer) // 4 for example in examples)
    return min(tokens, max_length), min(answer_tokens, max_length)


def _approximate_length(example: Example, config: Any) -> int:
    """Returns the tokens of a sample: one for four characters, and those of an image in the model's config."""
    characters = sum(len(turn.question) + len(turn.answer) for turn in example.history)
    characters += len(example.question) + len(example.answer)
    image_tokens = int(getattr(config, "image_seq_length", 0))  # 0 for families with cross-attention to images
    return characters // 4 + (image_tokens if example.image else 0)


def _mean_lengths(
    recipe: Recipe,
    stream: UnlearningStream,
    training_set: UnlearningDataset,
    processor: Processor | None,
    config: Any,
    max_samples: int = 64,
) -> dict[Role, float]:
    """Returns the mean number of tokens per sample by role, over the first samples of the stream."""
    samples = [item for position in range(min(max_samples, len(stream))) if (item := stream[position])]
    meter = PromptMeter(processor) if processor else None
    mean_tokens: dict[Role, float] = dict.fromkeys(samples[0].keys() if samples else (), 0.0)
    for item in samples:
        for role, example in item.items():
            if meter:
                tokens = meter.total_tokens(Turn.of_example(example, training_set.image(example)))
            else:
                tokens = _approximate_length(example, config)
            mean_tokens[role] += min(tokens, recipe.training.max_length) / len(samples)
    return mean_tokens
