"""The preallocated cache contains what transformers' own cache contains, without copying it for every token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, MistralConfig

from vlm_unlearn.generation.cache import (
    GROWTH,
    CacheRows,
    PreallocatedLayer,
    join_caches,
    preallocated_cache,
    sliding_windows,
)

CONFIG = LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=2)


def states(rows: int, tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, 2, tokens, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), 2),
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0])), 2),
        (lambda cache: cache.batch_repeat_interleave(2), 6),
        (lambda cache: cache.crop(-4), 3),
        (lambda cache: cache.reset(), 3),
    ],
    ids=["select", "reorder", "repeat", "crop", "reset"],
)
def test_cache_equals_dynamic_cache_after_change(change: Callable[[DynamicCache], None], rows: int) -> None:
    caches = [preallocated_cache(CONFIG), DynamicCache(config=CONFIG)]

    def update_and_compare(num_rows: int, tokens: int, seed: int) -> None:
        for layer in range(2):
            keys, values = states(num_rows, tokens, seed), states(num_rows, tokens, seed + 1)
            actual, expected = (cache.update(keys, values, layer) for cache in caches)
            assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
        assert caches[0].get_seq_length() == caches[1].get_seq_length()
        assert caches[0].get_mask_sizes(1, 0) == caches[1].get_mask_sizes(1, 0)

    for seed, tokens in enumerate((5, 1, GROWTH + 3, 1)):
        update_and_compare(3, tokens, 10 * seed)
    for cache in caches:
        change(cache)
    for seed, tokens in enumerate((2, 1, GROWTH, 1)):
        update_and_compare(rows, tokens, 100 + 10 * seed)


def test_update_within_growth_does_not_copy() -> None:
    layer = PreallocatedLayer()
    layer.update(states(2, 10, 0), states(2, 10, 1))
    pointer = layer.keys.data_ptr()
    for number in range(GROWTH):
        layer.update(states(2, 1, number), states(2, 1, number))
    assert layer.keys.data_ptr() == pointer
    assert layer.keys.shape == (2, 2, 10 + GROWTH, 4)


def test_sliding_windows_of_layers() -> None:
    assert sliding_windows(MistralConfig(num_hidden_layers=2, sliding_window=4)) == [4, 4]
    assert sliding_windows(CONFIG) == []


def test_joined_rows_are_aligned_at_the_end() -> None:
    caches = [preallocated_cache(CONFIG), preallocated_cache(CONFIG)]
    contents = [states(3, 5, 0), states(2, 2, 1)]
    for cache, content in zip(caches, contents, strict=True):
        for layer in range(2):
            cache.update(content, content + 1, layer)
    joined = join_caches([CacheRows(caches[0], [2, 0, 0], 1), CacheRows(caches[1], range(2))])
    assert joined.get_seq_length() == 4
    keys = joined.layers[1].keys
    assert torch.equal(keys[:3], contents[0][[2, 0, 0], :, 1:])
    assert torch.equal(keys[3:, :, 2:], contents[1])
    assert not keys[3:, :, :2].any()
    pointer, new = keys.data_ptr(), states(5, 1, 2)
    keys, values = joined.update(new, new, 1)
    assert torch.equal(keys[:, :, -1:], new)
    assert torch.equal(values[3:, :, 2:4], contents[1] + 1)
    assert keys.data_ptr() == pointer
    assert caches[0].get_seq_length() == 5  # the other caches stay as they are
