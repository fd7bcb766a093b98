"""Runs a checked recipe to the saved model, resuming what a kill cut short."""

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
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from vlm_unlearn.config import Recipe
from vlm_unlearn.data.encoding import Processor, move
from vlm_unlearn.distributed import world_size
from vlm_unlearn.errors import RunError, UserError
from vlm_unlearn.methods import ReferenceNLL, Role
from vlm_unlearn.models.features import FeatureCache, cache_vision_features
from vlm_unlearn.models.layout import get_base_model, layout_of, vision_tower
from vlm_unlearn.models.loader import BASE_MODEL_FILE, load_model, load_processor, model_skeleton
from vlm_unlearn.models.sine import merge_sine
from vlm_unlearn.models.trainable import prepare_trainable
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
from vlm_unlearn.training.callbacks import LogCallback, OnStep, Probe, ProbeCallback, stopped, tensorboard
from vlm_unlearn.training.forward import forward, packing_of
from vlm_unlearn.training.plan import Plan, plan, prepare_method, steps_of
from vlm_unlearn.training.references import AdapterReference, CopyReference, ReferenceModel, cached_nll
from vlm_unlearn.training.stream import NLL, UnlearningCollator, UnlearningStream
from vlm_unlearn.training.trainer import UnlearningTrainer, last_complete_checkpoint


def run_recipe(recipe: Recipe, on_step: OnStep | None = None, probe: Probe | None = None) -> Path:
    """Checks a recipe and trains it: `plan`, then `run_plan`."""
    return run_plan(plan(recipe), on_step, probe)


def run_plan(
    planned: Plan,
    on_step: OnStep | None = None,
    probe: Probe | None = None,
    on_reference: Callable[[int, int], None] | None = None,
) -> Path:
    """Trains what the plan says and returns the folder of the trained model (``<output>/model``).

    Called again after a kill it goes on from the last complete checkpoint; called again when done it returns at once.
    A checkpoint resumes to the same weights, to the bit on a CPU. Under torchrun or accelerate launch all processes call it.

    Args:
        on_step: told of each optimizer step: step, steps, loss parts.
        probe: measures the model in training, for a recipe with ``probe`` (`vlm_unlearn.evaluation.probe.build_probe` makes one).
        on_reference: told of the reference values that are computed before the first step: examples done, examples in all.

    Raises:
        UserError: the output folder holds another run, or another process is at work in it.
        RunError: the loss, the gradient or the weights became NaN or infinite; the last good checkpoint stays.
    """
    if planned.recipe.probe and probe is None:
        raise UserError(
            "the recipe has a probe: build one with vlm_unlearn.evaluation.probe.build_probe and pass it on"
        )
    output = planned.recipe.output
    identity = {**planned.identity, "probe": probe.digest if probe else None}
    arguments = _arguments(planned)
    if arguments.world_size != world_size():
        raise UserError(f"{world_size()} processes were started but train as {arguments.world_size}; see docs/scale.md")
    result, checkpoints = output / "model", output / "checkpoints"
    with _whole_run(output, identity, arguments) as finished:
        if finished and not (result / "config.json").is_file() and not (result / "adapter_config.json").is_file():
            raise UserError(f"{output}: is finished, and its model folder is gone; delete {output} and train again")
        if not finished:
            watch = LogCallback(output, on_step, arguments.process_index == 0)
            trainer, processor = _trainer(planned, arguments, watch, on_reference)
            prober = (
                ProbeCallback(planned.recipe.probe, probe, trainer, output) if planned.recipe.probe and probe else None
            )
            if prober:
                trainer.add_callback(prober)
            checkpoint = last_complete_checkpoint(checkpoints)
            try:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            except RunError:
                watch.write_log(trainer.state)  # it shows how the run went wrong
                raise
            if prober:
                prober.load_best()
            _save(trainer, processor, planned, result)
            if arguments.process_index == 0:
                ended = {"steps": trainer.state.global_step, "stopped": stopped(trainer.state.log_history)}
                record_cost(output, watch.seconds(), finished=True, ended=ended)
        if arguments.process_index == 0:
            for folder in (checkpoints, output / "best"):  # only now: a kill before leaves them to resume from
                shutil.rmtree(folder, ignore_errors=True)
    return result


