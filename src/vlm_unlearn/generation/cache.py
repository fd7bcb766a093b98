"""Keys and values of what has been read and said, in tensors that have room for what is to come."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

GROWTH = 64  # positions added when there is none left


def preallocated_cache(config: Any) -> DynamicCache:
    """An empty cache for a language model of this configuration; its sliding layers are transformers' own."""
    cache = DynamicCache(config=config)
    cache.layers = [PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types here
    """A layer's keys and values [B, heads, S, width], the first S positions of longer tensors.

    `DynamicLayer` copies all of them for every new token: with nine answers of 64 tokens to one image, as much work as all matrix
    products of the model.
    """

    keys: Tensor
    values: Tensor
    _longer: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values, once those [B, heads, N, width] of N new positions are behind the others."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        # Other methods, of transformers' too, put other tensors in the place of keys and values.
        if (
            self._longer is None
            or self._longer[0].shape[-2] < end
            or self._longer[0].data_ptr() != self.keys.data_ptr()
        ):
            self._longer = (
                _lengthened(self.keys, key_states, start, end),
                _lengthened(self.values, value_states, start, end),
            )
        keys, values = self._longer
        keys[..., start:end, :], values[..., start:end, :] = key_states, value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Makes row `indices[n]` row n; the others' memory is free at once."""
        self._longer = None
        super().batch_select_indices(indices)


def _lengthened(kept: Tensor, new: Tensor, start: int, end: int) -> Tensor:
    """[B, heads, end + ROOM, width] that begin with what is kept."""
    longer = new.new_empty(*new.shape[:-2], end + GROWTH, new.shape[-1])
    if start:
        longer[..., :start, :] = kept
    return longer
