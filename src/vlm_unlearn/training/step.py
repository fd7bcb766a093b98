"""Runs each batch of a training step at most once through the current model and once through the reference model.

A method's loss receives a `ModelStep` and requests values from it, for example ``step.nll("forget")``:

1. The first request that needs the current model runs the batches of all roles through it, in one pass per group of
   roles that can be merged (see `_plan_passes`).
2. The first request for a reference value of a role runs the merged batch of the role's pass through the reference
   model, unless the value is cached.
3. Both give one output per role. The public methods read likelihoods, logits and hidden states from it.

Masks and token weights need no pass.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_unlearn.data.encoding import Batch
from vlm_unlearn.errors import UserError
from vlm_unlearn.losses import IGNORED, answer_mask
from vlm_unlearn.methods import Method, ReferenceHidden, Role, TokenKind
from vlm_unlearn.modeling.batch_merge import can_merge, merge_batches
from vlm_unlearn.modeling.forward import ForwardOutput, forward
from vlm_unlearn.modeling.packing import Packing, packing_of
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.training.references import CachedOutput, Reference

Reduction = Literal["mean", "sum"]


def count_tokens(batches: Mapping[Role, Batch]) -> dict[tuple[Role, TokenKind], int]:
    """Returns the number of tokens of each role's batch, by role and kind."""
    kinds: tuple[TokenKind, ...] = get_args(TokenKind)
    return {(role, kind): int(_token_count(batch, kind)) for role, batch in batches.items() for kind in kinds}


def _token_count(batch: Batch, kind: TokenKind) -> Tensor:
    """Returns the number of tokens of one kind as a scalar tensor."""
    if kind == "all":
        return batch["attention_mask"].sum()
    # Token 0 is never predicted. A batch whose answer is part of its prompt (RMU) has no labels.
    return (batch["labels"][:, 1:] != IGNORED).sum() if "labels" in batch else torch.tensor(0)


@dataclass(frozen=True)
class _MergedBatch:
    """The batches of one or more roles, merged so that one forward pass computes all of them."""

    roles: Sequence[Role]
    batch: Batch  # the rows of all roles, in the order of `roles`
    # [B, S] bool, where the loss uses logits. Position s predicts token s + 1. Passes that stop after the last hidden
    # layer ignore it.
    logit_mask: Tensor
    packing: Packing | None  # how to pack the rows so that common prefixes run once. None runs the batch as it is.


