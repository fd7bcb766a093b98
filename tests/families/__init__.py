"""A tiny random model with its processor for every tested model family, saved as a model folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from families import llava, others, qwen, tiles
from families.parts import WIDTH

__all__ = ["FAMILIES", "WIDTH", "build", "shared_folder"]

FAMILIES: dict[str, Callable[[bool], tuple[Any, Any]]] = {
    "llava": llava.llava,
    "pixtral": llava.pixtral,  # a LLaVA with the vision tower of Pixtral
    "llava_next": llava.llava_next,
    "llava_onevision": llava.llava_onevision,
    "mistral3": llava.mistral3,
    "qwen2_vl": qwen.qwen2_vl,
    "qwen2_5_vl": qwen.qwen2_5_vl,
    "qwen3_vl": qwen.qwen3_vl,
    "mllama": others.mllama,
    "idefics3": tiles.idefics3,
    "smolvlm": tiles.smolvlm,
    "gemma3": others.gemma3,
    "internvl": tiles.internvl,
    "paligemma": others.paligemma,
    "instructblip": others.instructblip,
}
# With seed 0, the answers of this model are one repeated token, which would hide wrong masks in generation.
SEEDS = {"llava_onevision": 3}


def build(family: str, folder: Path, tied: bool = False) -> None:
    """Writes a random model of the family and its processor into `folder`.

    Args:
        family: A key of `FAMILIES`.
        folder: The model folder to write.
        tied: Whether to tie the output embeddings to the input embeddings.
    """
    torch.manual_seed(SEEDS.get(family, 0))
    model, processor = FAMILIES[family](tied)
    tokenizer = processor.tokenizer
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    with torch.no_grad():
        for parameter in model.parameters():
            # Freshly initialized models give nearly the same output for every input, and mllama's gates are closed.
            # A wrong mask or image would not change the output.
            parameter.normal_(std=0.4) if parameter.numel() > 1 else parameter.fill_(1.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


_FOLDERS: dict[str, Path] = {}


def shared_folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a model folder of the family that all tests of the session share. Tests must not change its files."""
    if family not in _FOLDERS:
        folder = tmp_path_factory.mktemp(family)
        build(family, folder)
        _FOLDERS[family] = folder
    return _FOLDERS[family]
