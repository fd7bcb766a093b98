"""The trainer of prepared parts: transformers.Trainer with an unlearning method as its loss.

It trains on nested batches, logs the loss terms and writes checkpoints that resume exactly.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from vlm_unlearn.data.encoding import move
from vlm_unlearn.data.pixels import DECODER_VERSION
from vlm_unlearn.errors import RunError, UserError
from vlm_unlearn.methods import LossOutput, Role, TokenKind
from vlm_unlearn.modeling.adapters import sort_adapter_config
from vlm_unlearn.modeling.attention import without_cudnn_attention
from vlm_unlearn.modeling.features import cached_vision_features
from vlm_unlearn.modeling.fused_layers import fused_layers
from vlm_unlearn.modeling.loader import build_skeleton
from vlm_unlearn.modeling.lora_forward import fast_lora
from vlm_unlearn.modeling.processors import save_processor
from vlm_unlearn.modeling.sine import merge_sine
from vlm_unlearn.modeling.structure import get_base_model
from vlm_unlearn.modeling.trainable import without_lora_input_casts
from vlm_unlearn.store import RunDirectory, cache_folder, digest_json, package_versions
from vlm_unlearn.training.callbacks import DefenseCallback
from vlm_unlearn.training.checkpoints import (
    MemorySettings,
    last_complete_checkpoint,
    load_defenses,
    load_trained,
    mark_complete,
    read_memory_settings,
    save_defenses,
    save_trained,
    trainable_parameters,
    validate_same_run,
)
from vlm_unlearn.training.data_workers import data_worker_errors
from vlm_unlearn.training.defended_step import (
    DefendedStep,
    StepContext,
    swapped_weights,
    validate_engine,
    validate_sum_of_terms,
)
from vlm_unlearn.training.gradient_checkpointing import CheckpointingChoice, resolve_checkpointing
from vlm_unlearn.training.out_of_memory import repeat_in_less_memory
from vlm_unlearn.training.passes import (
    MAX_AUTO_TOKENS,
    MicroBatch,
    Passes,
    group_micro_batches,
    micro_batch_size,
    tokens_per_pass,
)
from vlm_unlearn.training.published_order import repeat_scheduler_steps
from vlm_unlearn.training.reference_values import CacheKeys, OnReference, build_reference
from vlm_unlearn.training.references import Reference
from vlm_unlearn.training.setup import TrainingParts
from vlm_unlearn.training.step import ModelStep, count_tokens

logger = logging.getLogger(__name__)

EvalFunction = Callable[[Any], Mapping[str, float | None]]  # rates by name, None for a rate that was not measured
EVAL_PREFIX = "eval_"  # of the names of rates in the log


class MethodTrainer(Trainer):
    """Trains prepared parts with an unlearning method. `UnlearningTrainer` builds the parts from its arguments.

    Args:
        parts: The model, the arguments, the method and the data.
        eval_fn: Called with the model in evaluation mode, every ``args.eval_steps`` steps if ``args.eval_strategy`` is
            ``"steps"``.
        eval_prefix: The beginning of the rates' names in the log.
        callbacks: Callbacks of transformers.
        optimizers: An optimizer and a scheduler instead of the default ones.
        cache_keys: Identify model and data in the caches on disk. None caches in memory only.
        on_reference: Called while reference values are computed before the first step, with the number of finished
            examples and of all examples.
        on_checkpointing: Called with the choice of ``gradient_checkpointing: auto``.

    Raises:
        UserError: FSDP or DeepSpeed shards the parameters, which defenses do not support.
    """

    # The Trainer averages the losses of a step's micro-batches, and DDP averages their gradients over processes.
    # `_token_totals` are averages too, so that the result is the mean over all tokens of the optimizer step.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        parts: TrainingParts,
        *,
        eval_fn: EvalFunction | None = None,
        eval_prefix: str = EVAL_PREFIX,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        cache_keys: CacheKeys | None = None,
        on_reference: OnReference | None = None,
        on_checkpointing: Callable[[CheckpointingChoice], None] | None = None,
    ) -> None:
        super().__init__(
            model=parts.vlm.model,
            args=parts.args,
            data_collator=parts.collator,
            train_dataset=parts.stream,
            eval_dataset=parts.stream if eval_fn else None,  # not used, but required by the Trainer
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._parts = parts
        self.vlm = parts.vlm
        self.method = parts.method
        self.defenses = parts.defenses
        self._eval_fn = eval_fn
        self._eval_prefix = eval_prefix
        self._cache_keys = cache_keys
        self._on_reference = on_reference
        self._on_checkpointing = on_checkpointing
        self._reference: Reference | None = None
        self._loss_terms: dict[str, list[float]] = {}  # since the last log entry
        self._token_totals: dict[tuple[Role, TokenKind], float] | None = None  # of the current optimizer step
        self._step_batches: Sequence[MicroBatch] = ()  # of the current optimizer step
        self._max_tokens = 0  # of a pass of the current optimizer step, 0 if each micro-batch runs alone
        self._token_limit: int | None = None  # of passes, after memory was not enough for more
        self._loss_is_validated = False  # as a sum of terms, which defenses need
        if self.defenses:
            validate_engine(self.sharded)
            self.add_callback(DefenseCallback(self.defenses, lambda: self._trainable))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains, and returns the outcome as transformers does.

        Args:
            resume_from_checkpoint: A checkpoint folder, or True for the last complete one in ``args.output_dir``. With
                True, training starts from the beginning if there is none. A resumed run trains the same weights as an
                uninterrupted one, to the bit on a CPU.
            args: Further arguments of transformers.
            kwargs: Further arguments of transformers.

        Raises:
            UserError: The checkpoint belongs to another run: another method, seed, batch size or data.
            RunError: The loss or the gradient became NaN or infinite, memory is not enough, or a process that loads
                data has died. The last good checkpoint remains.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(Path(str(self.args.output_dir)))  # type: ignore[assignment]
        if resume_from_checkpoint:
            validate_same_run(Path(str(resume_from_checkpoint)), self._parts.run_digest)
        self._resolve_memory_settings(resume_from_checkpoint)
        uses_cache = self.args.feature_cache != "off" and not self.sharded
        limit = int(self.args.feature_cache_gb * 2**30)
        with (
            data_worker_errors(),
            nullcontext() if self.sharded else fast_lora(self.model),
            cached_vision_features(self.vlm.vision_tower, limit, self._feature_cache_folder())
            if uses_cache
            else nullcontext(),
            fused_layers(self.vlm.decoder_layers),
        ):
            self._reference = self._reference or build_reference(
                self._parts, self.accelerator.autocast, self._cache_keys, self._on_reference
            )
            output: TrainOutput = super().train(
                str(resume_from_checkpoint) if resume_from_checkpoint else None, *args, **kwargs
            )
        trainable = self._trainable
        with torch.no_grad():
            for name, value in self._final_weights().items():
                trainable[name].copy_(value)
        return output

    def _resolve_memory_settings(self, checkpoint: str | bool | None) -> None:
        """Uses the settings of the first part of a resumed run, or those that the device needs."""
        recorded = read_memory_settings(Path(str(checkpoint))) if checkpoint else None
        if recorded is not None:
            self._token_limit = recorded.max_tokens
        if not self._parts.auto_checkpointing:
            return
        if recorded is not None:
            self.args.set_gradient_checkpointing(recorded.gradient_checkpointing)
        elif self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.activation_checkpointing:
            self._use_checkpointing(CheckpointingChoice(False, "FSDP's own activation checkpointing is on"))
        else:
            self._use_checkpointing(resolve_checkpointing(self._parts, self.sharded))

    def _use_checkpointing(self, choice: CheckpointingChoice) -> None:
        """Sets whether the model uses gradient checkpointing from the start of training, and reports it."""
        self.args.set_gradient_checkpointing(choice.enabled)
        logger.info("%s", choice)
        if self._on_checkpointing:
            self._on_checkpointing(choice)

    @property
    def _trainable(self) -> dict[str, nn.Parameter]:
        return trainable_parameters(self.unwrapped)

    def _final_weights(self) -> Mapping[str, Tensor]:
        """Returns the weights with which a defense replaces those of the last step, by name."""
        replaced = [weights for defense in self.defenses if (weights := defense.final_weights()) is not None]
        return replaced[0] if replaced else {}

    def _feature_cache_folder(self) -> Path | None:
        """Returns the folder of the vision features on disk, None if they are cached in memory."""
        if self.args.feature_cache != "disk" or self._cache_keys is None:
            return None
        parameter = next(self.vlm.model.parameters())
        key = [self._cache_keys.model, package_versions(), str(parameter.dtype), self.args.precision]
        return cache_folder() / "features" / digest_json([*key, parameter.device.type, DECODER_VERSION])

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Calls `eval_fn` with the model, logs its rates and returns them, with the prefix of the names in the log.

        In a distributed run, the main process evaluates and broadcasts the rates.

        Raises:
            UserError: The trainer has no `eval_fn`.
        """
        if self._eval_fn is None:
            raise UserError(
                "the trainer has no eval_fn. Pass it to UnlearningTrainer, or call vlm_unlearn.evaluate.",
                code="missing-setting",
                field="eval_fn",
            )
        rates = self.measure(self._eval_fn)
        prefix = self._eval_prefix if metric_key_prefix == "eval" else f"{metric_key_prefix}_"
        metrics = {f"{prefix}{name}": rate for name, rate in rates.items() if rate is not None}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Raises an error, because the trainer's data are for training.

        Raises:
            UserError: Always.
        """
        raise UserError(
            "the trainer does not predict. Call vlm_unlearn.evaluate with the model and a data set.",
            code="unsupported-setting",
        )

    def measure(self, eval_fn: EvalFunction) -> dict[str, float | None]:
        """Returns the rates of a function of the model in evaluation mode, in all processes."""
        rates: list[dict[str, float | None]] = [{}]
        if self.is_world_process_zero():
            model = self.unwrapped
            was_training = model.training
            model.eval()
            try:
                with swapped_weights(self._trainable, self._final_weights()), self.accelerator.autocast():
                    rates = [dict(eval_fn(model))]
            finally:
                model.train(was_training)
        return dict(broadcast_object_list(rates)[0])

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], None]:
        """Returns the micro-batches of an optimizer step in groups that run together, and counts their tokens.

        The tokens are those of all processes. The Trainer expects as many entries as there are micro-batches, so that
        empty groups, which `training_step` skips, are in front. If the step can be repeated, all micro-batches are in
        the last entry, and `training_step` groups them.
        """
        batches, _ = super().get_batch_samples(_raise_worker_errors(epoch_iterator), num_batches, device)
        self._token_totals = None
        self._step_batches = batches
        if batches and not self.method.paper_compat:
            counts = [count_tokens(batch) for batch in batches]
            sums = torch.tensor(
                [sum(count[key] for count in counts) for key in counts[0]], dtype=torch.float32, device=device
            )
            totals: Tensor = self.accelerator.reduce(sums, reduction="sum")
            micro_batches = len(batches) * self.args.world_size
            self._token_totals = {
                key: total / micro_batches for key, total in zip(counts[0], totals.tolist(), strict=True)
            }
        # Engines that shard parameters need the same number of forward passes in all processes.
        runs_alone = self.sharded or self._overrides_gradients
        largest = max(map(micro_batch_size, batches), default=0)
        self._max_tokens = 0 if runs_alone else tokens_per_pass(self.args.tokens_per_pass, largest)
        if self._token_limit is not None:
            self._max_tokens = min(self._max_tokens, self._token_limit)
        nonempty = [batch for batch in batches if batch]
        repeats = self._can_repeat_steps and nonempty
        groups = [nonempty] if repeats else group_micro_batches(nonempty, self._max_tokens)
        return [[]] * (len(batches) - len(groups)) + groups, None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Sequence[MicroBatch] | MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns the sum of the method's losses of some micro-batches and records their terms for the log.

        Raises:
            RunError: A loss is NaN or infinite.
        """
        micro_batches = [inputs] if isinstance(inputs, Mapping) else inputs
        total = torch.zeros((), device=self.args.device)
        for step in self._build_steps(micro_batches, None, model):
            output = self.method.loss(step)
            self._record(output)
            total = total + output.total
            if self.method.requirements.hidden_layers:
                total = total + step.zero_loss_over_all_logits()
        return (total, {}) if return_outputs else total

    def _build_steps(
        self, micro_batches: Sequence[MicroBatch], active_roles: Collection[Role] | None, wrapped: nn.Module | None
    ) -> list[ModelStep]:
        """Returns the values of each micro-batch for a loss. All of them run together. See `Passes`."""
        dtype = self.vlm.base_model.dtype
        progress = self.state.global_step / max(1, self.state.max_steps)
        roles = self.method.active_roles(progress)
        passes = Passes(
            self.vlm,
            [
                {role: move(batch, self.args.device, dtype) for role, batch in batches.items()}
                for batches in micro_batches
            ],
            self.method,
            self._reference,
            wrapped=wrapped,
            active_roles=[role for role in roles if active_roles is None or role in active_roles],
            max_tokens=None if self._overrides_gradients else max(self._max_tokens, MAX_AUTO_TOKENS),
        )
        return [ModelStep(passes, number, self._token_totals, progress) for number in range(len(micro_batches))]

    @property
    def _overrides_gradients(self) -> bool:
        """Whether a defense computes the gradients of a step, which needs its micro-batches one by one."""
        return any(item.overrides("forget_gradient") or item.overrides("latent_shifts") for item in self.defenses)

    def _record(self, output: LossOutput) -> None:
        """Records the loss terms of a micro-batch for the log.

        Raises:
            RunError: The loss is NaN or infinite.
        """
        if not torch.isfinite(output.total):
            terms = ", ".join(f"{name} {value.item():.4g}" for name, value in output.terms.items())
            raise RunError(
                f"the loss is not finite at step {self.state.global_step + 1} ({terms}). {self._divergence_advice()}",
                code="non-finite-loss",
            )
        for name, value in output.terms.items():
            self._loss_terms.setdefault(name, []).append(value.item())

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Runs forward and backward passes of some micro-batches and returns their loss, 0 if there are none.

        If memory is not enough for an optimizer step, the step is repeated in a way that takes less.

        Raises:
            RunError: A loss is NaN or infinite, or memory is not enough.
        """
        batch = args[0] if args else kwargs["inputs"]
        if not batch:
            return torch.zeros((), device=self.args.device)
        casts_inputs = self.accelerator.native_amp  # autocast
        with without_cudnn_attention(), without_lora_input_casts(self.model) if casts_inputs else nullcontext():
            if self._overrides_gradients:
                return repeat_in_less_memory(lambda: self._defended_training_step(model), lambda: False)
            run_pass = super().training_step
            counts = {name: len(values) for name, values in self._loss_terms.items()}
            return repeat_in_less_memory(
                lambda: torch.stack(
                    [run_pass(model, group) for group in group_micro_batches(batch, self._max_tokens)]
                ).sum(),
                lambda: self._can_repeat_steps and self._save_memory(batch, counts),
            )

    @property
    def _can_repeat_steps(self) -> bool:
        """Whether `training_step` runs an entire optimizer step, so that it can repeat it."""
        return self.args.world_size == 1 and not self.sharded and not self._overrides_gradients

    def _save_memory(self, micro_batches: Sequence[MicroBatch], term_counts: Mapping[str, int]) -> bool:
        """Undoes an optimizer step for which memory was not enough, and makes this one and all others take less.

        First, fewer micro-batches run together. If each runs alone, gradient checkpointing is switched on.

        Args:
            micro_batches: All micro-batches of the step.
            term_counts: The number of recorded values of each loss term before the step.

        Returns:
            Whether the step takes less. False if nothing is left that saves memory.
        """
        groups = group_micro_batches(micro_batches, self._max_tokens)
        if len(groups) < len(micro_batches):
            self._token_limit = max(sum(map(micro_batch_size, group)) for group in groups) // 2
            self._max_tokens = self._token_limit
            logger.warning("memory was not enough: at most %d tokens run at once from now on", self._token_limit)
        elif self._parts.auto_checkpointing and not self.args.activation_checkpointing:
            self._use_checkpointing(CheckpointingChoice(True, "memory was not enough without it"))
            self.unwrapped.activation_checkpointing_enable(self.args.activation_checkpointing_kwargs)
        else:
            return False
        self.model.zero_grad()
        for name, values in self._loss_terms.items():
            del values[term_counts.get(name, 0) :]
        return True

    def _defended_training_step(self, model: nn.Module) -> Tensor:
        """Computes the gradients of an optimizer step at its last micro-batch, and returns its mean loss.

        A defense perturbs the weights once for all micro-batches. At the others, this does nothing and returns 0.
        """
        if not self.accelerator.gradient_state.sync_gradients:
            return torch.zeros((), device=self.args.device)
        model.train()
        context = StepContext(
            vlm=self.vlm,
            parameters=self._trainable,
            build_step=lambda batches, roles: self._build_steps([batches], roles, None)[0],
            loss=self.method.loss,
            autocast=self.compute_loss_context_manager,
            backward=self.accelerator.backward,
            average=(lambda value: self.accelerator.reduce(value, reduction="mean"))
            if self.args.world_size > 1
            else None,
            step=self.state.global_step,
            seed=self.args.seed,
        )
        if not self._loss_is_validated:
            validate_sum_of_terms(context, self._step_batches[0])
            self._loss_is_validated = True
        outputs = DefendedStep(context, self._step_batches, self.defenses).run()
        for output in outputs:
            self._record(output)
        return torch.stack([output.total for output in outputs]).mean()

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Returns the inputs unchanged. `compute_loss` moves them."""
        return inputs

    def _divergence_advice(self) -> str:
        checkpoint = last_complete_checkpoint(Path(str(self.args.output_dir)))
        weights = f"The last good checkpoint is {checkpoint}." if checkpoint else "No checkpoint was written yet."
        return f"Start again in a new output folder with a lower training.learning_rate. {weights}"

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs the mean of each loss term since the last entry along with the Trainer's values.

        Raises:
            RunError: The gradient is NaN or infinite.
        """
        if self._loss_terms and "loss" in logs:
            means = torch.tensor(
                [math.fsum(values) / len(values) for values in self._loss_terms.values()], dtype=torch.float32
            )
            means = self.accelerator.reduce(means.to(self.args.device), reduction="mean")
            logs.update({name: round(value, 6) for name, value in zip(self._loss_terms, means.tolist(), strict=True)})
            self._loss_terms.clear()
        gradient_norm = logs.get("grad_norm")
        if gradient_norm is not None and not math.isfinite(gradient_norm):
            raise RunError(
                f"the gradient is not finite at step {self.state.global_step}. {self._divergence_advice()}",
                code="non-finite-gradient",
            )
        super().log(logs, *args, **kwargs)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Returns the Trainer's schedule, or that of the released code (see `published_order`)."""
        scheduler: torch.optim.lr_scheduler.LRScheduler = super().create_scheduler(num_training_steps, optimizer)
        repeat_scheduler_steps(self.method, scheduler, self.args.world_size)
        return scheduler

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Returns the Trainer's optimizer, with parameter groups for the projector if it has its own learning rate."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if self.args.projector_learning_rate is None:
            return optimizer
        base = self.vlm.base_model if model is None else get_base_model(model)
        projector_ids = {
            id(parameter) for name, parameter in base.named_parameters() if self.vlm.component(name) == "projector"
        }
        for group in list(optimizer.param_groups):
            projector = [parameter for parameter in group["params"] if id(parameter) in projector_ids]
            if projector:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in projector_ids]
                optimizer.add_param_group({**group, "params": projector, "lr": self.args.projector_learning_rate})
        return optimizer

    @property
    def unwrapped(self) -> Any:
        """The model without the wrapper of DDP, FSDP or DeepSpeed."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def sharded(self) -> bool:
        """Whether FSDP or DeepSpeed shards the parameters."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save and not self.sharded:  # FSDP and DeepSpeed write their own files
            save_trained(self.unwrapped, Path(str(output_dir or self.args.output_dir)))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process writes its own random state
        if self.args.should_save:
            folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            save_defenses(self.defenses, folder)
            memory = MemorySettings(bool(self.args.activation_checkpointing), self._token_limit)
            mark_complete(folder, self.state.global_step, self._parts.run_digest, memory)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model or its adapters, the processor and the method's state, to be loaded by `from_pretrained`.

        Args:
            output_dir: The folder. None saves to ``args.output_dir``.
            _internal_call: Set by the Trainer for a checkpoint, which contains only the trainable parameters.

        Raises:
            RunError: A trained weight is NaN or infinite.
        """
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        # All processes gather the weights that FSDP or DeepSpeed sharded, and one of them writes.
        gathered = self.accelerator.get_state_dict(self.model_wrapped) if self.sharded else None
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        model = self.unwrapped
        for name, value in trainable_parameters(model).items():
            # The loss of the last step was finite, but its update may not be.
            if not (gathered or {}).get(name, value).isfinite().all():
                raise RunError(
                    f"the trained weights are not finite ({name}). Lower the learning_rate.", code="non-finite-weights"
                )
        merge_sine(model)
        if gathered is None:
            model.save_pretrained(str(folder))
        elif self.vlm.has_adapters:
            model.save_pretrained(str(folder), state_dict=gathered)
        else:
            # A model that DeepSpeed loaded would save its weights under names that no other library reads.
            unsharded: Any = build_skeleton(self.vlm.base_model.config, "the trained model")
            unsharded.load_state_dict(gathered, strict=True, assign=True)
            unsharded.generation_config = model.generation_config
            unsharded.save_pretrained(str(folder))
        if self.vlm.has_adapters:
            sort_adapter_config(folder)
        save_processor(self.vlm.processor, folder)
        state = self.method.state()
        if state:
            save_file(state, folder / RunDirectory.METHOD_STATE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_trained(self.unwrapped, Path(resume_from_checkpoint))
            load_defenses(self.defenses, Path(resume_from_checkpoint), self.args.device)


def _raise_worker_errors(batches: Iterator[Any]) -> Iterator[Any]:
    """Raises the errors that DataLoader workers return in place of a batch (see `UnlearningCollator`)."""
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
        yield batch
