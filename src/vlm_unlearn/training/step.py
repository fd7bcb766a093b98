"""One training step's batches seen through the model: every value is computed once, when a method first asks for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_unlearn.data.encoding import Batch
from vlm_unlearn.losses import IGNORED, answer_mask
from vlm_unlearn.methods import Method, ReferenceHidden, Role, TokenKind
from vlm_unlearn.training.batch_merge import can_merge, merge_batches
from vlm_unlearn.training.forward import Forward, forward, packing_of
from vlm_unlearn.training.packing import Packing
from vlm_unlearn.training.references import ReferenceModel


def count_tokens(batches: Mapping[Role, Batch]) -> dict[tuple[Role, TokenKind], int]:
    """Real tokens and answer tokens of each role's batch."""
    kinds: tuple[TokenKind, ...] = ("all", "answer")
    return {(role, kind): int(_counted(batch, kind)) for role, batch in batches.items() for kind in kinds}


def _counted(batch: Batch, kind: TokenKind) -> Tensor:
    if kind == "all":
        return batch["attention_mask"].sum()
    return (batch["labels"][:, 1:] != IGNORED).sum() if "labels" in batch else torch.tensor(0)


@dataclass(frozen=True)
class _Group:
    """Roles whose batches are one pass."""

    roles: Sequence[Role]
    batch: Batch
    wanted: Tensor  # [B, S] bool, where a loss reads logits
    packing: Packing | None


class ModelStep:
    """`vlm_unlearn.methods.Step` over a model and its reference."""

    def __init__(
        self,
        model: nn.Module,
        batches: Mapping[Role, Batch],
        method: Method,
        reference: ReferenceModel | None,
        totals: Mapping[tuple[Role, TokenKind], float] | None = None,
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
        self._totals: Mapping[tuple[Role, TokenKind], float] = totals if totals is not None else count_tokens(batches)
        self._current_outputs_by_role: dict[Role, Forward] = {}
        self._reference_outputs_by_role: dict[Role, Forward] = {}
        self._groups: dict[Role, _Group] = {}  # the roles that were run in one pass

    def _current_outputs(self, role: Role) -> Forward:
        if not self._current_outputs_by_role:
            self._run_all()
        return self._current_outputs_by_role[role]

    def _run_all(self) -> None:
        """Roles in one pass where their batches can be joined: a step's overheads are paid once, and DDP wants it so."""
        with_image = {role for role, batch in self._batches.items() if "pixel_values" in batch}
        # Images last: a pass without any doesn't use the projector, and DDP sees what is unused in the last pass.
        roles = sorted(self._batches, key=lambda role: role in with_image)
        short = [role for role in roles if role in self._method.truncated_forward_roles]
        if with_image & set(short) and not with_image - set(short):
            short = []  # a pass through all layers must be the last, and have an image
        for stop, part in ((True, short), (False, [role for role in roles if role not in short])):
            joined = len(part) > 1 and can_merge([self._batches[role] for role in part])
            for group in [part] if joined else [[role] for role in part]:
                self._run(group, stop)

    def _run(self, roles: Sequence[Role], stop: bool) -> None:
        batches = [self._batches[role] for role in roles]
        batch = merge_batches(batches) if len(batches) > 1 else batches[0]
        width = batch["input_ids"].shape[1]
        wanted = torch.cat([F.pad(self._wanted(role), (0, width - self._wanted(role).shape[1])) for role in roles])
        group = _Group(roles, batch, wanted, packing_of(self._model, batch, self._method))
        self._groups.update(dict.fromkeys(roles, group))
        self._current_outputs_by_role.update(self._outcomes(self._model, group, stop))

    def _outcomes(self, model: nn.Module, group: _Group, stop: bool) -> dict[Role, Forward]:
        """What one pass of some roles' batches gives each of them."""
        outcome = forward(model, group.batch, self._method.hidden_layers, group.wanted, group.packing, stop)
        ids = [self._batches[role]["input_ids"] for role in group.roles]
        return dict(zip(group.roles, outcome.parted([(len(rows), rows.shape[1]) for rows in ids]), strict=True))

    def _wanted(self, role: Role) -> Tensor:
        """[B, S] where the role's loss reads logits."""
        batch = self._batches[role]
        if role in self._method.full_logit_roles:
            return torch.ones_like(batch["input_ids"], dtype=torch.bool)
        return answer_mask(batch.get("labels", torch.full_like(batch["input_ids"], IGNORED)))

    def _reference_outputs(self, role: Role) -> Forward:
        """In the same pass as `_now`, other roles of it included: while the weights are the reference's, the values are too, to the bit.
        A term whose gradient there is nothing or undefined (KL, a norm) would make steps of rounding errors, and Adam large ones."""
        self._current_outputs(role)
        if role not in self._reference_outputs_by_role:
            assert self._reference is not None, (
                "the method asked for a reference that it did not declare in `reference_requirements`"
            )
            stop = all(isinstance(need, ReferenceHidden) for need in self._method.reference_requirements)
            with self._reference.active(self._model) as reference:
                self._reference_outputs_by_role.update(self._outcomes(reference, self._groups[role], stop))
        return self._reference_outputs_by_role[role]

    def zero_loss_over_all_logits(self) -> Tensor:
        """[] zero, but of every logit: a loss of hidden states alone leaves what lies above them out of the graph, and DDP, which looks
        for what is unused from the outputs of the forward pass, would wait for its gradients."""
        return torch.stack([0.0 * self._current_outputs(role).logits.float().sum() for role in self._batches]).sum()

    def nll(self, role: Role, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
        nll_sum, tokens = self._current_outputs(role).answer_nll
        return nll_sum / tokens if reduction == "mean" else nll_sum

    def reference_nll(self, role: Role, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
        nll_sum, tokens = self._reference_answer(role)
        return nll_sum / tokens if reduction == "mean" else nll_sum

    def cross_entropy(self, *roles: Role) -> Tensor:
        total = torch.stack([self._current_outputs(role).answer_nll[0].sum() for role in roles]).sum()
        return total / sum(self._totals[role, "answer"] for role in roles)

    def batch_nll(self, role: Role) -> tuple[Tensor, Tensor]:
        nll_sum, tokens = self._current_outputs(role).answer_nll
        reference_sum, _ = self._reference_answer(role)
        return nll_sum.sum() / tokens.sum(), reference_sum.sum() / tokens.sum()

    def logits(self, role: Role) -> Tensor:
        return self._current_outputs(role).block()

    def reference_logits(self, role: Role) -> Tensor:
        return self._reference_outputs(role).block()

    def labels(self, role: Role) -> Tensor:
        return self._batches[role]["labels"][:, self._current_outputs(role).columns]

    def hidden(self, role: Role, layer: int) -> Tensor:
        return self._current_outputs(role).hidden[layer]

    def reference_hidden(self, role: Role, layer: int) -> Tensor:
        return self._reference_outputs(role).hidden[layer]

    def attention_mask(self, role: Role) -> Tensor:
        return self._batches[role]["attention_mask"]

    def answer_mask(self, role: Role) -> Tensor:
        return answer_mask(self._batches[role]["labels"])

    def token_weight(self, role: Role, kind: TokenKind) -> Tensor:
        return _counted(self._batches[role], kind) / self._totals[role, kind]

    def _reference_answer(self, role: Role) -> tuple[Tensor, Tensor]:
        batch = self._batches[role]
        if "reference_nll_sum" in batch:
            return batch["reference_nll_sum"], batch["reference_tokens"]
        return self._reference_outputs(role).answer_nll
