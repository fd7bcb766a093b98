"""Configurations of the published runs' models, to plan a run without their weights and without a network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _llava_1_5(hidden_size: int, num_layers: int, num_heads: int, intermediate_size: int) -> PreTrainedConfig:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    text = LlamaConfig(
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        intermediate_size=intermediate_size,
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

    config: Any = MllamaConfig()  # the defaults are those of the 11B model
    return config


PUBLISHED_CONFIGS = {
    "llava-hf/llava-1.5-7b-hf": lambda: _llava_1_5(4096, 32, 32, 11008),
    "llava-hf/llava-1.5-13b-hf": lambda: _llava_1_5(5120, 40, 40, 13824),
    "meta-llama/Llama-3.2-11B-Vision-Instruct": _llama_3_2_vision,
}
