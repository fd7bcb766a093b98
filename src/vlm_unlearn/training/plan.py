"""Validates a recipe against its data, its model and this machine before anything is written or trained."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from vlm_unlearn.config import Recipe
from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.data.processor_call import Processor
from vlm_unlearn.distributed import world_size
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.methods import METHODS, Method, build_method
from vlm_unlearn.methods.wrappers import DEFENSES, build_defenses
from vlm_unlearn.modeling.loader import model_folder, model_skeleton, resolve_precision
from vlm_unlearn.modeling.packing import prefix_sharing_unsupported_reason
from vlm_unlearn.modeling.threads import cpu_threads
from vlm_unlearn.modeling.trainable import prepare_trainable, trainable_table
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.plugins import short_name
from vlm_unlearn.training.defended_step import validate_engine
from vlm_unlearn.training.inputs import Inputs
from vlm_unlearn.training.published_order import BatchLayout, build_stream, count_steps
from vlm_unlearn.training.references import ReferenceStrategy, resolve_reference_strategy
from vlm_unlearn.training.setup import check_forget_answers, prepare_method, validate_defenses
from vlm_unlearn.training.stream import UnlearningCollator

INSTALL = {
    "deepspeed": "pip install '.[deepspeed]'",
    "tensorboard": "pip install tensorboard",
    "wandb": "pip install wandb",
    "trackio": "pip install trackio",
    "flash_attn": "pip install flash-attn",
    "bitsandbytes": "pip install '.[quantization]'",
}


def recipe_name(recipe: Recipe) -> str:
    """Returns the run's name in tables: the recipe's name, or its method with ``+pd`` for prompt decoupling.

    The names of defenses follow, such as ``npo+pd+sam``.
    """
    decoupling = ["pd"] if recipe.prompt_decouple_weight > 0 else []
    defenses = [short_name(defense.name) for defense in recipe.defense]
    return recipe.name or "+".join([short_name(recipe.method.name), *decoupling, *defenses])


@dataclass(frozen=True)
class Plan:
    """A recipe that was validated against its data and model. Nothing has been written."""

    recipe: Recipe
    method: Method
    model_path: Path  # of the base model
    processor: Processor
    training_set: UnlearningDataset
    steps: int  # optimizer steps
    reference_strategy: ReferenceStrategy | None  # None if the method needs no reference values
    precision: str
    model_digest: str
    data_digest: dict[str, str]
    trainable: list[tuple[str, int, int]]  # model component, its trained parameters, all its parameters
    prefix_sharing_unsupported_reason: str | None  # None if the questions of a batch share their images

    @property
    def threads(self) -> int | None:
        """The number of CPU threads that compute, None on a GPU. See `cpu_threads`."""
        return training_threads(self.trainable)

    @property
    def identity(self) -> dict[str, object]:
        """Everything that determines the run's weights. A run folder resumes only with the same identity."""
        # Digests replace paths. Names, logging and caches do not change the weights. The caller adds the probe's
        # digest.
        training = {"report_to", "feature_cache", "feature_cache_gb", "dataloader_num_workers", "tokens_per_pass"}
        excluded: Any = {
            "name": True,
            "output": True,
            "model": True,
            "data": True,
            "training": training,
            "probe": {"suite", "root"},
            "accept_refusals": True,
        }
        if not self.recipe.defense:  # runs of earlier versions have no such key
            excluded["defense"] = True
        method_code = METHODS.code_digest(self.recipe.method.name)
        defense_code = {
            config.name: digest
            for config in self.recipe.defense
            if (digest := DEFENSES.code_digest(config.name)) is not None
        }
        return {
            "kind": "train",
            "recipe": self.recipe.model_dump(mode="json", exclude=excluded),
            "precision": self.precision,
            "engine": engine(),
            "processes": world_size(),
            "model": self.model_digest,
            "data": self.data_digest,
            **({} if method_code is None else {"method_code": method_code}),
            **({"defense_code": defense_code} if defense_code else {}),
        }


def batch_layout(recipe: Recipe) -> BatchLayout:
    """Returns how the samples of a recipe are split into batches, on the processes of this run."""
    training = recipe.training
    return BatchLayout(training.per_device_train_batch_size, training.gradient_accumulation_steps, world_size())


def steps_of(recipe: Recipe, method: Method, training_set: UnlearningDataset) -> int:
    """Returns the number of optimizer steps of a recipe. See `count_steps`."""
    training = recipe.training
    return count_steps(training_set, method, batch_layout(recipe), training.num_train_epochs, training.max_steps)


