"""Token selection during generation: greedy, or sampled from one random stream per response."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.logits_process import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

SPECIAL_TOKEN_SETTINGS = ("bos_token_id", "eos_token_id", "pad_token_id")


@contextmanager
def neutral_generation_config(model: Any) -> Iterator[None]:
    """Within the block, the model's generation config contains nothing but its special tokens.

    ``generate`` fills every setting that a call leaves open from the model's ``generation_config.json``. Released
    models set repetition penalties, top-k and temperatures there (Qwen2.5-VL a penalty of 1.05), so that two models
    would be compared with different decoding.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's wrapper has no config
    # InstructBLIP generates with its language model, which has a config too.
    originals = {
        module: module.generation_config
        for module in base.modules()
        if isinstance(getattr(module, "generation_config", None), GenerationConfig)
    }
    special_tokens = {name: getattr(base.generation_config, name) for name in SPECIAL_TOKEN_SETTINGS}
    for module in originals:
        module.generation_config = GenerationConfig(**special_tokens)
    try:
        yield
    finally:
        for module, original in originals.items():
            module.generation_config = original


class SeededSampling(LogitsProcessor):
    """Samples the next token of each row from its softmax, with a separate random stream for each row.

    The processor adds Gumbel noise to the scores. The argmax of the sum is an exact sample from the softmax (Gumbel
    1954; Maddison et al. 2014, arXiv 1411.0030), so ``generate`` runs in its greedy mode. The noise of a row depends on
    its seed and on the number of tokens it has sampled, never on other rows. Streams differ between kinds of devices.

    Args:
        seeds: One seed per row.
        temperature: The scores are divided by it. Must be positive.
        top_p: Samples from the smallest set of most likely tokens whose probabilities add up to `top_p` (nucleus
            sampling, Holtzman et al. 2020, arXiv 1904.09751).
        device: The device of the scores.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float, device: torch.device) -> None:
        self._streams = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._warpers = LogitsProcessorList()
        if temperature != 1:
            self._warpers.append(TemperatureLogitsWarper(temperature))
        if top_p < 1:
            self._warpers.append(TopPLogitsWarper(top_p))

    def select_rows(self, rows: Sequence[int]) -> SeededSampling:
        """Returns a processor for a batch of some of the rows. Both continue the same random streams."""
        selected = copy.copy(self)
        selected._streams = [self._streams[row] for row in rows]
        return selected

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns the scores [B, V] with noise, in float64: 24-bit uniform noise sometimes picks impossible tokens."""
        scores = self._warpers(input_ids, scores)
        noise = torch.stack(
            [
                torch.rand(scores.shape[1], dtype=torch.float64, device=scores.device, generator=stream)
                for stream in self._streams
            ]
        )
        exponential = noise.neg_().log1p_().neg_().clamp_(min=torch.finfo(torch.float64).tiny)
        return scores.double() - exponential.log_()
