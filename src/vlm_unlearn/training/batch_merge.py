"""Joins the batches of several roles into one, so that a step is one forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_unlearn.data.encoding import Batch
from vlm_unlearn.losses import IGNORED

NON_MODEL_KEYS = ("labels", "images", "reference_nll_sum", "reference_tokens")


def can_merge(batches: Sequence[Mapping[str, Tensor]]) -> bool:
    """Whether all batches hold the same kinds of model input: one without any image is run on its own."""
    return len({frozenset(batch.keys() - set(NON_MODEL_KEYS)) for batch in batches}) == 1


def merge_batches(batches: Sequence[Mapping[str, Tensor]]) -> Batch:
    """One batch of all rows, in order, padded on the right to the widest.

    Tensors are laid end to end along their first dimension, be it samples, images or patches; the other dimensions are padded
    with zeros (padding tokens under a zero attention mask, empty tiles), labels with -100.
    """
    labelled = [
        batch if "labels" in batch else {**batch, "labels": torch.full_like(batch["input_ids"], IGNORED)}
        for batch in batches
    ]
    names = labelled[0].keys() - {"reference_nll_sum", "reference_tokens"}
    return {name: _lay([batch[name] for batch in labelled], IGNORED if name == "labels" else 0) for name in names}


def _lay(tensors: Sequence[Tensor], fill: int) -> Tensor:
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        # torch counts the padding from the last dimension on: (before, after) each.
        missing = [
            side
            for size, wanted in zip(reversed(tensor.shape[1:]), reversed(shape), strict=True)
            for side in (0, wanted - size)
        ]
        padded.append(F.pad(tensor, missing, value=fill) if any(missing) else tensor)
    return torch.cat(padded)
