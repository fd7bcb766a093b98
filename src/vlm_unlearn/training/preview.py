"""Says what a recipe would do, without weights and without a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlm_unlearn.config import Recipe
from vlm_unlearn.data.encoding import Processor, PromptMeter, Turn
from vlm_unlearn.data.training_set import TrainingSet
from vlm_unlearn.distributed import world_size
from vlm_unlearn.errors import UserError
from vlm_unlearn.methods import Role
from vlm_unlearn.models.loader import build_skeleton, find_local_model, load_processor, read_config
from vlm_unlearn.models.shapes import PUBLISHED_CONFIGS
from vlm_unlearn.models.trainable import trainable_table
from vlm_unlearn.store import validate_same_run
from vlm_unlearn.training.estimate import Memory, Shape, estimate
from vlm_unlearn.training.plan import check_model, check_recipe, recipe_name, sharing_unsupported_reason, steps_of
from vlm_unlearn.training.references import ReferenceStrategy
from vlm_unlearn.training.stream import UnlearningCollator, UnlearningStream


@dataclass(frozen=True)
class Preview:
    """What a recipe would do, as far as it can be told without weights and without a network."""

    name: str
    method: str
    model: str
    model_found: bool  # False: only its shape is known
    examples: dict[str, int]  # by role
    trainable: list[tuple[str, int, int]]
    reference: ReferenceStrategy | None
    precision: str
    processes: int
    steps: int
    samples_per_step: int  # forget samples an optimizer step, over all processes
    tokens_per_sample: dict[str, float]  # by role, image tokens included
    tokens: int  # of the whole run
    memory: Memory
    prefix_sharing_unsupported_reason: str | None  # why questions on one image will not share it


def preview(recipe: Recipe) -> Preview:
    """Resolves a recipe: what would train, on what, for how many steps, in how much memory. Loads no weights and asks no network.

    Raises:
        UserError: what `plan` refuses, as far as it shows without weights; a model that is neither here nor known.
    """
    method, training_set, strategy = check_recipe(recipe)
    validate_same_run(recipe.output)
    count = world_size()
    steps = steps_of(recipe, len(training_set.examples["forget"]), count)
    training = recipe.training
    per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * count
    stream = UnlearningStream(training_set, method, steps * per_step, training.seed)
    folder = find_local_model(recipe.model)
    if folder is None and recipe.model not in PUBLISHED_CONFIGS:
        raise UserError(
            f"model {recipe.model}: its config.json is not on this machine; download the model, or name a folder"
        )
    bare = build_skeleton(read_config(folder) if folder else PUBLISHED_CONFIGS[recipe.model](), recipe.model)
    config = bare.config.get_text_config()
    processor = load_processor(folder, recipe.image_aspect_ratio) if folder else None
    if processor:
        UnlearningCollator(processor, training_set, method, training.max_length, {}).check_lengths()
    prepared = check_model(recipe, method, training_set, bare)
    table = trainable_table(prepared)
    tokens, answers = _lengths(recipe, stream, training_set, processor, bare.config)
    shape = Shape(
        parameters=sum(total for _, _, total in table),
        trained=sum(trained for _, trained, _ in table),
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        vocabulary=config.vocab_size,
    )
    precision = "bf16" if training.precision == "auto" else training.precision  # what a GPU gets
    batch = training.per_device_train_batch_size * sum(tokens.values())
    memory = estimate(
        shape,
        recipe.trainable.mode,
        precision,
        batch,
        training.per_device_train_batch_size * sum(answers.values()),
        training.gradient_checkpointing,
        strategy == "copy",
    )
    return Preview(
        name=recipe_name(recipe),
        method=recipe.method.name,
        model=recipe.model,
        model_found=folder is not None,
        examples={role: len(training_set.examples[role]) for role in method.roles if role in training_set.examples},
        trainable=table,
        reference=strategy,
        precision=precision,
        processes=count,
        steps=steps,
        samples_per_step=per_step,
        tokens_per_sample={role: round(value, 1) for role, value in tokens.items()},
        tokens=int(steps * per_step * sum(tokens.values())),
        memory=memory,
        prefix_sharing_unsupported_reason=sharing_unsupported_reason(recipe, method, prepared),
    )


def _lengths(
    recipe: Recipe,
    stream: UnlearningStream,
    training_set: TrainingSet,
    processor: Processor | None,
    config: Any,
    most: int = 64,
) -> tuple[dict[Role, float], dict[Role, float]]:
    """Mean tokens a sample and mean answer tokens a sample by role, over the first samples of the stream.

    Without the model's tokenizer, four characters count as a token, and an image as what the configuration says.
    """
    roles = stream[0].keys()
    meter = PromptMeter(processor) if processor else None
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
                tokens, answer = meter.total_tokens(turn), meter.total_tokens(turn) - meter.prompt_tokens(turn)
            else:
                rounds = sum(len(turn.question) + len(turn.answer) for turn in example.history)
                tokens = int((rounds + len(example.question)) / 4 + answer) + (image_tokens if example.image else 0)
            whole[role] += min(tokens, recipe.training.max_length) / looked
            answers[role] += answer / looked
    return whole, answers
