"""The subclass of transformers.Trainer.

It trains on nested batches with a method's loss, logs the loss terms and writes checkpoints that resume exactly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer

from vlm_unlearn.data.encoding import Batch, move
from vlm_unlearn.errors import RunError, UserError
from vlm_unlearn.methods import Method, Role, TokenKind
from vlm_unlearn.modeling.attention import without_cudnn_attention
from vlm_unlearn.modeling.structure import get_base_model
from vlm_unlearn.modeling.trainable import without_lora_input_casts
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.store import write_json
from vlm_unlearn.training.references import Reference
from vlm_unlearn.training.step import ModelStep, count_tokens

COMPLETE = "complete.json"  # the file that is written last into a checkpoint
TRAINED = "trained.safetensors"  # the trainable parameters by name; the base model has the others


class UnlearningTrainer(Trainer):
    """Trains a model with a `Method` on batches ``{"forget": {...}, "retain": {...}}``.

    Resuming, gradient accumulation, distribution, logging and saving of adapters are those of transformers.

    Args:
        vlm: The model to train.
        method: Computes the loss of a step.
        reference: Gives the outputs of the reference model. None if the method needs none.
        projector_learning_rate: The projector's learning rate. None uses the learning rate of the other parameters.
        kwargs: Arguments of transformers.Trainer.
    """

    # The Trainer averages the losses of a step's micro-batches, and DDP averages their gradients over processes.
    # `_token_totals` are averages too, so that the result is the mean over all tokens of the optimizer step.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        vlm: VisionLanguageModel,
        method: Method,
        reference: Reference | None,
        projector_learning_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=vlm.model, **kwargs)
        self.vlm = vlm
        self.method = method
        self.reference = reference
        self._projector_learning_rate = projector_learning_rate
        self._loss_terms: dict[str, list[float]] = {}  # since the last log entry
        self._token_totals: dict[tuple[Role, TokenKind], float] | None = None  # of the current optimizer step

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
        step = ModelStep(self.vlm, batches, self.method, self.reference, self._token_totals, progress, model)
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
        if self._projector_learning_rate is None:
            return optimizer
        base = self.vlm.base_model if model is None else get_base_model(model)
        projector_ids = {
            id(parameter) for name, parameter in base.named_parameters() if self.vlm.component(name) == "projector"
        }
        for group in list(optimizer.param_groups):
            projector = [parameter for parameter in group["params"] if id(parameter) in projector_ids]
            if projector:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in projector_ids]
                optimizer.add_param_group({**group, "params": projector, "lr": self._projector_learning_rate})
        return optimizer

    @property
    def sharded(self) -> bool:
        """Whether FSDP or DeepSpeed shards the parameters."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def save_trained(self, folder: Path) -> None:
        """Writes the trainable parameters to ``trained.safetensors``.

        A checkpoint uses this file instead of `save_pretrained`: transformers 5.23 saves several VLM families under
        renamed keys and cannot load them back (its issue 43701).
        """
        folder.mkdir(parents=True, exist_ok=True)
        trained = {name: value.detach().contiguous() for name, value in self._trainable_parameters().items()}
        save_file(trained, folder / TRAINED)

    def load_trained(self, folder: Path) -> None:
        """Loads the parameters that `save_trained` wrote.

        Raises:
            RunError: The file contains other parameters than those of this run.
        """
        trainable, saved = self._trainable_parameters(), load_file(folder / TRAINED)
        if saved.keys() != trainable.keys():
            raise RunError(
                "the checkpoint contains other parameters than this run trains. "
                "Delete the run's folder and start again.",
                code="checkpoint-mismatch",
                file=folder,
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
            write_json(folder / COMPLETE, {"step": self.state.global_step, "files": files})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.load_trained(Path(resume_from_checkpoint))


def _raise_worker_errors(batches: Iterator[Any]) -> Iterator[Any]:
    """Raises the errors that DataLoader workers return in place of a batch (see `UnlearningCollator`)."""
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Returns the newest checkpoint whose files are complete, or None."""
    checkpoints = {}
    for marker in folder.glob(f"checkpoint-*/{COMPLETE}"):
        try:
            content = json.loads(marker.read_text(encoding="utf-8"))
            if all((marker.parent / name).stat().st_size == size for name, size in content["files"].items()):
                checkpoints[int(content["step"])] = marker.parent
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a damaged marker or a missing file
            continue
    return checkpoints[max(checkpoints)] if checkpoints else None
