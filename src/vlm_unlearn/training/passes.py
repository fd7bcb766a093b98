"""Runs the batches of several micro-batches at most once through the current model and once through the reference.

The micro-batches of an optimizer step are known before it starts. Those that fit into memory together run as one: their
batches are merged into as few forward passes as possible, and each micro-batch gets its part of the outputs. A loss
computed from these parts equals the one of a micro-batch that runs alone, up to rounding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_unlearn.data.encoding import Batch
from vlm_unlearn.errors import UserError
from vlm_unlearn.losses import IGNORED, answer_mask
from vlm_unlearn.methods import Method, ReferenceHidden, ReferenceNLL, Role
from vlm_unlearn.modeling.batch_merge import input_names, merge_batches
from vlm_unlearn.modeling.forward import ForwardOutput, forward
from vlm_unlearn.modeling.packing import NO_IMAGE, Packing, packing_of
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.training.references import BatchKey, CachedOutput, Reference

MicroBatch = Mapping[Role, Batch]
AUTO_MICRO_BATCHES = 3  # that ``tokens_per_pass: auto`` runs together, if they have few tokens
MAX_AUTO_TOKENS = 2048


@dataclass(frozen=True)
class _Pass:
    """One or more batches, merged so that one forward pass computes all of them."""

    keys: Sequence[BatchKey]
    batch: Batch  # the rows of all keys, in their order
    # [B, S] bool, where the loss uses logits. Position s predicts token s + 1. Passes that stop after the last hidden
    # layer ignore it.
    logit_mask: Tensor
    packing: Packing | None  # how to pack the rows so that common prefixes run once. None runs the batch as it is.
    stop_after_last_hidden_layer: bool = False

    @cached_property
    def positions(self) -> int:
        """The number of positions that run through the model."""
        ids = self.batch["input_ids"]
        return ids.numel() if self.packing is None else len(self.packing.segments.prefix)


class Passes:
    """The forward passes of some micro-batches of an optimizer step.

    The first request for an output of the current model runs all passes. The first request for a reference output runs
    the pass that contains it through the reference model, unless the value is cached.

    Args:
        vlm: The model in training.
        micro_batches: The batch of each role for each micro-batch, on the model's device.
        method: Declares which layers, logits and reference values its loss uses.
        reference: Gives the outputs of the reference model. None if the method needs none.
        wrapped: The model inside the wrapper of DDP, FSDP or DeepSpeed. None if it has none.
        active_roles: The roles that run through the model. The outputs of the others are constants. None runs all.
        max_tokens: The number of tokens above which a pass gets no further batch. None runs everything that can run
            together in one pass, even if the reference model then runs batches whose outputs nobody needs.
    """

    def __init__(
        self,
        vlm: VisionLanguageModel,
        micro_batches: Sequence[MicroBatch],
        method: Method,
        reference: Reference | None,
        *,
        wrapped: nn.Module | None = None,
        active_roles: Collection[Role] | None = None,
        max_tokens: int | None = None,
    ) -> None:
        self.micro_batches = micro_batches
        self.method = method
        self._vlm = vlm
        self._reference = reference
        self._wrapped = wrapped
        self._max_tokens = max_tokens
        self._batches: dict[BatchKey, Batch] = {
            (number, role): batch for number, batches in enumerate(micro_batches) for role, batch in batches.items()
        }
        self._active = [key for key in self._batches if active_roles is None or key[1] in active_roles]
        self._passes: dict[BatchKey, _Pass] = {}  # the pass that contains the key
        self._current_outputs: dict[BatchKey, ForwardOutput] = {}
        self._reference_outputs: dict[BatchKey, ForwardOutput | CachedOutput] = {}

    def merged_inputs(self) -> Batch:
        """Returns the batch [B, S] that one forward pass runs for all active roles.

        Raises:
            UserError: They need several passes, because only some of them have images.
        """
        passes = self._plan()
        if len(passes) > 1:
            raise UserError(
                "the forget and the preferred examples of a batch cannot run together. Give both an image, or none.",
                code="unsupported-setting",
                field="defense",
            )
        return passes[0].batch

    def current(self, key: BatchKey) -> ForwardOutput:
        """Returns the current model's output for a batch. The first call runs all active batches."""
        if key not in self._active:
            return self._constant_output(key)
        if not self._current_outputs:
            for planned in self._plan():
                self._passes.update(dict.fromkeys(planned.keys, planned))
                self._current_outputs.update(
                    self._run(planned, planned.stop_after_last_hidden_layer, wrapped=self._wrapped)
                )
        return self._current_outputs[key]

    def reference(self, key: BatchKey) -> ForwardOutput | CachedOutput:
        """Returns the reference model's output for a batch.

        Unless the value is cached, this runs exactly the pass that contains the batch. Before the first update, and
        without dropout, the two outputs are then bitwise equal. With a different pass, rounding would make them differ,
        and terms whose gradient at equality is zero or undefined (KL, norms) would give noise that Adam scales up to
        full-size steps.
        """
        if key not in self._active:
            return self._constant_output(key)
        self.current(key)
        if key not in self._reference_outputs:
            assert self._reference is not None, "the loss uses a value that is not in ForwardRequirements.references"
            references = self.method.requirements.references
            needs_only_hidden = all(isinstance(requirement, ReferenceHidden) for requirement in references)
            planned = self._passes[key]
            batches = {pass_key: self._batches[pass_key] for pass_key in planned.keys}
            self._reference_outputs.update(
                self._reference.outputs(self._vlm.model, batches, lambda: self._run(planned, needs_only_hidden))
            )
        return self._reference_outputs[key]

    def _constant_output(self, key: BatchKey) -> ForwardOutput:
        """Returns zeros in place of the output for a role that is not active. They take no memory."""
        batch, mask = self._batches[key], self._logit_mask(key)
        rows, width = batch["input_ids"].shape
        zero = torch.zeros((), device=mask.device)
        text_config = self._vlm.base_model.config.get_text_config()
        return ForwardOutput(
            mask,
            zero.expand(int(mask.sum()), text_config.vocab_size),
            batch.get("labels", torch.full_like(batch["input_ids"], IGNORED)),
            {
                layer: zero.expand(rows, width, self._vlm.hidden_size)
                for layer in self.method.requirements.hidden_layers
            },
        )

    # Plan

    def _plan(self) -> list[_Pass]:
        """Groups the active batches into forward passes of the current model.

        Batches run together if they have the same inputs by name (for example, all have ``pixel_values``), and if all
        or none of them may stop after the last layer whose hidden states are used.

        With `find_unused_parameters`, DDP searches the outputs of the last pass for unused parameters. The last pass
        must therefore use all of them: it runs all decoder layers and, if any batch contains images, contains images,
        since text alone does not use the projector.
        """
        with_images = [key for key in self._active if "pixel_values" in self._batches[key]]
        truncated = {key for key in self._active if key[1] in self.method.requirements.truncated_roles}
        if self._wrapped is not None and with_images and truncated.issuperset(with_images):
            truncated = set()  # otherwise the last pass would be without images
        groups: dict[tuple[bool, bool, frozenset[str]], list[BatchKey]] = {}
        for key in self._active:
            batch = self._batches[key]
            groups.setdefault((key not in truncated, "pixel_values" in batch, input_names(batch)), []).append(key)
        passes = []
        for complete, has_images, names in sorted(groups, key=lambda group: group[:2]):
            for keys in self._divided(groups[complete, has_images, names]):
                passes.extend(self._with_references_apart(keys, not complete))
        return passes

    def _divided(self, keys: Sequence[BatchKey]) -> list[list[BatchKey]]:
        """Divides batches so that each part has at most `max_tokens` tokens or is a single batch."""
        parts: list[list[BatchKey]] = []
        tokens = 0
        for key in keys:
            count = count_positions(self._batches[key])
            if not parts or (self._max_tokens is not None and tokens + count > self._max_tokens):
                parts.append([])
                tokens = 0
            parts[-1].append(key)
            tokens += count
        return parts

    def _with_references_apart(self, keys: Sequence[BatchKey], truncated: bool) -> list[_Pass]:
        """Returns one pass for all batches, or two if it saves time to run the reference model on some of them only.

        A forward pass with its backward pass takes two to three times as long as the pass of the reference model. It
        counts as two here, so that batches run apart if they share little.
        """
        joint = self._merge(keys, truncated)
        references = self.method.requirements.references
        compared = {requirement.role for requirement in references}
        with_reference = [key for key in keys if key[1] in compared]
        # Likelihoods are cached by default. The passes are the same if they are not, and so are masks of dropout.
        can_be_cached = all(isinstance(requirement, ReferenceNLL) for requirement in references)
        if self._max_tokens is None or can_be_cached or not 0 < len(with_reference) < len(keys):
            return [joint]
        others = self._merge([key for key in keys if key[1] not in compared], truncated)
        apart = self._merge(with_reference, truncated)
        if 3 * joint.positions <= 2 * others.positions + 3 * apart.positions:
            return [joint]
        return [others, apart]

    def _merge(self, keys: Sequence[BatchKey], truncated: bool) -> _Pass:
        """Merges batches and marks the positions whose logits their losses use."""
        batches = [self._batches[key] for key in keys]
        batch = merge_batches(batches) if len(batches) > 1 else batches[0]
        width = batch["input_ids"].shape[1]
        masks = [self._logit_mask(key) for key in keys]  # merge_batches pads on the right, and so do the masks
        logit_mask = torch.cat([F.pad(mask, (0, width - mask.shape[1])) for mask in masks])
        packing = packing_of(self._vlm, batch, self._used_widths(keys))
        return _Pass(keys, batch, logit_mask, packing, truncated)

    def _used_widths(self, keys: Sequence[BatchKey]) -> list[int] | None:
        """Returns the number of positions of each row whose outputs are used, None if no padding is used.

        The published code averages over padding in the terms on hidden states and on logits of all positions.
        """
        requirements = self.method.requirements
        if not self.method.paper_compat or not (requirements.hidden_layers or requirements.full_logit_roles):
            return None
        widths: list[int] = []
        for key in keys:
            batch = self._batches[key]
            rows, width = batch["input_ids"].shape
            counts_padding = requirements.hidden_layers or key[1] in requirements.full_logit_roles
            widths.extend([width] * rows if counts_padding else batch["attention_mask"].sum(dim=1).tolist())
        return widths

    def _logit_mask(self, key: BatchKey) -> Tensor:
        """Returns [B, S] bool, True at the positions of a batch whose logits the loss uses."""
        batch = self._batches[key]
        if key[1] in self.method.requirements.full_logit_roles:
            return torch.ones_like(batch["input_ids"], dtype=torch.bool)
        return answer_mask(batch.get("labels", torch.full_like(batch["input_ids"], IGNORED)))

    def _run(
        self, planned: _Pass, stop_after_last_hidden_layer: bool, wrapped: nn.Module | None = None
    ) -> dict[BatchKey, ForwardOutput]:
        """Runs one forward pass and splits its output by batch."""
        output = forward(
            self._vlm,
            planned.batch,
            self.method.requirements.hidden_layers,
            planned.logit_mask,
            planned.packing,
            stop_after_last_hidden_layer,
            wrapped,
        )
        shapes = [self._batches[key]["input_ids"].shape for key in planned.keys]
        outputs = output.split([(shape[0], shape[1]) for shape in shapes])
        return dict(zip(planned.keys, outputs, strict=True))