def plan(recipe: Recipe, inputs: Inputs | None = None) -> Plan:
    """Validates a recipe against its data, its model and this machine.

    Args:
        recipe: The recipe.
        inputs: Loads the processor and the data. `SharedInputs` loads them once for several runs.

    Raises:
        UserError: The method or an option is unknown, the training set is broken, the model has no weights, ...
    """
    inputs = inputs or Inputs()
    method, training_set, strategy = check_recipe(recipe, inputs)
    check_machine(recipe)
    model_path = model_folder(recipe.model)
    processor = inputs.processor(model_path, recipe.image_aspect_ratio)
    skeleton = check_model(recipe, method, training_set, VisionLanguageModel(model_skeleton(model_path), processor))
    UnlearningCollator(processor, training_set, method, recipe.training.max_length).check_lengths()
    return Plan(
        recipe=recipe,
        method=method,
        model_path=model_path,
        processor=processor,
        training_set=training_set,
        steps=steps_of(recipe, method, training_set),
        reference_strategy=strategy,
        precision=resolve_precision(recipe.training.precision),
        model_digest=inputs.model_digest(model_path),
        data_digest=inputs.data_digest(training_set),
        trainable=trainable_table(skeleton),
        prefix_sharing_unsupported_reason=sharing_unsupported_reason(recipe, skeleton),
    )


def training_threads(trainable: list[tuple[str, int, int]]) -> int | None:
    """Returns the number of CPU threads of a training, None on a GPU.

    Args:
        trainable: As in `Plan`.
    """
    return None if torch.cuda.is_available() else cpu_threads(sum(total for _, _, total in trainable))


def sharing_unsupported_reason(recipe: Recipe, skeleton: VisionLanguageModel) -> str | None:
    """Returns why questions on one image will not share it, or None if they will."""
    attention = recipe.training.attn_implementation
    return prefix_sharing_unsupported_reason(skeleton, "sdpa" if attention == "auto" else attention)


