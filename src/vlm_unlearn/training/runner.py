"""Runs a validated recipe to the saved model and resumes after an interruption."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PrinterCallback, TrainingArguments, set_seed

from vlm_unlearn.config import Recipe
from vlm_unlearn.data.encoding import Processor, move
from vlm_unlearn.distributed import world_size
from vlm_unlearn.errors import RunError, UserError
from vlm_unlearn.methods import ReferenceNLL, Role
from vlm_unlearn.modeling.attention import without_cudnn_attention
from vlm_unlearn.modeling.features import FeatureCache, cache_vision_features
from vlm_unlearn.modeling.forward import forward, packing_of
from vlm_unlearn.modeling.layout import get_base_model, layout_of, vision_tower
from vlm_unlearn.modeling.loader import BASE_MODEL_FILE, load_model, load_processor, model_skeleton
from vlm_unlearn.modeling.sine import merge_sine
from vlm_unlearn.modeling.trainable import prepare_trainable
from vlm_unlearn.records import Example
from vlm_unlearn.store import (
    cache_folder,
    digest_json,
    lock_run,
    open_run,
    package_versions,
    read_json,
    read_manifest,
    record_cost,
    user_path,
    write_json,
)
from vlm_unlearn.training.callbacks import (
    LogCallback,
    OnStep,
    Probe,
    ProbeCallback,
    stop_reason,
    tensorboard_callback,
)
from vlm_unlearn.training.plan import Plan, plan, prepare_method, steps_of
from vlm_unlearn.training.references import AdapterReference, FrozenCopyReference, ReferenceModel, cached_nll
from vlm_unlearn.training.stream import NLL, UnlearningCollator, UnlearningStream
from vlm_unlearn.training.trainer import UnlearningTrainer, last_complete_checkpoint


def run_recipe(recipe: Recipe, on_step: OnStep | None = None, probe: Probe | None = None) -> Path:
    """Validates a recipe and trains it. Same as `run_plan` of `plan`."""
    return run_plan(plan(recipe), on_step, probe)


def run_plan(
    planned: Plan,
    on_step: OnStep | None = None,
    probe: Probe | None = None,
    on_reference: Callable[[int, int], None] | None = None,
) -> Path:
    """Trains according to a plan and returns the folder of the trained model, ``<output>/model``.

    A second call after an interruption resumes from the last complete checkpoint, bitwise exactly on a CPU. A call
    after the run is finished returns at once. Under torchrun or accelerate launch, all processes call this
    function.

    Args:
        planned: The plan.
        on_step: Called after each optimizer step with the step, the number of steps and the loss terms.
        probe: Measures the model during training. Recipes with a ``probe`` require it, for example from
            `vlm_unlearn.evaluation.probe.build_probe`.
        on_reference: Called while reference values are computed before the first step, with the number of finished
            examples and of all examples.

    Raises:
        UserError: The output folder contains another run, or another process uses it.
        RunError: The loss, the gradient or the weights became NaN or infinite. The last good checkpoint remains.
    """
    if planned.recipe.probe and probe is None:
        raise UserError(
            "the recipe has a probe. Build it with vlm_unlearn.evaluation.probe.build_probe and pass it to run_plan.",
            code="missing-setting",
            field="probe",
        )
    output = planned.recipe.output
    arguments = _training_arguments(planned)
    if arguments.world_size != world_size():
        raise UserError(
            f"the environment variable is {world_size()}, but the Trainer initialized with {arguments.world_size} "
            "process(es). See docs/scale.md.",
            code="conflicting-settings",
            field="WORLD_SIZE",
        )
    identity = {**planned.identity, "probe": probe.digest if probe else None}
    result = output / "model"
    with _lock_run_folder(output, identity, arguments) as finished:
        if not finished:
            _train(planned, arguments, on_step, probe, on_reference)
        elif not (result / "config.json").is_file() and not (result / "adapter_config.json").is_file():
            raise UserError(
                f"the run is finished, but its model folder is missing. Delete {output} and train again.",
                code="model-not-found",
                file=output,
            )
        if arguments.process_index == 0:
            for folder in (output / "checkpoints", output / "best"):  # until here, a killed run resumes from them
                shutil.rmtree(folder, ignore_errors=True)
    return result


@contextmanager
def _lock_run_folder(output: Path, identity: Mapping[str, object], arguments: TrainingArguments) -> Iterator[bool]:
    """Locks the run folder for all processes of the run. Yields whether the run is already finished."""
    state = PartialState()
    if arguments.process_index == 0:
        with lock_run(output):
            finished = open_run(output, identity)["finished"]
            state.wait_for_everyone()
            yield finished
            state.wait_for_everyone()
    else:
        state.wait_for_everyone()
        yield read_manifest(output)["finished"]
        state.wait_for_everyone()


def _train(
    planned: Plan,
    arguments: TrainingArguments,
    on_step: OnStep | None,
    probe: Probe | None,
    on_reference: Callable[[int, int], None] | None,
) -> None:
    """Trains from the last complete checkpoint, or from the base model, and saves the result."""
    recipe, output = planned.recipe, planned.recipe.output
    log_callback = LogCallback(output, on_step, is_main_process=arguments.process_index == 0)
    trainer, processor = _build_trainer(planned, arguments, on_reference)
    trainer.add_callback(log_callback)
    if "tensorboard" in recipe.training.report_to and arguments.process_index == 0:
        trainer.add_callback(tensorboard_callback(output))
    probe_callback = ProbeCallback(recipe.probe, probe, trainer, output) if recipe.probe and probe else None
    if probe_callback:
        trainer.add_callback(probe_callback)
    checkpoint = last_complete_checkpoint(output / "checkpoints")
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except RunError:
        log_callback.write_log(trainer.state)  # so that the loss curves show the divergence
        raise
    if probe_callback:
        probe_callback.load_best()
    _save_result(trainer, processor, planned)
    if arguments.process_index == 0:
        outcome = {"steps": trainer.state.global_step, "stopped": stop_reason(trainer.state.log_history)}
        record_cost(output, log_callback.elapsed_seconds(), finished=True, ended=outcome)


def _build_trainer(
    planned: Plan, arguments: TrainingArguments, on_reference: Callable[[int, int], None] | None
) -> tuple[UnlearningTrainer, Processor]:
    """Loads the model, computes or prepares the reference values, and returns the trainer and the processor."""
    recipe, method, mode = planned.recipe, planned.method, planned.recipe.trainable.mode
    processor = load_processor(planned.folder, recipe.image_aspect_ratio)
    # Full training keeps float32 master weights and computes under autocast. LoRA's frozen base has the compute
    # precision.
    precision = "fp32" if mode == "full" else planned.precision
    model = load_model(planned.folder, precision, recipe.training.attn_implementation, in_4_bits=mode == "qlora")
    set_seed(recipe.training.seed)  # after loading, which uses random numbers under some engines
    model = prepare_trainable(model, recipe.trainable)
    if mode != "qlora":  # 4-bit weights are already on their device
        model = model.to(arguments.device)
    _cache_features(planned, model)
    prepare_method(method, model, recipe.training.seed)
    samples_per_step = (
        arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    )
    stream = UnlearningStream(
        planned.training_set,
        method,
        arguments.max_steps * samples_per_step,
        recipe.training.seed,
        recipe.training.group_by_image,
    )
    reference: ReferenceModel | None = None
    cached: dict[Role, Mapping[str, NLL]] = {}
    if planned.reference_strategy == "cache":
        cached = _cached_references(planned, stream, model, processor, arguments.device, on_reference)
    elif planned.reference_strategy is not None:
        reference = AdapterReference() if planned.reference_strategy == "adapter" else FrozenCopyReference(model)
    if arguments.process_index == 0:
        rows = [{"part": part, "trained": trained, "parameters": total} for part, trained, total in planned.trainable]
        write_json(recipe.output / "trainable.json", rows)
        write_json(recipe.output / "recipe.json", recipe.model_dump(mode="json"))
    trainer = UnlearningTrainer(
        method=method,
        reference=reference,
        projector_learning_rate=recipe.training.projector_learning_rate,
        model=model,
        args=arguments,
        train_dataset=stream,
        data_collator=UnlearningCollator(processor, planned.training_set, method, recipe.training.max_length, cached),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, processor


def _cache_features(planned: Plan, model: torch.nn.Module) -> None:
    """Caches the vision tower's features if the tower is frozen, is not sharded and does not contain the projector."""
    training, layout = planned.recipe.training, layout_of(get_base_model(model))
    sharded = any(os.environ.get(f"ACCELERATE_USE_{engine}", "false") == "true" for engine in ("FSDP", "DEEPSPEED"))
    trainable = planned.recipe.trainable.vision_tower or layout.projector.startswith(layout.vision_tower)
    if training.feature_cache == "off" or trainable or sharded:
        return
    parameter = next(model.parameters())
    key = digest_json(
        [
            planned.model_digest,
            package_versions(),
            str(parameter.dtype),
            planned.precision,
            training.attn_implementation,
            parameter.device.type,
            planned.recipe.trainable.mode,
        ]
    )
    folder = cache_folder() / "features" / key if training.feature_cache == "disk" else None
    cache_vision_features(vision_tower(model), FeatureCache(training.feature_cache_gb * 2**30, folder))