@contextmanager
def _whole_run(output: Path, identity: Mapping[str, object], arguments: TrainingArguments) -> Iterator[bool]:
    """Holds the run folder for all processes together; yields whether the run is finished already."""
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


def _trainer(
    planned: Plan, arguments: TrainingArguments, watch: TrainerCallback, on_reference: Callable[[int, int], None] | None
) -> tuple[UnlearningTrainer, Processor]:
    recipe, method, mode = planned.recipe, planned.method, planned.recipe.trainable.mode
    processor = load_processor(planned.folder, recipe.image_aspect_ratio)
    # Full training keeps fp32 master weights and computes under autocast; LoRA's frozen base is held in the compute precision.
    precision = "fp32" if mode == "full" else planned.precision
    model = load_model(planned.folder, precision, recipe.training.attn_implementation, in_4_bits=mode == "qlora")
    set_seed(recipe.training.seed)  # after loading, which draws random numbers or not as the engine wants
    model = prepare_trainable(model, recipe.trainable)
    if mode != "qlora":  # 4-bit weights are on their device already
        model = model.to(arguments.device)
    _keep_features(planned, model)
    prepare_method(method, model, recipe.training.seed)
    length = (
        arguments.max_steps
        * arguments.per_device_train_batch_size
        * arguments.gradient_accumulation_steps
        * arguments.world_size
    )
    stream = UnlearningStream(
        planned.training_set, method, length, recipe.training.seed, recipe.training.group_by_image
    )
    reference: ReferenceModel | None = None
    cached: dict[Role, Mapping[str, NLL]] = {}
    if planned.reference_strategy == "cache":
        cached = _cached_references(planned, stream, model, processor, arguments.device, on_reference)
    elif planned.reference_strategy is not None:
        reference = AdapterReference() if planned.reference_strategy == "adapter" else CopyReference(model)
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
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    if "tensorboard" in recipe.training.report_to and arguments.process_index == 0:
        trainer.add_callback(tensorboard(recipe.output))
    return trainer, processor


def _keep_features(planned: Plan, model: torch.nn.Module) -> None:
    """Runs each image through the vision tower once, where it is frozen, whole, and not the projector's home."""
    training, layout = planned.recipe.training, layout_of(get_base_model(model))
    cut_up = any(os.environ.get(f"ACCELERATE_USE_{engine}", "false") == "true" for engine in ("FSDP", "DEEPSPEED"))
    trains = planned.recipe.trainable.vision_tower or layout.projector.startswith(layout.vision_tower)
    if training.feature_cache == "off" or trains or cut_up:
        return
    first = next(model.parameters())
    deciding = [
        planned.model_digest,
        package_versions(),
        str(first.dtype),
        planned.precision,
        training.attn_implementation,
        first.device.type,
        planned.recipe.trainable.mode,
    ]
    key = digest_json(deciding)
    folder = cache_folder() / "features" / key if training.feature_cache == "disk" else None
    cache_vision_features(vision_tower(model), FeatureCache(training.feature_cache_gb * 2**30, folder))


def _arguments(planned: Plan) -> TrainingArguments:
    recipe, training = planned.recipe, planned.recipe.training
    steps = steps_of(recipe, len(planned.training_set.examples["forget"]), world_size())
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
        # A device that somebody names for accelerate stays.
        use_cpu=not torch.cuda.is_available() and "ACCELERATE_TORCH_DEVICE" not in os.environ,
        ddp_find_unused_parameters=world_size() > 1 and _may_leave_unused(planned),
        save_strategy="steps",
        save_steps=training.save_steps,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        seed=training.seed,
        # The stream is shuffled already, as a function of the position; a sampler of its own would not resume to the bit.
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_num_workers=training.dataloader_num_workers,
        label_names=["forget", "retain"],
        report_to=[name for name in training.report_to if name != "tensorboard"] or "none",
        project="vlm-unlearn",
        run_name=recipe.output.resolve().name,
        disable_tqdm=True,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # nn.DataParallel knows neither our batches nor our hooks
    return arguments


