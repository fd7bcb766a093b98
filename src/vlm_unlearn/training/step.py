"""One training step's batches seen through the model: every value is computed once, when a method first asks for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlm_unlearn.data.batching import Batch
from vlm_unlearn.losses import IGNORED, answer_mask, answer_nll
from vlm_unlearn.methods import Method, Role
from vlm_unlearn.models.layout import decoder_layers
from vlm_unlearn.training.joining import NOT_FOR_THE_MODEL, can_join, join
from vlm_unlearn.training.references import ReferenceModel

Counted = Literal["tokens", "answers"]


@dataclass(frozen=True)
class Forward:
    """What one pass of a batch through a model gave."""

    logits: Tensor  # [B, K, V] at the kept columns
    labels: Tensor  # [B, K] of the kept columns
    columns: Tensor  # [K], ascending without a gap
    hidden: Mapping[int, Tensor]  # [B, S, H] by decoder layer

    @cached_property
    def answer(self) -> tuple[Tensor, Tensor]:
        """``(nll_sum [B], tokens [B])`` of the answers."""
        return answer_nll(self.logits, self.labels)

    def rows(self, start: int, count: int, width: int) -> Forward:
        """What the pass gave for some rows, which were `width` positions wide before they were joined with others."""
        rows, inside = slice(start, start + count), int((self.columns < width).sum())
        hidden = {layer: states[rows, :width] for layer, states in self.hidden.items()}
        return Forward(self.logits[rows, :inside], self.labels[rows, :inside], self.columns[:inside], hidden)


def forward(model: nn.Module, batch: Batch, layers: Mapping[int, nn.Module] | None = None, columns: Tensor | None = None) -> Forward:
    """Runs a batch [B, S] through the model.

    Args:
        layers: the decoder layers whose outputs are kept, by number.
        columns: [K] where logits are wanted; None takes those around the answers.
    """
    inputs: dict[str, Any] = {key: value for key, value in batch.items() if key not in NOT_FOR_THE_MODEL}
    labels = batch.get("labels", torch.full_like(batch["input_ids"], IGNORED))
    kept = answer_columns(labels) if columns is None else columns
    with _captured(layers or {}) as seen:
        logits = model(**inputs, logits_to_keep=kept, use_cache=False).logits
    return Forward(logits, labels[:, kept], kept, seen)


def answer_columns(labels: Tensor) -> Tensor:
    """[K] from one position before the first answer token of any row to the last one: full-vocabulary logits nowhere else."""
    answered = (labels != IGNORED).any(dim=0).nonzero()
    first, last = (int(answered.min()) - 1, int(answered.max())) if len(answered) else (0, 0)
    return torch.arange(first, last + 1, device=labels.device)


@contextmanager
def _captured(layers: Mapping[int, nn.Module]) -> Iterator[dict[int, Tensor]]:
    seen: dict[int, Tensor] = {}

    def keeping(number: int) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            seen[number] = output[0] if isinstance(output, tuple) else output

        return keep

    with ExitStack() as hooks:
        for number, layer in layers.items():
            hooks.callback(layer.register_forward_hook(keeping(number)).remove)
        yield seen


def count(batches: Mapping[Role, Batch]) -> dict[tuple[Role, Counted], int]:
    """Real tokens and answer tokens of each role's batch."""
    kinds: tuple[Counted, ...] = ("tokens", "answers")
    return {(role, of): int(_counted(batch, of)) for role, batch in batches.items() for of in kinds}


def _counted(batch: Batch, of: Counted) -> Tensor:
    if of == "tokens":
        return batch["attention_mask"].sum()
    return (batch["labels"][:, 1:] != IGNORED).sum() if "labels" in batch else torch.tensor(0)


