"""A key-value cache that allocates room for further tokens in advance, and whose rows can come from other caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

GROWTH = 64  # positions allocated in advance whenever a layer is full


def preallocated_cache(config: Any) -> DynamicCache:
    """Returns an empty cache for a language model.

    All its layers keep all positions. A layer with a sliding window attends to the last positions of them.

    Args:
        config: The configuration of the language model (the text config of a vision-language model).
    """
    cache = DynamicCache(config=config)
    cache.layers = [PreallocatedLayer() for _ in cache.layers]
    return cache


def sliding_windows(config: Any) -> list[int]:
    """Returns the length of the attention window of each layer that has one.

    Args:
        config: The configuration of the language model.
    """
    return [layer.sliding_window for layer in DynamicCache(config=config).layers if layer.is_sliding]


class CacheRows(NamedTuple):
    """Some rows of a cache, without the positions before `start`. Rows can be repeated."""

    cache: DynamicCache
    rows: Sequence[int]
    start: int = 0


def join_caches(selections: Sequence[CacheRows]) -> DynamicCache:
    """Returns a cache with the selected rows of other caches. Their last positions are aligned.

    The positions in front of a shorter selection are zero, so that masked attention to them is zero.

    Args:
        selections: Rows of caches that `preallocated_cache` has returned.
    """
    widths = [cache.get_seq_length() - start for cache, _, start in selections]
    joined = DynamicCache()
    for number in range(len(selections[0].cache.layers)):
        layer = PreallocatedLayer()
        layer.set_rows([cache.layers[number] for cache, *_ in selections], selections, max(widths))
        joined.layers.append(layer)
    return joined


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

    def set_rows(self, layers: Sequence[PreallocatedLayer], selections: Sequence[CacheRows], width: int) -> None:
        """Sets the keys and values to those of rows of other layers, aligned at position `width`."""
        self.lazy_initialization(layers[0].keys, layers[0].values)
        self._buffers = (
            _joined_buffer([layer.keys for layer in layers], selections, width),
            _joined_buffer([layer.values for layer in layers], selections, width),
        )
        self.keys, self.values = (buffer[..., :width, :] for buffer in self._buffers)

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


def _joined_buffer(tensors: Sequence[Tensor], selections: Sequence[CacheRows], width: int) -> Tensor:
    """Returns a buffer [B, heads, width + GROWTH, head width] with the selected rows of tensors [_, heads, _, _]."""
    num_rows = sum(len(rows) for _, rows, _ in selections)
    heads, head_width = tensors[0].shape[1], tensors[0].shape[3]
    buffer = tensors[0].new_empty(num_rows, heads, width + GROWTH, head_width)
    first = 0
    for tensor, (_, rows, start) in zip(tensors, selections, strict=True):
        offset = width - (tensor.shape[2] - start)
        target = buffer[first : first + len(rows), :, :width]
        target[:, :, :offset] = 0
        target[:, :, offset:] = (
            tensor[rows, :, start:] if list(rows) != list(range(len(tensor))) else tensor[:, :, start:]
        )
        first += len(rows)
    return buffer
