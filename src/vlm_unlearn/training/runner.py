"""Runs a recipe from its check to the saved model, resuming what a kill cut short."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from vlm_unlearn.config import Recipe
from vlm_unlearn.data.batching import Processor, move
from vlm_unlearn.data.training_set import TrainingSet, read_training_set
from vlm_unlearn.errors import RequestError, WorkError
from vlm_unlearn.methods import Method, ReferenceNLL, Role, build_method
from vlm_unlearn.models.layout import decoder_layers
from vlm_unlearn.models.loading import load_model, load_processor, model_folder, model_skeleton, resolve_precision
from vlm_unlearn.models.trainable import prepare_trainable, trainable_table
from vlm_unlearn.records import Example
from vlm_unlearn.store import (
    cache_folder,
    digest_json,
    digest_model,
    lock_run,
    note_cost,
    open_run,
    package_versions,
    read_json,
    write_json,
    write_text,
)
from vlm_unlearn.training.references import AdapterReference, CopyReference, ReferenceModel, Source, cached_nll, choose_source
from vlm_unlearn.training.step import forward
from vlm_unlearn.training.stream import NLL, Collator, TrainingStream
from vlm_unlearn.training.trainer import UnlearningTrainer, last_complete_checkpoint

OnStep = Callable[[int, int, Mapping[str, float]], None]  # step, steps, loss parts


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

    @property
    def identity(self) -> dict[str, object]:
        """What decides the run's weights; a run folder is resumed only by the same."""
        recipe = self.recipe.model_dump(mode="json", exclude={"output", "model", "data"})
        return {
            "kind": "train",
            "recipe": recipe,
            "precision": self.precision,
            "model": self.model_digest,
            "data": self.data_digest,
        }