class ModelStep:
    """Implements `vlm_unlearn.methods.Step` for one micro-batch.

    Args:
        vlm: The model in training.
        batches: The batch of each role, on the model's device.
        method: Declares which layers, logits and reference values its loss uses.
        reference: Gives the outputs of the reference model. None if the method needs none.
        token_totals: The denominators of means over tokens, by role and kind: the tokens of the entire optimizer
            step, divided by its number of micro-batches in all processes. The Trainer averages over the micro-batches
            of a process, and DDP over processes, so that every token of the step has the same weight. None (with
            `paper_compat`) takes the tokens of `batches`, so that every micro-batch has the same weight.
        progress: Fraction of the run's optimizer steps that are complete, 0 at the first step.
        wrapped: The model inside the wrapper of DDP, FSDP or DeepSpeed. None if it has none.
        active_roles: The roles that run through the model. All values of the other roles are constants, so that the
            gradient of a loss is that of its terms on the active roles. None runs all roles.
    """

    def __init__(
        self,
        vlm: VisionLanguageModel,
        batches: Mapping[Role, Batch],
        method: Method,
        reference: Reference | None,
        token_totals: Mapping[tuple[Role, TokenKind], float] | None = None,
        progress: float = 0.0,
        wrapped: nn.Module | None = None,
        active_roles: Collection[Role] | None = None,
    ) -> None:
        self.progress = progress
        self.width = max((batch["input_ids"].shape[1] for batch in batches.values()), default=0)
        self._vlm = vlm
        self._wrapped = wrapped
        self._batches = batches
        self._active_roles = batches.keys() if active_roles is None else batches.keys() & set(active_roles)
        self._method = method
        self._reference = reference
        self._token_totals: Mapping[tuple[Role, TokenKind], float] = (
            count_tokens(batches) if token_totals is None else token_totals
        )
        self._merged_batches: dict[Role, _MergedBatch] = {}  # the merged batch that contains the role
        self._current_outputs_by_role: dict[Role, ForwardOutput] = {}
        self._reference_outputs_by_role: dict[Role, ForwardOutput | CachedOutput] = {}

    # Forward passes

    def merged_inputs(self) -> Batch:
        """Returns the batch [B, S] that one forward pass runs for all active roles.

        Raises:
            UserError: They need several passes, because only some of them have images.
        """
        passes = self._plan_passes()
        if len(passes) > 1:
            raise UserError(
                "the forget and the preferred examples of a batch cannot run together. Give both an image, or none.",
                code="unsupported-setting",
                field="defense",
            )
        return self._merge(passes[0][0]).batch

    def _current_output(self, role: Role) -> ForwardOutput:
        """Returns the current model's output for a role. The first call runs all active roles."""
        if role not in self._active_roles:
            return self._constant_output(role)
        if not self._current_outputs_by_role:
            for roles, stop_after_last_hidden_layer in self._plan_passes():
                merged = self._merge(roles)
                self._merged_batches.update(dict.fromkeys(roles, merged))
                self._current_outputs_by_role.update(self._run(merged, stop_after_last_hidden_layer, self._wrapped))
        return self._current_outputs_by_role[role]

    def _reference_output(self, role: Role) -> ForwardOutput | CachedOutput:
        """Returns the reference model's output for a role.

        Unless the value is cached, this runs exactly the batch of the role's pass, with the other roles of it. Before
        the first update, and without dropout, the two outputs are then bitwise equal. With a different batch, rounding
        would make them differ, and terms whose gradient at equality is zero or undefined (KL, norms) would give noise
        that Adam scales up to full-size steps.
        """
        if role not in self._active_roles:
            return self._constant_output(role)
        self._current_output(role)
        if role not in self._reference_outputs_by_role:
            assert self._reference is not None, "the loss uses a value that is not in ForwardRequirements.references"
            references = self._method.requirements.references
            needs_only_hidden = all(isinstance(requirement, ReferenceHidden) for requirement in references)
            merged = self._merged_batches[role]
            batches = {merged_role: self._batches[merged_role] for merged_role in merged.roles}
            self._reference_outputs_by_role.update(
                self._reference.outputs(
                    self._vlm.model,
                    batches,
                    lambda: self._run(merged, stop_after_last_hidden_layer=needs_only_hidden),
                )
            )
        return self._reference_outputs_by_role[role]

    def _constant_output(self, role: Role) -> ForwardOutput:
        """Returns zeros in place of the output for a role that is not active. They take no memory."""
        batch, mask = self._batches[role], self._logit_mask(role)
        rows, width = batch["input_ids"].shape
        zero = torch.zeros((), device=mask.device)
        text_config = self._vlm.base_model.config.get_text_config()
        return ForwardOutput(
            mask,
            zero.expand(int(mask.sum()), text_config.vocab_size),
            batch.get("labels", torch.full_like(batch["input_ids"], IGNORED)),
            {
                layer: zero.expand(rows, width, self._vlm.hidden_size)
                for layer in self._method.requirements.hidden_layers
            },
        )

    def _reference_states(self, role: Role) -> ForwardOutput:
        """Returns the reference model's output for a role, which is not cached."""
        output = self._reference_output(role)
        assert isinstance(output, ForwardOutput), "only likelihoods are cached"
        return output

    def _plan_passes(self) -> list[tuple[list[Role], bool]]:
        """Groups the roles into forward passes of the current model.

        There are two groups of roles: those of which the loss uses only hidden states, and the others. If the batches
        of a group have the same inputs by name (for example, all have ``pixel_values``), they run in one pass, so that
        its overhead occurs once. Otherwise each role of the group runs alone.

        With `find_unused_parameters`, DDP searches the outputs of the last pass for unused parameters. The last pass
        must therefore use all of them: it runs all decoder layers and, if any batch contains images, contains images,
        since text alone does not use the projector.

        Returns:
            For each pass, in order: its roles, and whether it may stop after the last layer whose hidden states are
            used and computes no logits. A method leaves at least one role complete.
        """
        roles_with_images = {role for role in self._active_roles if "pixel_values" in self._batches[role]}
        active = [role for role in self._batches if role in self._active_roles]
        roles = sorted(active, key=lambda role: role in roles_with_images)  # those with images last
        truncated = [role for role in roles if role in self._method.requirements.truncated_roles]
        if self._wrapped is not None and roles_with_images and roles_with_images <= set(truncated):
            truncated = []  # otherwise the last pass would be without images
        complete = [role for role in roles if role not in truncated]

        passes: list[tuple[list[Role], bool]] = []
        for group, stop_after_last_hidden_layer in ((truncated, True), (complete, False)):
            if len(group) > 1 and can_merge([self._batches[role] for role in group]):
                passes.append((group, stop_after_last_hidden_layer))
            else:
                passes.extend(([role], stop_after_last_hidden_layer) for role in group)
        return passes

    def _merge(self, roles: Sequence[Role]) -> _MergedBatch:
        """Merges the batches of some roles and marks the positions whose logits their losses use."""
        batches = [self._batches[role] for role in roles]
        batch = merge_batches(batches) if len(batches) > 1 else batches[0]
        width = batch["input_ids"].shape[1]
        masks = [self._logit_mask(role) for role in roles]  # merge_batches pads on the right, and so do the masks
        logit_mask = torch.cat([F.pad(mask, (0, width - mask.shape[1])) for mask in masks])
        return _MergedBatch(roles, batch, logit_mask, packing_of(self._vlm, batch, self._method))

    def _logit_mask(self, role: Role) -> Tensor:
        """Returns [B, S] bool, True at the positions of the role's batch whose logits the loss uses."""
        batch = self._batches[role]
        if role in self._method.requirements.full_logit_roles:
            return torch.ones_like(batch["input_ids"], dtype=torch.bool)
        return answer_mask(batch.get("labels", torch.full_like(batch["input_ids"], IGNORED)))

    def _run(
        self, merged: _MergedBatch, stop_after_last_hidden_layer: bool, wrapped: nn.Module | None = None
    ) -> dict[Role, ForwardOutput]:
        """Runs one forward pass and splits its output by role."""
        output = forward(
            self._vlm,
            merged.batch,
            self._method.requirements.hidden_layers,
            merged.logit_mask,
            merged.packing,
            stop_after_last_hidden_layer,
            wrapped,
        )
        token_ids = [self._batches[role]["input_ids"] for role in merged.roles]
        outputs = output.split([(len(ids), ids.shape[1]) for ids in token_ids])
        return dict(zip(merged.roles, outputs, strict=True))

    # Values for the loss, documented in `vlm_unlearn.methods.Step`

    def nll(self, role: Role, reduction: Reduction = "mean") -> Tensor:
        return _reduce(self._current_output(role).answer_nll, reduction)

    def reference_nll(self, role: Role, reduction: Reduction = "mean") -> Tensor:
        return _reduce(self._reference_output(role).answer_nll, reduction)

    def cross_entropy(self, *roles: Role) -> Tensor:
        total = torch.stack([self._current_output(role).answer_nll[0].sum() for role in roles]).sum()
        return total / sum(self._token_totals[role, "answer"] for role in roles)

    def micro_batch_nll(self, role: Role) -> tuple[Tensor, Tensor]:
        # Unlike `cross_entropy`, a mean over this micro-batch (`paper_compat`). Both models predict the same tokens.
        nll_sum, tokens = self._current_output(role).answer_nll
        reference_sum, _ = self._reference_output(role).answer_nll
        return nll_sum.sum() / tokens.sum(), reference_sum.sum() / tokens.sum()

    def logits(self, role: Role) -> Tensor:
        return self._current_output(role).padded_logits()

    def reference_logits(self, role: Role) -> Tensor:
        return self._reference_states(role).padded_logits()

    def labels(self, role: Role) -> Tensor:
        # The columns of `padded_logits`: from the first with logits to one past the last, so that the labels can be
        # shifted.
        return self._batches[role]["labels"][:, self._current_output(role).columns]

    def hidden(self, role: Role, layer: int) -> Tensor:
        return self._current_output(role).hidden[layer]

    def reference_hidden(self, role: Role, layer: int) -> Tensor:
        return self._reference_states(role).hidden[layer]

    def attention_mask(self, role: Role) -> Tensor:
        return self._batches[role]["attention_mask"]

    def answer_mask(self, role: Role) -> Tensor:
        return answer_mask(self._batches[role]["labels"])

    def token_weight(self, role: Role, kind: TokenKind) -> Tensor:
        return _token_count(self._batches[role], kind) / self._token_totals[role, kind]

    def zero_loss_over_all_logits(self) -> Tensor:
        """Returns a scalar 0 that depends on every computed logit, for methods that use hidden states.

        A loss on hidden states alone leaves the upper layers out of the graph, and DDP would hang waiting for their
        gradients.
        """
        return torch.stack([0.0 * self._current_output(role).logits.float().sum() for role in self._batches]).sum()


def _reduce(answer_nll: tuple[Tensor, Tensor], reduction: Reduction) -> Tensor:
    """Returns [B], each sample's answer NLL as a token mean or a sequence sum."""
    nll_sum, tokens = answer_nll
    return nll_sum / tokens if reduction == "mean" else nll_sum
