"""Shapes of the published runs' models, so that a plan needs neither their weights nor a network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _llava(hidden: int, layers: int, heads: int, intermediate: int) -> PreTrainedConfig:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    text = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        vocab_size=32064,
    )
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    return LlavaConfig(text_config=text, vision_config=vision, image_seq_length=576)


def _llama_3_2_vision() -> PreTrainedConfig:
    from transformers import MllamaConfig

    config: Any = MllamaConfig()  # its defaults are the 11B model's
    return config


PUBLISHED_CONFIGS = {
    "llava-hf/llava-1.5-7b-hf": lambda: _llava(4096, 32, 32, 11008),
    "llava-hf/llava-1.5-13b-hf": lambda: _llava(5120, 40, 40, 13824),
    "meta-llama/Llama-3.2-11B-Vision-Instruct": _llama_3_2_vision,
}
