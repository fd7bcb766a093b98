"""The parts of a training run, built once from a model, its arguments and its data."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftConfig, get_peft_model
from transformers import set_seed

from vlm_unlearn import plugins
from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.data.training_set import validate_forget_answers
from vlm_unlearn.errors import UserError
from vlm_unlearn.methods import Method
from vlm_unlearn.methods.wrappers import Defense
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.store import digest_json
from vlm_unlearn.training.arguments import UNLIMITED, UnlearningConfig
from vlm_unlearn.training.published_order import build_stream, count_steps, count_warmup_steps
from vlm_unlearn.training.references import ReferenceStrategy, resolve_reference_strategy
from vlm_unlearn.training.stream import UnlearningCollator, UnlearningStream


@dataclass(frozen=True)
class TrainingParts:
    """Everything that `MethodTrainer` trains with. The parts fit each other."""

    vlm: VisionLanguageModel
    args: UnlearningConfig  # with the number of steps
    method: Method  # prepared for the model
    stream: UnlearningStream
    collator: UnlearningCollator
    reference_strategy: ReferenceStrategy | None  # None if the method needs no reference values
    run_digest: str  # of the settings and examples that determine the batches
    defenses: tuple[Defense, ...] = ()  # prepared for the run
    auto_checkpointing: bool = False  # the trainer chooses whether to use gradient checkpointing


def build_parts(
    vlm: VisionLanguageModel, args: UnlearningConfig, data: UnlearningDataset, new_adapters: bool
) -> TrainingParts:
    """Returns the parts of a run.

    Args:
        vlm: The model with its trainable parameters marked, and its processor.
        args: The arguments.
        data: The examples of each role.
        new_adapters: Whether the model without its adapters is the reference model. It is not if the adapters were
            trained before.

    Raises:
        UserError: A setting does not fit the model or the data.
    """
    args, method = copy.copy(args), args.build_method()
    auto_checkpointing = args.gradient_checkpointing == "auto"
    if auto_checkpointing:
        args.set_gradient_checkpointing(False)
    layout = args.batch_layout()
    args.max_steps = count_steps(data, method, layout, args.num_train_epochs, args.max_steps)
    if 0 < args.warmup_steps < 1:  # a fraction of the steps
        args.warmup_steps = count_warmup_steps(method, args.warmup_steps, args.max_steps)
    strategy = resolve_reference_strategy(args.reference, method.requirements.references, new_adapters)
    stream = build_stream(data, method, layout, args.max_steps, args.seed, args.group_by_image)
    collator = UnlearningCollator(vlm.processor, data, method, args.max_length or UNLIMITED)
    prepare_method(method, vlm, args.seed)
    defenses = args.build_defenses()
    validate_defenses(method, defenses)
    for defense in defenses:
        defense.prepare(method, len(vlm.decoder_layers), args.max_steps)
    if args.world_size > 1 and args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = _may_have_unused_parameters(vlm, data)
    digest = _digest_of_run(args, data)
    return TrainingParts(vlm, args, method, stream, collator, strategy, digest, defenses, auto_checkpointing)


def validate_defenses(method: Method, defenses: Sequence[Defense]) -> None:
    """Validates that defenses go with a method.

    Raises:
        UserError: The method reproduces released code, which has none.
    """
    if defenses and method.reproduced_code:
        raise UserError(
            "the released code has no defenses. Set method.paper_compat=true, or remove the defense.",
            code="conflicting-settings",
            field="defense",
        )


def check_forget_answers(method: Method, data: UnlearningDataset, harm: str, setting: str) -> None:
    """Checks that a method does not unlearn refusals, which would make the model more harmful.

    Args:
        method: The method. One that trains the model to refuse passes.
        data: The examples of each role.
        harm: The subject and verb of the error message, such as ``npo would unlearn``.
        setting: The setting that accepts the refusals.

    Raises:
        UserError: More than 5 % of the forget answers are refusals, and the method makes them less likely.
    """
    if method.unlearns and method.forget_target == "original":
        is_refusal = plugins.JUDGES["keyword"].is_refusal  # judges are above training in the order of imports
        fix = f"{harm} them. Import the set with --harmful-answers, train mixed_sft or po, or pass {setting}."
        validate_forget_answers(data["forget"], is_refusal, fix, data.folder)


def prepare_method(method: Method, vlm: VisionLanguageModel, seed: int) -> None:
    """Passes the model's sizes to the method, which draws its random values."""
    generator = torch.Generator().manual_seed(seed)
    method.prepare(vlm.hidden_size, len(vlm.decoder_layers), generator)


def mark_trainable(
    vlm: VisionLanguageModel, args: UnlearningConfig, peft_config: PeftConfig | None
) -> VisionLanguageModel:
    """Adds adapters or freezes the vision tower, and returns the model.

    Args:
        vlm: The model, changed in place.
        args: The arguments.
        peft_config: The adapters to add. None adds none.

    Raises:
        UserError: The adapters do not fit the model, or no parameter is trainable.
    """
    if peft_config is not None:
        if vlm.has_adapters:
            raise UserError(
                "the model has adapters already. Leave peft_config out to train them.",
                code="conflicting-settings",
                field="peft_config",
            )
        set_seed(args.seed)  # new adapters have random weights
        try:
            vlm = vlm.with_model(get_peft_model(vlm.model, peft_config))
        except ValueError as error:
            raise UserError(str(error).splitlines()[0][:200], code="invalid-field", field="peft_config") from None
    elif not vlm.has_adapters and args.freeze_vision_tower:
        for name, parameter in vlm.model.named_parameters():
            if vlm.component(name) == "vision tower":
                parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in vlm.model.parameters()):
        raise UserError(
            "no parameter is trainable. Pass a peft_config, or a model whose parameters require gradients.",
            code="conflicting-settings",
            field="model",
        )
    return vlm


def _may_have_unused_parameters(vlm: VisionLanguageModel, data: UnlearningDataset) -> bool:
    """Returns whether some trainable parameters may get no gradient in a step.

    These are the projector on text-only batches, and the vision layers above the one whose features the model uses.
    """
    trained = {vlm.component(name) for name, value in vlm.base_model.named_parameters() if value.requires_grad}
    text_only = any(example.image is None for role in data.values() for example in role)
    return "vision tower" in trained or text_only


def _digest_of_run(args: UnlearningConfig, data: UnlearningDataset) -> str:
    """Returns a digest of the settings and examples that determine the batches of a run. It covers no image files."""
    examples = {role: [example.model_dump() for example in rows] for role, rows in data.items()}
    settings = [args.method, args.method_args, args.prompt_decouple_weight, args.seed, args.max_steps]
    settings += [args.defense] if args.defense else []  # runs of earlier versions have none
    if args.build_method().reproduced_code:
        settings += [args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size]
    return digest_json([*settings, args.samples_per_step(), args.group_by_image, args.max_length, examples])
