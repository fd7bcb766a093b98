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
from vlm_unlearn.modeling.loader import build_skeleton, find_local_model, load_processor, read_config
from vlm_unlearn.modeling.shapes import PUBLISHED_CONFIGS
from vlm_unlearn.modeling.trainable import trainable_table
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.store import RunDirectory
from vlm_unlearn.training.estimate import Memory, ModelSize, estimate
from vlm_unlearn.training.plan import (
    batch_layout,
    check_model,
    check_recipe,
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
    memory: Memory
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
        UnlearningCollator(processor, training_set, method, training.max_length).check_lengths()
    skeleton = VisionLanguageModel(build_skeleton(config, recipe.model), processor)
    prepared = check_model(recipe, method, training_set, skeleton)
    table = trainable_table(prepared)
    tokens, answer_tokens = _mean_lengths(recipe, stream, training_set, processor, config)
    precision = "bf16" if training.precision == "auto" else training.precision  # bf16 is the default of a GPU
    memory = estimate(
        size=_model_size(table, config.get_text_config()),
        mode=recipe.trainable.mode,
        precision=precision,
        tokens=batch_size * sum(tokens.values()),
        answer_tokens=batch_size * sum(answer_tokens.values()),
        checkpointing=training.gradient_checkpointing,
        frozen_copy=strategy == "copy",
        defense_copies=sum(defense.weight_copies for defense in build_defenses(recipe.defense)),
    )
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
        memory=memory,
        prefix_sharing_unsupported_reason=sharing_unsupported_reason(recipe, prepared),
    )


def _model_size(table: list[tuple[str, int, int]], text_config: Any) -> ModelSize:
    return ModelSize(
        parameters=sum(total for _, _, total in table),
        trained=sum(trained for _, trained, _ in table),
        hidden_size=text_config.hidden_size,
        layers=text_config.num_hidden_layers,
        vocabulary=text_config.vocab_size,
    )


def _mean_lengths(
    recipe: Recipe,
    stream: UnlearningStream,
    training_set: UnlearningDataset,
    processor: Processor | None,
    config: Any,
    max_samples: int = 64,
) -> tuple[dict[Role, float], dict[Role, float]]:
    """Returns the mean number of tokens and of answer tokens per sample by role, over the first samples of the stream.

    Without the model's tokenizer, four characters count as one token, and an image as the number of tokens in the
    config.
    """
    samples = [item for position in range(min(max_samples, len(stream))) if (item := stream[position])]
    roles = samples[0].keys() if samples else ()
    meter = PromptMeter(processor) if processor else None
    image_tokens = int(getattr(config, "image_seq_length", 0))  # 0 for families with cross-attention to images
    mean_tokens: dict[Role, float] = dict.fromkeys(roles, 0.0)
    mean_answer_tokens: dict[Role, float] = dict.fromkeys(roles, 0.0)
    for item in samples:
        for role, example in item.items():
            answer_tokens = len(example.answer) / 4
            if meter:
                turn = Turn.of_example(example, training_set.image(example))
                tokens = meter.total_tokens(turn)
                answer_tokens = tokens - meter.prompt_tokens(turn)
            else:
                characters = sum(len(turn.question) + len(turn.answer) for turn in example.history)
                characters += len(example.question)
                tokens = int(characters / 4 + answer_tokens) + (image_tokens if example.image else 0)
            mean_tokens[role] += min(tokens, recipe.training.max_length) / len(samples)
            mean_answer_tokens[role] += answer_tokens / len(samples)
    return mean_tokens, mean_answer_tokens
