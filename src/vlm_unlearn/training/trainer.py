"""The one subclass of transformers.Trainer: nested batches, a method's loss, its parts in the log, checkpoints that resume to the bit."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer

from vlm_unlearn.data.encoding import Batch, move
from vlm_unlearn.errors import RunError, UserError
from vlm_unlearn.methods import Method, Role, TokenKind
from vlm_unlearn.models.layout import get_base_model, is_projector, layout_of
from vlm_unlearn.store import write_json
from vlm_unlearn.training.references import ReferenceModel
from vlm_unlearn.training.step import ModelStep, count_tokens

COMPLETE = "complete.json"  # written last into a checkpoint
TRAINED = "trained.safetensors"  # the parameters that train, by name; the others are the base model's


class UnlearningTrainer(Trainer):
    """Trains with a `Method` on batches ``{"forget": {...}, "retain": {...}}``.

    Resume, accumulation, distribution, logging and adapter saving are transformers' own.
    """

    # `Step` divides by the micro-batches of the step already where it weighs tokens; the Trainer's own division then makes a sum of them.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        method: Method,
        reference: ReferenceModel | None,
        projector_learning_rate: float | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.method = method
        self.reference = reference
        self._projector_learning_rate = projector_learning_rate
        self._parts: dict[str, list[float]] = {}
        self._totals: dict[tuple[Role, TokenKind], float] | None = None

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], None]:
        """The micro-batches of an optimizer step; counts their tokens, over all processes."""
        batches, _ = super().get_batch_samples(_raising(epoch_iterator), num_batches, device)
        self._totals = None
        if batches and not self.method.paper_compat:
            counts = [count_tokens(batch) for batch in batches]
            sums = torch.tensor(
                [sum(found[key] for found in counts) for key in counts[0]], dtype=torch.float32, device=device
            )
            totals: Tensor = self.accelerator.reduce(sums, reduction="sum")
            parts = len(batches) * self.args.world_size
            self._totals = {key: total / parts for key, total in zip(counts[0], totals.tolist(), strict=True)}
        return batches, None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[Role, Batch],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        inner = self.accelerator.unwrap_model(model)
        batches = {role: move(batch, self.args.device, inner.dtype) for role, batch in inputs.items()}
        progress = self.state.global_step / max(1, self.state.max_steps)
        step = ModelStep(model, batches, self.method, self.reference, self._totals, progress)
        output = self.method.loss(step)
        total = output.total + step.zero_loss_over_all_logits() if self.method.hidden_layers else output.total
        if not torch.isfinite(output.total):
            parts = ", ".join(f"{name} {value.item():.4g}" for name, value in output.terms.items())
            raise RunError(f"the loss is not finite at step {self.state.global_step + 1} ({parts}); {self._way_out()}")
        for name, value in output.terms.items():
            self._parts.setdefault(name, []).append(value.item())
        return (total, {}) if return_outputs else total

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Left as they are: `compute_loss` moves them, and DeepSpeed's dtype is not for reference values."""
        return inputs

    def _way_out(self) -> str:
        """What to do after a divergence, and where the weights of before are."""
        checkpoint = last_complete_checkpoint(Path(str(self.args.output_dir)))
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint was written yet"
        return f"start again in a new output folder with a lower training.learning_rate; {kept}"

    def log(self, logs: dict[str, float], *arguments: Any, **keywords: Any) -> None:
        if self._parts and "loss" in logs:
            means = torch.tensor(
                [math.fsum(values) / len(values) for values in self._parts.values()], dtype=torch.float32
            )
            means = self.accelerator.reduce(means.to(self.args.device), reduction="mean")
            logs.update({name: round(value, 6) for name, value in zip(self._parts, means.tolist(), strict=True)})
            self._parts.clear()
        gradient = logs.get("grad_norm")
        if gradient is not None and not math.isfinite(gradient):
            raise RunError(f"the gradient is not finite at step {self.state.global_step}; {self._way_out()}")
        super().log(logs, *arguments, **keywords)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The library's optimizer; the projector's parameters in groups with their own learning rate, where it has one."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if self._projector_learning_rate is not None:
            whole = self.model if model is None else model
            inner = get_base_model(whole)
            layout = layout_of(inner)
            projector = {id(parameter) for name, parameter in inner.named_parameters() if is_projector(name, layout)}
            for group in list(optimizer.param_groups):
                own = [parameter for parameter in group["params"] if id(parameter) in projector]
                if own:
                    group["params"] = [parameter for parameter in group["params"] if id(parameter) not in projector]
                    optimizer.add_param_group({**group, "params": own, "lr": self._projector_learning_rate})
        return optimizer

    @property
    def sharded(self) -> bool:
        """Whether FSDP or DeepSpeed has cut the parameters up."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def save_trained(self, folder: Path) -> None:
        """Writes the parameters that train. They are what a checkpoint needs: transformers 5.23 saves several VLM families
        under renamed keys and can't load them back (its issue 43701)."""
        inner = self.accelerator.unwrap_model(self.model)
        trained = {name: value.detach().contiguous() for name, value in inner.named_parameters() if value.requires_grad}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(trained, folder / TRAINED)

    def load_trained(self, folder: Path) -> None:
        """Puts back what `save_trained` wrote."""
        inner: nn.Module = self.accelerator.unwrap_model(self.model)
        trained = {name: value for name, value in inner.named_parameters() if value.requires_grad}
        found = load_file(folder / TRAINED)
        if found.keys() != trained.keys():
            raise RunError(
                f"{folder}: holds other parameters than this run trains; delete the run's folder and start again"
            )
        with torch.no_grad():
            for name, value in found.items():
                trained[name].copy_(value)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save and not self.sharded:  # FSDP and DeepSpeed write their own beside it
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


def _raising(batches: Iterator[Any]) -> Iterator[Any]:
    """Raises the errors that processes that load data hand over as batches."""
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end and has lost nothing since, or None."""
    found = {}
    for marker in folder.glob(f"checkpoint-*/{COMPLETE}"):
        try:
            told = json.loads(marker.read_text(encoding="utf-8"))
            whole = all((marker.parent / name).stat().st_size == size for name, size in told["files"].items())
            found[int(told["step"])] = marker.parent if whole else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a damaged one, whatever is damaged
            continue
    return max(((step, path) for step, path in found.items() if path is not None), default=(0, None))[1]