def _may_leave_unused(planned: Plan) -> bool:
    """Whether a step may not use all that trains: the projector of a text-only batch, the vision layers above the one that is used."""
    text_only = any(example.image is None for role in planned.training_set.examples.values() for example in role)
    return planned.recipe.trainable.vision_tower or text_only


def _cached_references(
    planned: Plan,
    stream: UnlearningStream,
    model: torch.nn.Module,
    processor: Processor,
    device: torch.device,
    on_done: Callable[[int, int], None] | None,
) -> dict[Role, Mapping[str, NLL]]:
    """Reference NLLs of every example of the roles that the method needs, from the cache folder or computed now."""
    recipe, training, data = planned.recipe, planned.recipe.training, planned.training_set
    collator = UnlearningCollator(processor, data, planned.method, training.max_length, {})
    found: dict[Role, Mapping[str, NLL]] = {}
    for need in planned.method.reference_requirements:
        assert isinstance(need, ReferenceNLL)
        role, examples = need.role, stream.unique_examples(need.role)

        def compute(part: Sequence[Example], role: Role = role) -> list[NLL]:
            batch = move(collator.encode(role, part), device, next(model.parameters()).dtype)
            with torch.no_grad(), _autocast(device, planned.precision):
                nll_sum, tokens = forward(model, batch, packing=packing_of(model, batch, planned.method)).answer_nll
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
                "rendering": 2,  # how a turn becomes tokens; raised when that changes
                "data": planned.data_digest,
                "examples": [[example.id, example.answer] for example in examples],
            }
        )
        model.eval()
        with _gathered(model):
            found[role] = cached_nll(
                cache_folder() / "reference" / f"{key}.json",
                examples,
                compute,
                training.per_device_train_batch_size,
                on_done,
            )
    return found


def _gathered(model: torch.nn.Module) -> AbstractContextManager[object]:
    """Makes a model whole that ZeRO-3 has cut up while loading it; it is no engine's yet, which would do so layer by layer."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(list(model.parameters()))
    return gathered


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def _save(trainer: UnlearningTrainer, processor: Processor, planned: Plan, result: Path) -> None:
    """Saves the trained model (or adapter), processor and method state; the folder appears whole or not at all."""
    from safetensors.torch import save_file

    # All processes gather what FSDP or DeepSpeed has cut up; one writes.
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.sharded else None
    if not trainer.args.should_save:
        return
    part = result.with_name("model.part")
    shutil.rmtree(part, ignore_errors=True)
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    # The loss of the last step was finite, but its update may not have been.
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    broken = [name for name, value in trained.items() if not (weights or trained).get(name, value).isfinite().all()]
    if broken:
        raise RunError(f"the trained weights are not finite ({broken[0]}); lower training.learning_rate")
    merge_sine(model)
    if weights is None or planned.recipe.trainable.mode != "full":
        model.save_pretrained(str(part), **({"state_dict": weights} if weights is not None else {}))
    else:
        _whole(planned.folder, model, weights).save_pretrained(str(part))
    processor.save_pretrained(str(part))
    if planned.recipe.trainable.mode != "full":
        adapter = read_json(part / "adapter_config.json")
        adapter["base_model_name_or_path"] = (
            str(planned.folder.resolve()) if user_path(planned.recipe.model).is_dir() else planned.recipe.model
        )
        write_json(part / "adapter_config.json", adapter)
        write_json(part / BASE_MODEL_FILE, {"digest": planned.model_digest})
    state = planned.method.state()
    if state:
        save_file(state, part / "method_state.safetensors")
    shutil.rmtree(result, ignore_errors=True)
    os.replace(part, result)


def _whole(folder: Path, model: Any, weights: Mapping[str, torch.Tensor]) -> Any:
    """An uncut model of the gathered weights: one that DeepSpeed has loaded saves them under names that nothing else reads."""
    whole = model_skeleton(folder)
    whole.load_state_dict(weights, strict=True, assign=True)
    whole.generation_config = model.generation_config
    return whole
