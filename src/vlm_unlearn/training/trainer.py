"""The trainer: transformers.Trainer with an unlearning method as its loss.

It trains on nested batches, logs the loss terms and writes checkpoints that resume exactly.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import TrainOutput

from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.data.encoding import Batch, Processor, move
from vlm_unlearn.errors import RunError, UserError
from vlm_unlearn.methods import Role, TokenKind
from vlm_unlearn.modeling.attention import without_cudnn_attention
from vlm_unlearn.modeling.features import FeatureCache, cache_vision_features
from vlm_unlearn.modeling.forward import forward, packing_of
from vlm_unlearn.modeling.loader import build_skeleton
from vlm_unlearn.modeling.sine import merge_sine
from vlm_unlearn.modeling.structure import get_base_model
from vlm_unlearn.modeling.trainable import without_lora_input_casts
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.records import Example
from vlm_unlearn.store import RunDirectory, cache_folder, digest_json, package_versions, read_json, write_json
from vlm_unlearn.training.arguments import UnlearningConfig
from vlm_unlearn.training.references import (
    NLL,
    AdapterReference,
    CachedReference,
    FrozenCopyReference,
    Reference,
    cached_nll,
    resolve_reference_strategy,
)
from vlm_unlearn.training.step import ModelStep, count_tokens
from vlm_unlearn.training.stream import UnlearningCollator, UnlearningStream

EvalFunction = Callable[[Any], Mapping[str, float | None]]  # rates by name, None for a rate that was not measured


@dataclass(frozen=True)
class CacheKeys:
    """What identifies the model and the data of a run in caches on disk, such as digests of their files."""

    model: Mapping[str, object]
    data: Mapping[str, object]


class UnlearningTrainer(Trainer):
    """Unlearns a forget set while it preserves a retain set.

    Resuming, gradient accumulation, distribution and logging are those of transformers.

    Example:
        >>> trainer = UnlearningTrainer(
        ...     model=model,
        ...     args=UnlearningConfig(output_dir="runs/npo", method="npo", method_args={"beta": 0.5}),
        ...     train_dataset="data/train",
        ...     processing_class=processor,
        ...     peft_config=LoraConfig(r=32, target_modules=["q_proj", "v_proj"]),
        ... )
        >>> trainer.train()
        >>> trainer.save_model("models/npo")

    Args:
        model: A model that ``AutoModelForImageTextToText`` loads, or a PEFT model of it.
        args: The arguments.
        train_dataset: The examples of each role: an `UnlearningDataset`, the folder of a training set, a `DatasetDict`
            with one split per role, a `Dataset` with a column ``role``, or a mapping of role to rows. See
            `UnlearningDataset.from_datasets` for the columns.
        processing_class: The model's processor, with a chat template.
        peft_config: The adapters to train, of any kind that PEFT has. None trains the parameters of the model that
            require gradients, without the vision tower unless ``args.freeze_vision_tower`` is False.
        eval_fn: Called with the model in evaluation mode, every ``args.eval_steps`` steps if ``args.eval_strategy`` is
            ``"steps"``. Its rates are logged as ``eval_<name>``.
        callbacks: Callbacks of transformers.
        optimizers: An optimizer and a scheduler instead of the default ones.
        cache_keys: Identify model and data in the caches on disk. None caches in memory only.
        on_reference: Called while reference values are computed before the first step, with the number of finished
            examples and of all examples.
        check_lengths: Whether to check the lengths of all examples before training.

    Raises:
        UserError: An argument does not fit the model, the data or the other arguments.
    """

    # The Trainer averages the losses of a step's micro-batches, and DDP averages their gradients over processes.
    # `_token_totals` are averages too, so that the result is the mean over all tokens of the optimizer step.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: nn.Module,
        args: UnlearningConfig,
        train_dataset: Any,
        processing_class: Processor,
        peft_config: PeftConfig | None = None,
        *,
        eval_fn: EvalFunction | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        cache_keys: CacheKeys | None = None,
        on_reference: Callable[[int, int], None] | None = None,
        check_lengths: bool = True,
    ) -> None:
        if not isinstance(args, UnlearningConfig):
            raise UserError("must be an UnlearningConfig", code="invalid-field", field="args")
        if args.eval_strategy != "no" and eval_fn is None:
            raise UserError("eval_strategy needs an eval_fn", code="missing-setting", field="eval_fn")
        if eval_fn is not None and args.eval_strategy == "no":
            raise UserError(
                'eval_fn is never called. Set eval_strategy="steps" and eval_steps.',
                code="conflicting-settings",
                field="eval_strategy",
            )
        data = UnlearningDataset.from_any(train_dataset)
        self.vlm = _with_trainable_parameters(VisionLanguageModel(model, processing_class), args, peft_config)
        self.method = args.build_method()
        self.method.prepare(
            self.vlm.hidden_size, len(self.vlm.decoder_layers), torch.Generator().manual_seed(args.seed)
        )
        # Adapters that were trained before are part of the reference model, which disabling them would not give.
        may_disable_adapters = peft_config is not None or (args.reference == "adapter" and self.vlm.has_adapters)
        strategy = resolve_reference_strategy(args.reference, self.method.reference_requirements, may_disable_adapters)
        args = copy.copy(args)
        args.max_steps = args.num_steps(len(data["forget"]))
        if args.world_size > 1 and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = _may_have_unused_parameters(self.vlm, data)
        stream = UnlearningStream(
            data, self.method, args.max_steps * args.samples_per_step(), args.seed, args.group_by_image
        )
        collator: Any = UnlearningCollator(processing_class, data, self.method, args.max_length)
        if check_lengths:
            collator.check_lengths()
        super().__init__(
            model=self.vlm.model,
            args=args,
            data_collator=collator,
            train_dataset=stream,
            eval_dataset=stream if eval_fn else None,  # not used, but required by the Trainer
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._stream = stream
        self._collator = collator
        self._train_data_digest = _digest_of_run(args, data)
        self._eval_fn = eval_fn
        self._cache_keys = cache_keys
        self._on_reference = on_reference
        self._reference_strategy = strategy
        self._reference: Reference | None = None
        self._loss_terms: dict[str, list[float]] = {}  # since the last log entry
        self._token_totals: dict[tuple[Role, TokenKind], float] | None = None  # of the current optimizer step

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
            RunError: The loss or the gradient became NaN or infinite. The last good checkpoint remains.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(Path(str(self.args.output_dir)))  # type: ignore[assignment]
        if resume_from_checkpoint:
            self._validate_checkpoint(Path(str(resume_from_checkpoint)))
        with self._cached_features():
            if self._reference is None and self._reference_strategy is not None:
                self._reference = self._create_reference()
            output: TrainOutput = super().train(
                str(resume_from_checkpoint) if resume_from_checkpoint else None, *args, **kwargs
            )
        return output

    def _validate_checkpoint(self, checkpoint: Path) -> None:
        try:
            digest = read_json(checkpoint / RunDirectory.CHECKPOINT_COMPLETE).get("run")
        except (UserError, AttributeError):
            digest = None  # another program's checkpoint, or an older version's
        if digest is not None and digest != self._train_data_digest:
            raise UserError(
                "belongs to another run: the method, the seed, the batch size, the number of steps or the data differ",
                code="run-mismatch",
                file=checkpoint,
            )

    @contextmanager
    def _cached_features(self) -> Iterator[None]:
        """Caches the vision tower's features if the tower is frozen and not sharded."""
        tower = self.vlm.vision_tower
        frozen = not any(parameter.requires_grad for parameter in tower.parameters())
        if self.args.feature_cache == "off" or not frozen or self.sharded:
            yield
            return
        folder = None
        if self.args.feature_cache == "disk" and self._cache_keys is not None:
            parameter = next(self.vlm.model.parameters())
            key = [self._cache_keys.model, package_versions(), str(parameter.dtype), self._precision]
            folder = cache_folder() / "features" / digest_json([*key, parameter.device.type])
        restore = cache_vision_features(tower, FeatureCache(int(self.args.feature_cache_gb * 2**30), folder))
        try:
            yield
        finally:
            restore()

    def _create_reference(self) -> Reference:
        """Returns the reference model of the run, before its first step."""
        if self._reference_strategy == "adapter":
            return AdapterReference()
        if self._reference_strategy == "copy":
            return FrozenCopyReference(self.vlm.model)
        roles = [requirement.role for requirement in self.method.reference_requirements]
        self.vlm.model.eval()
        with _gathered_parameters(self.vlm.model):
            return CachedReference({role: self._cached_nll(role) for role in roles})

    def _cached_nll(self, role: Role) -> Mapping[int, NLL]:
        """Returns the reference NLLs of a role, from the cache folder or computed now."""
        examples, batch_size = self._stream.unique_examples(role), self.args.per_device_train_batch_size
        dtype, device = next(self.vlm.model.parameters()).dtype, self.args.device

        def compute(batch_examples: Sequence[Example]) -> list[NLL]:
            batch = move(self._collator.encode(role, batch_examples), device, dtype)
            with torch.no_grad(), without_cudnn_attention(), self.accelerator.autocast():
                output = forward(self.vlm, batch, packing=packing_of(self.vlm, batch, self.method))
            nll_sum, tokens = output.answer_nll
            return list(zip(nll_sum.tolist(), tokens.tolist(), strict=True))

        file = None
        if self._cache_keys is not None:
            key = {
                **self._cache_keys.model,
                "data": self._cache_keys.data,
                "versions": package_versions(),
                "weights": str(dtype),
                "precision": self._precision,
                "max_length": self.args.max_length,
                "batch_size": batch_size,
                "rendering": 2,  # version of the conversion of turns to tokens
                "examples": [[example.id, example.answer] for example in examples],
            }
            file = cache_folder() / "reference" / f"{digest_json(key)}.json"
        return cached_nll(file, examples, compute, batch_size, self._on_reference)

    @property
    def _precision(self) -> str:
        return "bf16" if self.args.bf16 else "fp16" if self.args.fp16 else "fp32"

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Calls `eval_fn` with the model, logs its rates and returns them as ``eval_<name>``.

        In a distributed run, the main process evaluates and broadcasts the rates.
        """
        rates = {} if self._eval_fn is None else self.measure(self._eval_fn)
        metrics = {f"{metric_key_prefix}_{name}": rate for name, rate in rates.items() if rate is not None}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(self, eval_fn: EvalFunction) -> dict[str, float | None]:
        """Returns the rates of a function of the model in evaluation mode, in all processes."""
        rates: list[dict[str, float | None]] = [{}]
        if self.is_world_process_zero():
            model = self.accelerator.unwrap_model(self.model)
            was_training = model.training
            model.eval()
            try:
                with self.accelerator.autocast():
                    rates = [dict(eval_fn(model))]
            finally:
                model.train(was_training)
        return dict(broadcast_object_list(rates)[0])

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], None]:
        """Returns the micro-batches of an optimizer step, and counts their tokens over all processes."""
        batches, _ = super().get_batch_samples(_raise_worker_errors(epoch_iterator), num_batches, device)
        self._token_totals = None
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
        return batches, None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[Role, Batch],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns the method's loss of one micro-batch and records its terms for the log.

        Raises:
            RunError: The loss is NaN or infinite.
        """
        dtype = self.vlm.base_model.dtype
        batches = {role: move(batch, self.args.device, dtype) for role, batch in inputs.items()}
        progress = self.state.global_step / max(1, self.state.max_steps)
        step = ModelStep(self.vlm, batches, self.method, self._reference, self._token_totals, progress, model)
        output = self.method.loss(step)
        total = output.total + step.zero_loss_over_all_logits() if self.method.hidden_layers else output.total
        if not torch.isfinite(output.total):
            terms = ", ".join(f"{name} {value.item():.4g}" for name, value in output.terms.items())
            raise RunError(
                f"the loss is not finite at step {self.state.global_step + 1} ({terms}). {self._divergence_advice()}",
                code="non-finite-loss",
            )
        for name, value in output.terms.items():
            self._loss_terms.setdefault(name, []).append(value.item())
        return (total, {}) if return_outputs else total

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Runs forward and backward pass of a micro-batch and returns its loss."""
        casts_inputs = self.accelerator.native_amp  # autocast
        with without_cudnn_attention(), without_lora_input_casts(self.model) if casts_inputs else nullcontext():
            loss: Tensor = super().training_step(model, *args, **kwargs)
        return loss

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
    def sharded(self) -> bool:
        """Whether FSDP or DeepSpeed shards the parameters."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def save_trained(self, directory: Path) -> None:
        """Writes the trainable parameters to ``trained.safetensors``.

        A checkpoint uses this file instead of `save_pretrained`: transformers 5.23 saves several VLM families under
        renamed keys and cannot load them back (its issue 43701).
        """
        directory.mkdir(parents=True, exist_ok=True)
        trained = {name: value.detach().contiguous() for name, value in self._trainable_parameters().items()}
        save_file(trained, directory / RunDirectory.TRAINED_WEIGHTS)

    def load_trained(self, directory: Path) -> None:
        """Loads the parameters that `save_trained` wrote.

        Raises:
            RunError: The file contains other parameters than those of this run.
        """
        trainable = self._trainable_parameters()
        saved = load_file(directory / RunDirectory.TRAINED_WEIGHTS)
        if saved.keys() != trainable.keys():
            raise RunError(
                "the checkpoint contains other parameters than this run trains. "
                "Delete the run's folder and start again.",
                code="checkpoint-mismatch",
                file=directory,
            )
        with torch.no_grad():
            for name, value in saved.items():
                trainable[name].copy_(value)

    def _trainable_parameters(self) -> dict[str, nn.Parameter]:
        unwrapped: nn.Module = self.accelerator.unwrap_model(self.model)
        return {name: value for name, value in unwrapped.named_parameters() if value.requires_grad}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save and not self.sharded:  # FSDP and DeepSpeed write their own files
            self.save_trained(Path(str(output_dir or self.args.output_dir)))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process writes its own random state
        if self.args.should_save:
            folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            files = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
            complete = {"step": self.state.global_step, "files": files, "run": self._train_data_digest}
            write_json(folder / RunDirectory.CHECKPOINT_COMPLETE, complete)

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
        model: Any = self.accelerator.unwrap_model(self.model)
        for name, value in self._trainable_parameters().items():
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
        self.vlm.processor.save_pretrained(str(folder))
        state = self.method.state()
        if state:
            save_file(state, folder / RunDirectory.METHOD_STATE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.load_trained(Path(resume_from_checkpoint))


def _with_trainable_parameters(
    vlm: VisionLanguageModel, args: UnlearningConfig, peft_config: PeftConfig | None
) -> VisionLanguageModel:
    """Adds adapters or freezes the vision tower, as the arguments say."""
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
    return digest_json([*settings, args.samples_per_step(), args.group_by_image, args.max_length, examples])


def _gathered_parameters(model: nn.Module) -> AbstractContextManager[object]:
    """Gathers the parameters that ZeRO-3 sharded at loading. The DeepSpeed engine that does so does not exist yet."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(list(model.parameters()))
    return gathered


def _raise_worker_errors(batches: Iterator[Any]) -> Iterator[Any]:
    """Raises the errors that DataLoader workers return in place of a batch (see `UnlearningCollator`)."""
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def last_complete_checkpoint(output_dir: Path) -> Path | None:
    """Returns the newest checkpoint whose files are complete, or None."""
    checkpoints = {}
    for marker in output_dir.glob(f"checkpoint-*/{RunDirectory.CHECKPOINT_COMPLETE}"):
        try:
            content = json.loads(marker.read_text(encoding="utf-8"))
            if all((marker.parent / name).stat().st_size == size for name, size in content["files"].items()):
                checkpoints[int(content["step"])] = marker.parent
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a damaged marker or a missing file
            continue
    return checkpoints[max(checkpoints)] if checkpoints else None
