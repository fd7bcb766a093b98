"""How transformers chooses the next token: greedily, or drawn with a random stream of each answer's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.logits_process import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


@contextmanager
def neutral_generation_config(model: Any) -> Iterator[None]:
    """Within the block, of the model's generation settings only the special tokens count.

    transformers fills whatever a call leaves open from the model's generation_config.json, and those of released models ask for
    repetition penalties, top-k and temperatures of their own (Qwen2.5-VL's for a penalty of 1.05): two models would be measured
    by two ways of decoding.
    """
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model  # adapters around it hold no settings
    own = owner.generation_config
    owner.generation_config = GenerationConfig(**{name: getattr(own, name) for name in SPECIAL})
    try:
        yield
    finally:
        owner.generation_config = own


class SeededSampling(LogitsProcessor):
    """Draws each row's next token from its softmax, with a random stream of the row's own.

    It adds Gumbel noise to the scores; the largest of the sums is then an exact draw (Gumbel 1954; Maddison et al. 2014, arXiv
    1411.0030), so that `generate` goes on as in greedy decoding. A row's noise depends on its seed and on how many tokens it has
    drawn, never on the rows beside it. On another kind of device the streams are others.

    Args:
        seeds: one a row.
        temperature: what the scores are divided by; more than 0.
        top_p: the share of probability that is drawn from, its likeliest tokens (Holtzman et al. 2020, arXiv 1904.09751).
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float, device: torch.device) -> None:
        self._streams = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._warpers = LogitsProcessorList()
        if temperature != 1:
            self._warpers.append(TemperatureLogitsWarper(temperature))
        if top_p < 1:
            self._warpers.append(TopPLogitsWarper(top_p))

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with some of the rows alone, by number."""
        self._streams = [self._streams[row] for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V] scores with noise, in float64: uniform numbers of 24 bits would now and then draw the unlikeliest token."""
        scores = self._warpers(input_ids, scores)
        noise = torch.stack(
            [
                torch.rand(scores.shape[1], dtype=torch.float64, device=scores.device, generator=stream)
                for stream in self._streams
            ]
        )
        exponential = noise.neg_().log1p_().neg_().clamp_(min=torch.finfo(torch.float64).tiny)
        return scores.double() - exponential.log_()