def tokens_per_pass(setting: str | int, largest_micro_batch: int) -> int:
    """Returns the number of tokens that the setting `tokens_per_pass` stands for in an optimizer step.

    ``auto`` was chosen so that the peak of memory stays below that of the released code, which runs the roles of a
    micro-batch one after the other but stores more of each. More tokens are hardly faster on a CPU.

    Args:
        setting: A number, or ``auto``.
        largest_micro_batch: The number of tokens of the largest micro-batch of the step in this process.
    """
    return setting if isinstance(setting, int) else min(AUTO_MICRO_BATCHES * largest_micro_batch, MAX_AUTO_TOKENS)


def group_micro_batches(micro_batches: Sequence[MicroBatch], max_tokens: int) -> list[list[MicroBatch]]:
    """Returns groups of micro-batches to run together, each of at most `max_tokens` tokens or a single micro-batch.

    Micro-batches with a common image are in the same group if there is room, and the others are sorted by length.
    Groups are as equal in size as possible.

    Args:
        micro_batches: All micro-batches of an optimizer step in this process.
        max_tokens: The limit of the tokens of all roles, with padding. 0 gives each micro-batch a group of its own.
    """
    if not max_tokens:
        return [[batches] for batches in micro_batches]
    sizes = [micro_batch_size(batches) for batches in micro_batches]
    images = [_image_keys(batches) for batches in micro_batches]
    common = {key for key, count in Counter(key for keys in images for key in keys).items() if count > 1}

    def place(number: int) -> tuple[int, int]:
        return (min((key for key in images[number] if key in common), default=-1), sizes[number])

    total = sum(sizes)
    target = total / max(1, -(-total // max_tokens))
    groups: list[list[MicroBatch]] = []
    tokens = 0
    for number in sorted(range(len(micro_batches)), key=place):
        size = sizes[number]
        if not groups or tokens + size > max_tokens or tokens + size / 2 > target:
            groups.append([])
            tokens = 0
        groups[-1].append(micro_batches[number])
        tokens += size
    return groups


def micro_batch_size(batches: MicroBatch) -> int:
    """Returns the number of positions of a micro-batch, with padding."""
    return sum(map(count_positions, batches.values()))


def _image_keys(batches: MicroBatch) -> set[int]:
    """Returns the keys of the images of a micro-batch."""
    keys = {key for batch in batches.values() if "images" in batch for key in batch["images"].tolist()}
    return keys - {NO_IMAGE}


def count_positions(batch: Batch) -> int:
    """Returns the number of positions of a batch, with padding."""
    return int(batch["input_ids"].numel())