def plan(recipe: Recipe) -> Plan:
    """Checks a recipe against its data and model.

    Raises:
        RequestError: unknown method or option, a missing or broken training set, a model folder without weights, ...
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RequestError("training runs in one process so far; start it without torchrun or accelerate launch")
    method = build_method(recipe.method, recipe.prompt_decouple_weight)
    folder = model_folder(recipe.model)
    training_set = read_training_set(recipe.data)
    source = choose_source(recipe.reference, method.needs, recipe.trainable.mode == "lora")
    TrainingStream(training_set, method, 1, recipe.training.seed)  # refuses a set without the pairs that the method needs
    skeleton = prepare_trainable(model_skeleton(folder), recipe.trainable)
    _prepare_method(method, skeleton, recipe.training.seed)
    Collator(load_processor(folder), training_set, method, recipe.training.max_length, {}).check_lengths()
    precision = resolve_precision(recipe.training.precision)
    return Plan(recipe, method, folder, training_set, source, precision, digest_model(folder), training_set.digest())


def run_recipe(recipe: Recipe, on_step: OnStep | None = None) -> Path:
    """Checks a recipe and trains it: `plan`, then `run_plan`."""
    return run_plan(plan(recipe), on_step)


def run_plan(planned: Plan, on_step: OnStep | None = None) -> Path:
    """Trains what the plan says and returns the folder of the trained model (``<output>/model``).

    Called again after a kill it goes on from the last complete checkpoint; called again when done it returns at once.
    A checkpoint resumes to the same weights, to the bit on a CPU.

    Raises:
        RequestError: the output folder holds another run, or another process is at work in it.
        WorkError: the loss became NaN or infinite.
    """
    output = planned.recipe.output
    with lock_run(output):
        finished = open_run(output, planned.identity)["finished"]
        result, checkpoints = output / "model", output / "checkpoints"
        if not finished:
            watch = _Watch(output, on_step)
            trainer, processor = _trainer(planned, watch)
            checkpoint = last_complete_checkpoint(checkpoints)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            _save(trainer, processor, planned, result)
            note_cost(output, watch.seconds(), finished=True)
        shutil.rmtree(checkpoints, ignore_errors=True)  # only now: a kill before leaves them to resume from
    return result


def _trainer(planned: Plan, watch: _Watch) -> tuple[UnlearningTrainer, Processor]:
    recipe, method = planned.recipe, planned.method
    arguments = _arguments(recipe, planned.precision, len(planned.training_set.examples["forget"]))
    set_seed(recipe.training.seed)
    processor = load_processor(planned.folder)
    # Full training keeps fp32 master weights and computes under autocast; LoRA's frozen base is held in the compute precision.
    model = load_model(planned.folder, planned.precision if recipe.trainable.mode == "lora" else "fp32")
    model = prepare_trainable(model, recipe.trainable).to(arguments.device)
    _prepare_method(method, model, recipe.training.seed)
    write_json(
        recipe.output / "trainable.json",
        [{"part": part, "trained": trained, "parameters": total} for part, trained, total in trainable_table(model)],
    )
    length = arguments.max_steps * arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    reference: ReferenceModel | None = None
    cached: dict[Role, Mapping[str, NLL]] = {}
    if planned.source == "cache":
        cached = _cached_references(planned, model, processor, arguments.device)
    elif planned.source is not None:
        reference = AdapterReference() if planned.source == "adapter" else CopyReference(model)
    trainer = UnlearningTrainer(
        method=method,
        reference=reference,
        model=model,
        args=arguments,
        train_dataset=TrainingStream(planned.training_set, method, length, recipe.training.seed),
        data_collator=Collator(processor, planned.training_set, method, recipe.training.max_length, cached),
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, processor


def _prepare_method(method: Method, model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    method.prepare(model.config.get_text_config().hidden_size, len(decoder_layers(model)), generator)


def _arguments(recipe: Recipe, precision: str, forget_examples: int) -> TrainingArguments:
    training = recipe.training
    per_step = training.batch_size * training.gradient_accumulation_steps
    steps = training.max_steps or max(1, -(-int(training.epochs * forget_examples) // per_step))
    arguments = TrainingArguments(
        output_dir=str(recipe.output / "checkpoints"),
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        max_steps=steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.scheduler,
        warmup_steps=int(training.warmup_ratio * steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        bf16=precision == "bf16",
        activation_checkpointing=training.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=not torch.cuda.is_available(),
        save_strategy="steps",
        save_steps=training.save_steps,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        seed=training.seed,
        # The stream is shuffled already, as a function of the position; a sampler of its own would not resume to the bit.
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        label_names=["forget", "retain"],
        report_to="none",
        disable_tqdm=True,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # nn.DataParallel knows neither our batches nor our hooks
    return arguments


def _cached_references(planned: Plan, model: torch.nn.Module, processor: Processor, device: torch.device) -> dict[Role, Mapping[str, NLL]]:
    """Reference NLLs of every example of the roles that the method needs, from the cache folder or computed now."""
    training, data = planned.recipe.training, planned.training_set
    collator = Collator(processor, data, planned.method, training.max_length, {})
    found: dict[Role, Mapping[str, NLL]] = {}
    for need in planned.method.needs:
        assert isinstance(need, ReferenceNLL)
        role = need.role

        def compute(examples: Sequence[Example], role: Role = role) -> list[NLL]:
            batch = move(collator.encode(role, examples), device, next(model.parameters()).dtype)
            with torch.no_grad(), _autocast(device, planned.precision):
                outcome = forward(model, batch, None)
            nll_sum, tokens = outcome.answer
            return list(zip(nll_sum.tolist(), tokens.tolist(), strict=True))

        key = digest_json(
            {
                "model": planned.model_digest,
                "versions": package_versions(),
                "weights": str(next(model.parameters()).dtype),
                "precision": planned.precision,
                "max_length": training.max_length,
                "batch_size": training.batch_size,
                "role": role,
                "rendering": 2,  # how a turn becomes tokens; raised when that changes
                "data": planned.data_digest,
            }
        )
        model.eval()
        file = cache_folder() / "reference" / f"{key}.json"
        found[role] = cached_nll(file, data.examples[role], compute, training.batch_size)
    return found


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def _save(trainer: UnlearningTrainer, processor: Processor, planned: Plan, result: Path) -> None:
    """Saves the trained model (or adapter), processor and method state; the folder appears whole or not at all."""
    from safetensors.torch import save_file

    part = result.with_name("model.part")
    shutil.rmtree(part, ignore_errors=True)
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    # The loss of the last step was finite, but its update may not have been.
    broken = [name for name, value in model.named_parameters() if value.requires_grad and not value.isfinite().all()]
    if broken:
        raise WorkError(f"the trained weights are not finite ({broken[0]}); lower training.learning_rate")
    model.save_pretrained(str(part))
    processor.save_pretrained(str(part))
    if planned.recipe.trainable.mode == "lora":
        adapter = read_json(part / "adapter_config.json")
        adapter["base_model_name_or_path"] = (
            str(planned.folder.resolve()) if Path(planned.recipe.model).expanduser().is_dir() else planned.recipe.model
        )
        write_json(part / "adapter_config.json", adapter)
    state = planned.method.state()
    if state:
        save_file(state, part / "method_state.safetensors")
    shutil.rmtree(result, ignore_errors=True)
    os.replace(part, result)


class _Watch(TrainerCallback):
    """Keeps log.jsonl and the manifest's cost beside the run, and tells progress."""

    def __init__(self, output: Path, on_step: OnStep | None) -> None:
        self._output = output
        self._on_step = on_step
        self._since = time.monotonic()

    def seconds(self) -> float:
        """Wall time since the last call."""
        before, self._since = self._since, time.monotonic()
        return self._since - before

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs and self._on_step:
            self._on_step(state.global_step, state.max_steps, logs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write_log(state)
        note_cost(self._output, self.seconds())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write_log(state)

    def _write_log(self, state: Any) -> None:
        """Rewrites the log from the trainer's history, which a checkpoint carries: no line is lost or doubled by a kill."""
        lines = [dict(sorted(entry.items())) for entry in state.log_history if "loss" in entry]
        for line in lines:
            line.pop("epoch", None)  # of the endless stream, not of the data
        write_text(self._output / "log.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
