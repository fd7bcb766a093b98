"""The one subclass of transformers.Trainer: nested batches, a method's loss, its parts in the log, checkpoints that resume to the bit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from vlm_unlearn.data.batching import Batch, move
from vlm_unlearn.errors import WorkError
from vlm_unlearn.methods import Method, Role
from vlm_unlearn.store import write_json
from vlm_unlearn.training.references import ReferenceModel
from vlm_unlearn.training.step import ModelStep

COMPLETE = "complete.json"  # written last into a checkpoint


class UnlearningTrainer(Trainer):
    """Trains with a `Method` on batches ``{"forget": {...}, "retain": {...}}``.

    Resume, accumulation, distribution, logging and adapter saving are transformers' own.
    """

    # Our losses are means over a micro-batch, so the Trainer must divide them by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(self, method: Method, reference: ReferenceModel | None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.method = method
        self.reference = reference
        self._parts: dict[str, list[float]] = {}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[Role, Batch],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        inner = self.accelerator.unwrap_model(model)
        batches = {role: move(batch, inner.device, inner.dtype) for role, batch in inputs.items()}
        output = self.method.loss(ModelStep(model, batches, self.method.hidden_layer, self.reference))
        if not torch.isfinite(output.total):
            parts = ", ".join(f"{name} {value.item():.4g}" for name, value in output.parts.items())
            raise WorkError(f"the loss is not finite at step {self.state.global_step + 1} ({parts}); lower training.learning_rate")
        for name, value in output.parts.items():
            self._parts.setdefault(name, []).append(value.item())
        return (output.total, {}) if return_outputs else output.total

    def log(self, logs: dict[str, float], *arguments: Any, **keywords: Any) -> None:
        if self._parts and "loss" in logs:
            logs.update({name: round(math.fsum(values) / len(values), 6) for name, values in self._parts.items()})
            self._parts.clear()
        super().log(logs, *arguments, **keywords)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            write_json(folder / COMPLETE, {"step": self.state.global_step})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        inner: Any = self.model if model is None else model
        if hasattr(inner, "get_base_model") or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        # transformers 5.23 saves several VLM families under renamed keys and loads them with strict=False, which restores
        # nothing (its issue 43701); loading through from_pretrained renames them back.
        fresh = type(inner).from_pretrained(resume_from_checkpoint, dtype=inner.dtype)
        inner.load_state_dict(fresh.state_dict(), strict=True)


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end, or None."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(found, key=lambda path: int(path.name.rsplit("-", 1)[-1]), default=None)
