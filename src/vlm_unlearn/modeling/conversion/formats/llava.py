"""LLaVA's original format: a folder whose config.json names a vision tower, with .bin or safetensors weights."""

from __future__ import annotations

from pathlib import Path

from vlm_unlearn.modeling.conversion.assembly import assemble
from vlm_unlearn.modeling.conversion.base import CheckpointFormat, Conversion, ConversionOptions, register
from vlm_unlearn.modeling.conversion.llava_config import is_llava_config, read_settings
from vlm_unlearn.modeling.conversion.tensor_files import open_tensors, weight_files
from vlm_unlearn.store import read_json


@register("llava")
class LlavaFormat(CheckpointFormat):
    """A complete model.

    Source: ``LlavaLlamaForCausalLM`` of haotian-liu/LLaVA, and of OPTML-Group/VLM-Safety-Unlearn, which contains it.
    """

    summary = "a complete model of LLaVA's code: config.json with mm_vision_tower, and weights"

    def matches(self, source: Path) -> bool:
        """Returns whether the folder contains a config of LLaVA's code and weights."""
        config = source / "config.json"
        weights = ("model.safetensors", "pytorch_model.bin")
        files = [source / f"{name}{suffix}" for name in weights for suffix in ("", ".index.json")]
        return any(file.is_file() for file in files) and config.is_file() and is_llava_config(read_json(config))

    def read(self, source: Path, options: ConversionOptions) -> Conversion:
        """Returns the conversion of a folder."""
        settings = read_settings(source)
        tensors = open_tensors(weight_files(source))
        return assemble("llava", settings, tensors, {}, source, [source], options)