def engine() -> Literal["deepspeed", "fsdp", "ddp", "none"]:
    """Returns the engine that distributes the training, from the environment that accelerate launch sets."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return "deepspeed"
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return "fsdp"
    return "ddp" if world_size() > 1 else "none"


def check_recipe(
    recipe: Recipe, inputs: Inputs | None = None
) -> tuple[Method, UnlearningDataset, ReferenceStrategy | None]:
    """Returns the recipe's method, training set and reference strategy after validating that they fit together.

    Raises:
        UserError: An option, the data or a combination of settings is invalid on any machine.
    """
    method = build_method(recipe.method, recipe.prompt_decouple_weight)
    training_set = (inputs or Inputs()).training_set(recipe)
    lora = recipe.trainable.mode != "full"
    strategy = resolve_reference_strategy(recipe.reference, method.requirements.references, lora)
    if not recipe.accept_refusals:
        check_forget_answers(method, training_set, f"{recipe.method.name} would unlearn", "accept_refusals=true")
    # Raises if a pair that the method needs is missing.
    build_stream(training_set, method, batch_layout(recipe), 1, recipe.training.seed, recipe.training.group_by_image)
    if recipe.training.projector_learning_rate is not None and not recipe.trainable.projector:
        raise UserError(
            "the projector is not trainable. Set trainable.projector=true, or remove this setting.",
            code="conflicting-settings",
            field="training.projector_learning_rate",
        )
    sharded = engine() in ("deepspeed", "fsdp")
    _check_defenses(recipe, method, sharded)
    if sharded and recipe.trainable.projector == "sine":
        raise UserError(
            "sine does not work with FSDP or DeepSpeed. Use recipes/engines/ddp.yaml.",
            code="unsupported-setting",
            field="trainable.projector",
        )
    if sharded and recipe.probe:
        raise UserError(
            "a probe does not work with FSDP or DeepSpeed. Remove it, or use recipes/engines/ddp.yaml.",
            code="unsupported-setting",
            field="probe",
        )
    if strategy == "copy" and engine() == "deepspeed":
        # ZeRO-3 may keep a layer gathered from one pass to the next: the reference pass would use the current weights.
        alternative = "trainable.mode=lora" if recipe.trainable.mode == "full" else "reference=auto"
        raise UserError(
            f"method {recipe.method.name} needs a frozen copy of the trainable parameters, which DeepSpeed ZeRO-3 does "
            f"not expose. Use recipes/engines/fsdp2.yaml, or set {alternative}.",
            code="unsupported-setting",
            field="reference",
        )
    return method, training_set, strategy


def _check_defenses(recipe: Recipe, method: Method, sharded: bool) -> None:
    """Validates the defenses.

    Raises:
        UserError: A defense or an option is unknown, or the engine or the probe does not support it.
    """
    defenses = build_defenses(recipe.defense)
    validate_defenses(method, defenses)
    if defenses:
        validate_engine(sharded)
    if recipe.probe and recipe.probe.keep_best and any(defense.overrides("final_weights") for defense in defenses):
        raise UserError(
            "the defense saves other weights than those that a probe would keep. Remove keep_best or the defense.",
            code="conflicting-settings",
            field="probe.keep_best",
        )


def check_model(
    recipe: Recipe, method: Method, training_set: UnlearningDataset, skeleton: VisionLanguageModel
) -> VisionLanguageModel:
    """Returns the skeleton with its trainable parameters marked and adapters added, and prepares the method for it.

    Raises:
        UserError: The recipe or the data does not fit the model.
    """
    with torch.device("meta"):  # PEFT would draw random adapters on the CPU, hundreds of megabytes for a 7B model
        prepared = prepare_trainable(skeleton, recipe.trainable)
    prepare_method(method, prepared, recipe.training.seed)
    steps = steps_of(recipe, method, training_set)
    for defense in build_defenses(recipe.defense):
        defense.prepare(method, len(prepared.decoder_layers), steps)
    _check_examples_without_image(recipe, method, training_set, prepared)
    return prepared


def check_machine(recipe: Recipe) -> None:
    """Validates that this machine supports the recipe's settings.

    Raises:
        UserError: A GPU or a package is missing.
    """
    has_gpu = torch.cuda.is_available()
    training, attention = recipe.training, "training.attn_implementation"
    if recipe.trainable.mode == "qlora":
        if not has_gpu:
            raise UserError(
                "qlora needs a CUDA GPU. Use trainable.mode=lora.", code="missing-gpu", field="trainable.mode"
            )
        _require_package("bitsandbytes", "trainable.mode", "qlora")
    if training.attn_implementation == "flex_attention" and not has_gpu:
        raise UserError("flex_attention computes no gradients on a CPU. Use sdpa.", code="missing-gpu", field=attention)
    if training.attn_implementation == "flash_attention_2":
        if not has_gpu:
            raise UserError("flash_attention_2 needs a CUDA GPU. Use sdpa.", code="missing-gpu", field=attention)
        if resolve_precision(training.precision) != "bf16":
            raise UserError(
                "flash_attention_2 computes in bf16. Set training.precision=bf16, or use sdpa.",
                code="conflicting-settings",
                field=attention,
            )
        _require_package("flash_attn", attention, "flash_attention_2")
    for name in training.report_to:
        _require_package(name, "training.report_to", name)
    if engine() == "deepspeed":
        _require_package("deepspeed", "ACCELERATE_USE_DEEPSPEED", "DeepSpeed")


def _require_package(package: str, field: str, value: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{value} needs the package {package}. Run {INSTALL[package]}.", code="missing-package", field=field
        )


def _check_examples_without_image(
    recipe: Recipe, method: Method, training_set: UnlearningDataset, vlm: VisionLanguageModel
) -> None:
    """Validates the data for families with cross-attention layers (mllama), which skip these layers without an image.

    Raises:
        UserError: A batch could mix examples with and without image, or the loss uses a layer that may be skipped.
    """
    cross_attention = vlm.cross_attention_layers
    if not cross_attention:
        return
    skipped_layers = sorted(set(cross_attention) & set(method.requirements.hidden_layers))
    for role in method.requirements.roles:
        examples = training_set.get(role, ())
        without_image = [example.id for example in examples if example.image is None]
        if not without_image:
            continue
        if len(without_image) < len(examples) and recipe.training.per_device_train_batch_size > 1:
            raise UserError(
                f"this {role} example has no image, but others have one, and this model does not accept mixed batches. "
                "Set training.per_device_train_batch_size=1 (with more accumulation), or give every "
                f"{role} example an image, or none.",
                code="unsupported-setting",
                file=training_set.folder,
                record=without_image[0],
                field="image",
            )
        if skipped_layers:
            raise UserError(
                f"{role} example {quoted(without_image[0])} has no image, and this model skips decoder layer "
                f"{skipped_layers[0]} without an image "
                f"(cross-attention layers: {', '.join(map(str, cross_attention))}). "
                f"Choose another method.{method.layer_option}.",
                code="conflicting-settings",
                field=f"method.{method.layer_option}",
            )
