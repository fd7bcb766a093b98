"""A key-value cache that allocates room for further tokens in advance."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

GROWTH = 64  # positions allocated in advance whenever a layer is full


def preallocated_cache(config: Any) -> DynamicCache:
    """Returns an empty cache for a language model. Its sliding-window layers are those of transformers.

    Args:
        config: The configuration of the language model (the text config of a vision-language model).
    """
    cache = DynamicCache(config=config)
    cache.layers = [PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types here
    """The keys and values of one layer, [B, heads, S, width], as views of the first S positions of longer buffers.

    `DynamicLayer` copies all keys and values for every new token. For nine answers of 64 tokens to one image, these
    copies cost as much as all matrix products of the model.
    """

    keys: Tensor
    values: Tensor
    _buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends the keys and values of N new positions, [B, heads, N, width], and returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        # Other methods, such as `crop` and `reorder_cache`, replace `keys` and `values` by tensors without a buffer.
        if (
            self._buffers is None
            or self._buffers[0].shape[-2] < end
            or self._buffers[0].data_ptr() != self.keys.data_ptr()
        ):
            self._buffers = (
                _allocate_buffer(self.keys, key_states, start, end),
                _allocate_buffer(self.values, value_states, start, end),
            )
        keys, values = self._buffers
        keys[..., start:end, :], values[..., start:end, :] = key_states, value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Replaces row n by row `indices[n]`. The memory of the buffers is freed at once."""
        self._buffers = None
        super().batch_select_indices(indices)


def _allocate_buffer(cached: Tensor, new: Tensor, start: int, end: int) -> Tensor:
    """Returns a buffer [B, heads, end + GROWTH, width] whose first `start` positions are those of `cached`."""
    buffer = new.new_empty(*new.shape[:-2], end + GROWTH, new.shape[-1])
    if start:
        buffer[..., :start, :] = cached
    return buffer
