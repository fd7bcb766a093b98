"""Tiny models of the Qwen-VL line: the projectors are inside the vision tower."""

from __future__ import annotations

from typing import Any

import transformers as hf

from families.parts import CHATML, TEXT, WIDTH, HubFolder, build_tokenizer, special_ids

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def _processor(processor_class: str, video_processor: str) -> HubFolder:
    tokenizer = build_tokenizer(
        "<|im_end|>",
        {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
        ("<|im_start|>", "<|vision_start|>", "<|vision_end|>"),
    )
    images = hf.Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, min_pixels=16 * 16, max_pixels=32 * 32)
    return HubFolder(processor_class, images, tokenizer, video_processor, CHATML.replace("IMAGE", IMAGE), {})


def _settings(tokenizer: Any, tied: bool, vision: dict[str, Any], **text: Any) -> dict[str, Any]:
    """Returns the arguments of a configuration."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
    return {
        "text_config": {
            **TEXT,
            **special_ids(tokenizer),
            "rope_parameters": rope,
            "tie_word_embeddings": tied,
            **text,
        },
        "vision_config": {"depth": 2, "num_heads": 2, "patch_size": 8, "hidden_size": WIDTH, **vision},
        "image_token_id": tokenizer.image_token_id,
        "video_token_id": tokenizer.video_token_id,
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        "tie_word_embeddings": tied,
    }


def qwen2_vl(tied: bool) -> tuple[Any, Any]:
    processor = _processor("Qwen2VLProcessor", "Qwen2VLVideoProcessor")
    config = hf.Qwen2VLConfig(**_settings(processor.tokenizer, tied, {"embed_dim": WIDTH, "mlp_ratio": 2}))
    return hf.Qwen2VLForConditionalGeneration(config), processor


def qwen2_5_vl(tied: bool) -> tuple[Any, Any]:
    processor = _processor("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor")
    vision = {
        "intermediate_size": 2 * WIDTH,
        "out_hidden_size": WIDTH,
        "window_size": 32,
        "fullatt_block_indexes": [1],
    }
    config = hf.Qwen2_5_VLConfig(**_settings(processor.tokenizer, tied, vision))
    return hf.Qwen2_5_VLForConditionalGeneration(config), processor


def qwen3_vl(tied: bool) -> tuple[Any, Any]:
    processor = _processor("Qwen3VLProcessor", "Qwen3VLVideoProcessor")
    vision = {
        "intermediate_size": 2 * WIDTH,
        "out_hidden_size": WIDTH,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    config = hf.Qwen3VLConfig(**_settings(processor.tokenizer, tied, vision, head_dim=WIDTH // 2))
    return hf.Qwen3VLForConditionalGeneration(config), processor