def _training_arguments(planned: Plan) -> TrainingArguments:
    recipe, training = planned.recipe, planned.recipe.training
    steps = steps_of(recipe, len(planned.training_set["forget"]), world_size())
    arguments = TrainingArguments(
        output_dir=str(recipe.output / "checkpoints"),
        per_device_train_batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        max_steps=steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=math.ceil(training.warmup_ratio * steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        bf16=planned.precision == "bf16",
        activation_checkpointing=training.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        # ACCELERATE_TORCH_DEVICE overrides the choice of device.
        use_cpu=not torch.cuda.is_available() and "ACCELERATE_TORCH_DEVICE" not in os.environ,
        ddp_find_unused_parameters=world_size() > 1 and _may_have_unused_parameters(planned),
        save_strategy="steps",
        save_steps=training.save_steps,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        seed=training.seed,
        # The stream is already shuffled, as a function of the position. A random sampler would not resume exactly.
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_num_workers=training.dataloader_num_workers,
        label_names=["forget", "retain"],
        report_to=[name for name in training.report_to if name != "tensorboard"] or "none",
        project="vlm-unlearn",
        run_name=recipe.output.resolve().name,
        disable_tqdm=True,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # nn.DataParallel supports neither nested batches nor hooks
    return arguments


def _may_have_unused_parameters(planned: Plan) -> bool:
    """Returns whether some trainable parameters may get no gradient in a step.

    These are the projector on text-only batches, and the vision layers above the one whose features the model uses.
    """
    text_only = any(example.image is None for role in planned.training_set.values() for example in role)
    return planned.recipe.trainable.vision_tower or text_only


def _cached_references(
    planned: Plan,
    stream: UnlearningStream,
    model: torch.nn.Module,
    processor: Processor,
    device: torch.device,
    on_done: Callable[[int, int], None] | None,
) -> dict[Role, Mapping[str, NLL]]:
    """Returns the reference NLLs that the method needs, by role, from the cache folder or computed now."""
    recipe, training, data = planned.recipe, planned.recipe.training, planned.training_set
    collator = UnlearningCollator(processor, data, planned.method, training.max_length, {})
    reference_nll: dict[Role, Mapping[str, NLL]] = {}
    for requirement in planned.method.reference_requirements:
        assert isinstance(requirement, ReferenceNLL)
        role, examples = requirement.role, stream.unique_examples(requirement.role)

        def compute(batch_examples: Sequence[Example], role: Role = role) -> list[NLL]:
            batch = move(collator.encode(role, batch_examples), device, next(model.parameters()).dtype)
            with torch.no_grad(), without_cudnn_attention(), _autocast(device, planned.precision):
                output = forward(model, batch, packing=packing_of(model, batch, planned.method))
            nll_sum, tokens = output.answer_nll
            return list(zip(nll_sum.tolist(), tokens.tolist(), strict=True))

        key = digest_json(
            {
                "model": planned.model_digest,
                "versions": package_versions(),
                "weights": str(next(model.parameters()).dtype),
                "quantized": recipe.trainable.mode == "qlora",
                "precision": planned.precision,
                "attention": training.attn_implementation,
                "image_aspect_ratio": recipe.image_aspect_ratio,
                "max_length": training.max_length,
                "batch_size": training.per_device_train_batch_size,
                "rendering": 2,  # version of the conversion of turns to tokens
                "data": planned.data_digest,
                "examples": [[example.id, example.answer] for example in examples],
            }
        )
        model.eval()
        with _gathered_parameters(model):
            reference_nll[role] = cached_nll(
                cache_folder() / "reference" / f"{key}.json",
                examples,
                compute,
                training.per_device_train_batch_size,
                on_done,
            )
    return reference_nll


def _gathered_parameters(model: torch.nn.Module) -> AbstractContextManager[object]:
    """Gathers the parameters that ZeRO-3 sharded at loading. The DeepSpeed engine that does so does not exist yet."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(list(model.parameters()))
    return gathered


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def _save_result(trainer: UnlearningTrainer, processor: Processor, planned: Plan) -> None:
    """Saves the trained model or adapters, the processor and the method's state, atomically.

    Raises:
        RunError: A trained weight is NaN or infinite.
    """
    from safetensors.torch import save_file

    # All processes gather the weights that FSDP or DeepSpeed sharded, and one of them writes.
    gathered = trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.sharded else None
    if not trainer.args.should_save:
        return
    result = planned.recipe.output / "model"
    scratch = result.with_name("model.part")
    shutil.rmtree(scratch, ignore_errors=True)
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    # The loss of the last step was finite, but its update may not be.
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    for name, value in trained.items():
        if not (gathered or trained).get(name, value).isfinite().all():
            raise RunError(
                f"the trained weights are not finite ({name}). Lower training.learning_rate.", code="non-finite-weights"
            )
    merge_sine(model)
    if gathered is None:
        model.save_pretrained(str(scratch))
    elif planned.recipe.trainable.mode != "full":
        model.save_pretrained(str(scratch), state_dict=gathered)
    else:
        # A model that DeepSpeed loaded would save its weights under names that no other library reads.
        unsharded: Any = model_skeleton(planned.folder)
        unsharded.load_state_dict(gathered, strict=True, assign=True)
        unsharded.generation_config = model.generation_config
        unsharded.save_pretrained(str(scratch))
    processor.save_pretrained(str(scratch))
    if planned.recipe.trainable.mode != "full":
        adapter = read_json(scratch / "adapter_config.json")
        adapter["base_model_name_or_path"] = (
            str(planned.folder.resolve()) if user_path(planned.recipe.model).is_dir() else planned.recipe.model
        )
        write_json(scratch / "adapter_config.json", adapter)
        write_json(scratch / BASE_MODEL_FILE, {"digest": planned.model_digest})
    state = planned.method.state()
    if state:
        save_file(state, scratch / "method_state.safetensors")
    shutil.rmtree(result, ignore_errors=True)
    os.replace(scratch, result)
