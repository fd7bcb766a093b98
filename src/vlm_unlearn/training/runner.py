"""Runs a validated recipe to the saved model and resumes after an interruption."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn
from transformers import PrinterCallback, TrainerCallback, set_seed

from vlm_unlearn import plugins
from vlm_unlearn.config import Recipe
from vlm_unlearn.distributed import world_size
from vlm_unlearn.errors import RunError, UserError
from vlm_unlearn.modeling.threads import limit_threads
from vlm_unlearn.modeling.trainable import prepare_trainable
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.records import PROBE_PREFIX
from vlm_unlearn.store import RunDirectory, read_json, read_tensor_names, user_path, validate_model_files, write_json
from vlm_unlearn.store.model_files import ADAPTER_WEIGHTS, BASE_MODEL_FILE
from vlm_unlearn.training.arguments import UnlearningConfig
from vlm_unlearn.training.callbacks import (
    LogCallback,
    OnStep,
    Probe,
    ProbeCallback,
    stop_reason,
    tensorboard_callback,
)
from vlm_unlearn.training.gradient_checkpointing import CheckpointingChoice
from vlm_unlearn.training.inputs import Inputs
from vlm_unlearn.training.method_trainer import MethodTrainer
from vlm_unlearn.training.plan import Plan, plan
from vlm_unlearn.training.published_order import count_warmup_steps
from vlm_unlearn.training.reference_values import CacheKeys, OnReference
from vlm_unlearn.training.setup import TrainingParts, build_parts

OnTrained = Callable[[nn.Module], None]  # called with the trained model


def run_recipe(recipe: Recipe, on_step: OnStep | None = None, probe: Probe | None = None) -> Path:
    """Validates a recipe, trains it and returns the folder of the trained model. Same as `run_plan` of `plan`."""
    return run_plan(plan(recipe), on_step, probe)


def run_plan(
    planned: Plan,
    on_step: OnStep | None = None,
    probe: Probe | None = None,
    on_reference: OnReference | None = None,
    inputs: Inputs | None = None,
    on_trained: OnTrained | None = None,
    on_checkpointing: Callable[[CheckpointingChoice], None] | None = None,
) -> Path:
    """Trains according to a plan and returns the folder of the trained model, ``<output>/model``.

    A second call after an interruption resumes from the last complete checkpoint, bitwise exactly on a CPU. A call
    after the run is finished returns at once. Under torchrun or accelerate launch, all processes call this
    function.

    Args:
        planned: The plan.
        on_step: Called after each optimizer step with the step, the number of steps and the loss terms.
        probe: Measures the model during training, by the rules of the recipe's ``probe``. None evaluates the suite that
            the recipe names.
        on_reference: Called while reference values are computed before the first step, with the number of finished
            examples and of all examples.
        inputs: Loads the model. `SharedInputs` loads it once for several runs.
        on_trained: Called with the trained model in memory, after it was saved. Not called for a run that is finished
            already.
        on_checkpointing: Called with the choice of ``training.gradient_checkpointing: auto``.

    Raises:
        UserError: The output folder contains another run, or another process uses it, or the model of a finished run
            is damaged.
        RunError: The loss, the gradient or the weights became NaN or infinite. The last good checkpoint remains.
    """
    probe = probe or build_probe(planned)
    run = RunDirectory(planned.recipe.output)
    arguments = _training_arguments(planned, run)
    if arguments.world_size != world_size():
        raise UserError(
            f"the environment variable is {world_size()}, but the Trainer initialized with {arguments.world_size} "
            "process(es). See docs/scale.md.",
            code="conflicting-settings",
            field="WORLD_SIZE",
        )
    identity = {**planned.identity, "probe": probe.digest if probe else None}
    with _lock_and_open(run, identity, arguments) as finished:
        if not finished:
            with limit_threads(planned.threads or torch.get_num_threads()):
                _train(
                    planned,
                    run,
                    arguments,
                    on_step,
                    probe,
                    on_reference,
                    inputs or Inputs(),
                    on_trained,
                    on_checkpointing,
                )
        elif not any((run.model / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise UserError(
                f"the run is finished, but its model folder is missing. Delete {run.path} and train again.",
                code="model-not-found",
                file=run.path,
            )
        else:
            validate_model_files(run.model)
        if arguments.process_index == 0:
            for weights in (run.checkpoints, run.best_weights):  # until here, a killed run resumes from them
                shutil.rmtree(weights, ignore_errors=True)
    return run.model


def build_probe(planned: Plan) -> Probe | None:
    """Returns the probe that a recipe describes, or None.

    Raises:
        UserError: The probe's suite or data are broken, or a rule names a metric that the suite does not have.
    """
    if planned.recipe.probe is None:
        return None
    probe: Probe = plugins.PROBES["suite"](planned.recipe.probe, str(planned.model_path), planned.processor)
    return probe


@contextmanager
def _lock_and_open(run: RunDirectory, identity: Mapping[str, object], arguments: UnlearningConfig) -> Iterator[bool]:
    """Locks and opens the run folder for all processes of the run. Yields whether the run is already finished."""
    state = PartialState()
    if arguments.process_index == 0:
        with run.lock():
            finished = run.open(identity)["finished"]
            state.wait_for_everyone()
            yield finished
            state.wait_for_everyone()
    else:
        state.wait_for_everyone()
        yield run.is_finished
        state.wait_for_everyone()


def _train(
    planned: Plan,
    run: RunDirectory,
    arguments: UnlearningConfig,
    on_step: OnStep | None,
    probe: Probe | None,
    on_reference: OnReference | None,
    inputs: Inputs,
    on_trained: OnTrained | None,
    on_checkpointing: Callable[[CheckpointingChoice], None] | None,
) -> None:
    """Trains from the last complete checkpoint, or from the base model, and saves the result."""
    recipe = planned.recipe
    started, is_main_process = time.monotonic(), arguments.process_index == 0
    if inputs.shares_features(recipe):
        arguments.feature_cache = "off"  # the shared cache takes its place
    parts = _load_parts(planned, run, arguments, inputs)
    log_callback = LogCallback(run, on_step, is_main_process, started)
    probe_callback = ProbeCallback(recipe.probe, probe, run) if recipe.probe and probe else None
    callbacks: list[TrainerCallback] = [log_callback, *([probe_callback] if probe_callback else [])]
    if "tensorboard" in recipe.training.report_to and is_main_process:
        callbacks.append(tensorboard_callback(run))

    def record_checkpointing(choice: CheckpointingChoice) -> None:
        if is_main_process:
            run.record({"gradient_checkpointing": asdict(choice)})
            if on_checkpointing:
                on_checkpointing(choice)

    trainer = MethodTrainer(
        parts,
        eval_fn=probe_callback.measure if probe_callback else None,
        eval_prefix=PROBE_PREFIX,
        callbacks=callbacks,
        cache_keys=_cache_keys(planned),
        on_reference=on_reference,
        on_checkpointing=record_checkpointing,
    )
    trainer.remove_callback(PrinterCallback)
    with inputs.vision_features(parts.vlm, recipe, planned.model_path):
        try:
            trainer.train(resume_from_checkpoint=True)
        except RunError:
            log_callback.write_log(trainer.state)  # so that the loss curves show the divergence
            raise
        _save_result(trainer, planned, run)
        if is_main_process:
            outcome = {"steps": trainer.state.global_step, "stopped": stop_reason(trainer.state.log_history)}
            run.record_cost(log_callback.elapsed_seconds(), finished=True, ended=outcome)
        if on_trained is not None:
            # Without the wrapper of autocast, which accelerate would leave around the forward pass.
            on_trained(trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False))


def _load_parts(planned: Plan, run: RunDirectory, arguments: UnlearningConfig, inputs: Inputs) -> TrainingParts:
    """Loads the model and returns the parts of the run."""
    recipe, mode = planned.recipe, planned.recipe.trainable.mode
    if arguments.process_index == 0:
        rows = [{"part": part, "trained": trained, "parameters": total} for part, trained, total in planned.trainable]
        write_json(run.trainable_file, rows)
        write_json(run.recipe_file, recipe.model_dump(mode="json"))
    # Full training keeps float32 master weights and computes under autocast. LoRA's frozen base has the compute
    # precision.
    precision = "fp32" if mode == "full" else planned.precision
    model = inputs.model(planned.model_path, precision, recipe.training.attn_implementation, mode == "qlora")
    set_seed(recipe.training.seed)  # after loading, which uses random numbers under some engines
    vlm = prepare_trainable(VisionLanguageModel(model, planned.processor), recipe.trainable)
    if mode != "qlora":  # 4-bit weights are already on their device
        vlm.model.to(arguments.device)
    return build_parts(vlm, arguments, planned.training_set, new_adapters=vlm.has_adapters)


def _cache_keys(planned: Plan) -> CacheKeys:
    recipe = planned.recipe
    model_key = {
        "model": planned.model_digest,
        "quantized": recipe.trainable.mode == "qlora",
        "attention": recipe.training.attn_implementation,
        "image_aspect_ratio": recipe.image_aspect_ratio,
        "image_loader": recipe.image_loader,
    }
    return CacheKeys(model_key, planned.data_digest)


def _training_arguments(planned: Plan, run: RunDirectory) -> UnlearningConfig:
    recipe, training = planned.recipe, planned.recipe.training
    return UnlearningConfig(
        output_dir=str(run.checkpoints),
        method=recipe.method.name,
        method_args=dict(recipe.method.model_extra or {}),
        prompt_decouple_weight=recipe.prompt_decouple_weight,
        defense=[config.model_dump() for config in recipe.defense],
        reference=planned.reference_strategy or "auto",
        tokens_per_pass=str(training.tokens_per_pass),
        group_by_image=training.group_by_image,
        feature_cache=training.feature_cache,
        feature_cache_gb=training.feature_cache_gb,
        max_length=training.max_length,
        projector_learning_rate=training.projector_learning_rate,
        freeze_vision_tower=False,  # the recipe has selected the trainable parameters
        per_device_train_batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        max_steps=planned.steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=count_warmup_steps(planned.method, training.warmup_ratio, planned.steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        bf16=planned.precision == "bf16",
        gradient_checkpointing=str(training.gradient_checkpointing),
        activation_checkpointing_kwargs={"use_reentrant": False},
        # ACCELERATE_TORCH_DEVICE overrides the choice of device.
        use_cpu=not torch.cuda.is_available() and "ACCELERATE_TORCH_DEVICE" not in os.environ,
        eval_strategy="steps" if recipe.probe else "no",
        eval_steps=recipe.probe.eval_steps if recipe.probe else None,
        save_strategy="steps",
        save_steps=training.save_steps,
        save_total_limit=2,
        logging_steps=1,
        seed=training.seed,
        dataloader_num_workers=training.dataloader_num_workers,
        report_to=[name for name in training.report_to if name != "tensorboard"] or "none",
        project="vlm-unlearn",
        run_name=run.path.resolve().name,
        disable_tqdm=True,
    )


def _save_result(trainer: MethodTrainer, planned: Plan, run: RunDirectory) -> None:
    """Saves the trained model or adapters, the processor and the method's state, atomically."""
    scratch = run.model.with_name(f"{run.model.name}.part")
    if trainer.args.should_save:
        shutil.rmtree(scratch, ignore_errors=True)
    trainer.save_model(str(scratch))
    if not trainer.args.should_save:
        return
    if planned.recipe.trainable.mode != "full":
        adapter = read_json(scratch / "adapter_config.json")
        adapter["base_model_name_or_path"] = (
            str(planned.model_path.resolve()) if user_path(planned.recipe.model).is_dir() else planned.recipe.model
        )
        write_json(scratch / "adapter_config.json", adapter)
        names = sorted(read_tensor_names(scratch / ADAPTER_WEIGHTS))
        write_json(scratch / BASE_MODEL_FILE, {"digest": planned.model_digest, "tensors": names})
    shutil.rmtree(run.model, ignore_errors=True)
    os.replace(scratch, run.model)