class ModelStep:
    """`vlm_unlearn.methods.Step` over a model and its reference."""

    def __init__(
        self,
        model: nn.Module,
        batches: Mapping[Role, Batch],
        method: Method,
        reference: ReferenceModel | None,
        totals: Mapping[tuple[Role, Counted], float] | None = None,
        progress: float = 0.0,
    ) -> None:
        """Args:
        totals: tokens of the whole optimizer step, divided by its number of micro-batches over all processes; None where
            each micro-batch weighs the same.
        """
        self.progress = progress
        self._model = model
        self._batches = batches
        self._method = method
        self._reference = reference
        self._totals: Mapping[tuple[Role, Counted], float] = totals if totals is not None else count(batches)
        layers = decoder_layers(getattr(model, "module", model)) if method.hidden_layers else nn.ModuleList()
        self._layers = {number: layers[number] for number in method.hidden_layers}
        self._current: dict[Role, Forward] = {}
        self._before: dict[Role, Forward] = {}

    def _now(self, role: Role) -> Forward:
        if not self._current:
            self._run_all()
        return self._current[role]

    def _run_all(self) -> None:
        """All roles in one pass where their batches can be joined: a step's overheads are paid once, and DDP wants it so."""
        # Images last: a pass without any doesn't use the projector, and DDP must see that pass first.
        roles = sorted(self._batches, key=lambda role: "pixel_values" in self._batches[role])
        together = [roles] if can_join([self._batches[role] for role in roles]) else [[role] for role in roles]
        for group in together:
            self._run(group)

    def _run(self, roles: Sequence[Role]) -> None:
        batches = [self._batches[role] for role in roles]
        batch = join(batches) if len(batches) > 1 else batches[0]
        wide = any(role in self._method.whole_logits for role in roles)
        columns = torch.arange(batch["input_ids"].shape[1], device=batch["input_ids"].device) if wide else None
        outcome = forward(self._model, batch, self._layers, columns)
        start = 0
        for role, batch in zip(roles, batches, strict=True):
            rows, width = batch["input_ids"].shape
            self._current[role] = outcome.rows(start, rows, width)
            start += rows

    def _then(self, role: Role) -> Forward:
        if role not in self._before:
            assert self._reference is not None, "the method asked for a reference that it did not declare in `needs`"
            columns = self._now(role).columns  # the same, so that the two can be compared
            with self._reference.active(self._model) as reference:
                self._before[role] = forward(reference, self._batches[role], self._layers, columns)
        return self._before[role]

    def nothing(self) -> Tensor:
        """[] zero, but of every logit: a loss of hidden states alone leaves what lies above them out of the graph, and DDP, which looks
        for what is unused from the outputs of the forward pass, would wait for its gradients."""
        return torch.stack([0.0 * self._now(role).logits.float().mean() for role in self._batches]).sum()

    def nll(self, role: Role, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
        nll_sum, tokens = self._now(role).answer
        return nll_sum / tokens if reduction == "mean" else nll_sum

    def reference_nll(self, role: Role, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
        nll_sum, tokens = self._reference_answer(role)
        return nll_sum / tokens if reduction == "mean" else nll_sum

    def cross_entropy(self, *roles: Role) -> Tensor:
        total = torch.stack([self._now(role).answer[0].sum() for role in roles]).sum()
        return total / sum(self._totals[role, "answers"] for role in roles)

    def batch_nll(self, role: Role) -> tuple[Tensor, Tensor]:
        nll_sum, tokens = self._now(role).answer
        reference_sum, _ = self._reference_answer(role)
        return nll_sum.sum() / tokens.sum(), reference_sum.sum() / tokens.sum()

    def logits(self, role: Role) -> Tensor:
        return self._now(role).logits

    def reference_logits(self, role: Role) -> Tensor:
        return self._then(role).logits

    def labels(self, role: Role) -> Tensor:
        return self._now(role).labels

    def hidden(self, role: Role, layer: int) -> Tensor:
        return self._now(role).hidden[layer]

    def reference_hidden(self, role: Role, layer: int) -> Tensor:
        return self._then(role).hidden[layer]

    def attention_mask(self, role: Role) -> Tensor:
        return self._batches[role]["attention_mask"]

    def answer_mask(self, role: Role) -> Tensor:
        return answer_mask(self._batches[role]["labels"])

    def share(self, role: Role, of: Counted) -> Tensor:
        return _counted(self._batches[role], of) / self._totals[role, of]

    def _reference_answer(self, role: Role) -> tuple[Tensor, Tensor]:
        batch = self._batches[role]
        if "reference_nll_sum" in batch:
            return batch["reference_nll_sum"], batch["reference_tokens"]
        return self._then(role).answer
