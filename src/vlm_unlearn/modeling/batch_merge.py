"""Merges the batches of several roles into one, so that a training step runs one forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_unlearn.data.encoding import Batch
from vlm_unlearn.losses import IGNORED

NON_MODEL_KEYS = ("labels", "images", "answer_keys")  # the model's forward takes none of them


def input_names(batch: Mapping[str, Tensor]) -> frozenset[str]:
    """Returns the names of the model's inputs in a batch. Batches with the same names can be merged."""
    return frozenset(batch.keys() - set(NON_MODEL_KEYS))


def merge_batches(batches: Sequence[Mapping[str, Tensor]]) -> Batch:
    """Returns one batch with all rows in order, padded on the right to the longest batch.

    Tensors are concatenated along their first dimension, which counts samples, images or image patches. Their other
    dimensions are padded with zeros (padding tokens that the attention mask excludes, or empty image tiles), and
    labels with -100.
    """
    labeled = [
        batch if "labels" in batch else {**batch, "labels": torch.full_like(batch["input_ids"], IGNORED)}
        for batch in batches
    ]
    return {
        name: _pad_and_concatenate([batch[name] for batch in labeled], IGNORED if name == "labels" else 0)
        for name in labeled[0]
    }


def _pad_and_concatenate(tensors: Sequence[Tensor], fill: int) -> Tensor:
    """Concatenates tensors along dimension 0, with `fill` on the right of dimensions in which they are smaller."""
    target_shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        # F.pad takes (left, right) of each dimension, the last dimension first.
        padding = [
            amount
            for size, target in zip(reversed(tensor.shape[1:]), reversed(target_shape), strict=True)
            for amount in (0, target - size)
        ]
        padded.append(F.pad(tensor, padding, value=fill) if any(padding) else tensor)
    return torch.cat(padded)
