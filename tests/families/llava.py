"""Tiny models of the LLaVA line: a vision tower next to a projector."""

from __future__ import annotations

from typing import Any

import transformers as hf

from families.parts import CHATML, LLAVA, MISTRAL, TEXT, VISION, HubFolder, build_tokenizer, special_ids


def _clip() -> hf.CLIPVisionConfig:
    return hf.CLIPVisionConfig(**VISION, patch_size=16)


def llava(tied: bool) -> tuple[Any, Any]:
    tokenizer = build_tokenizer("</s>", {"image_token": "<image>"}, begin="<s>")
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    strategy = {"patch_size": 16, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = hf.LlavaProcessor(images, tokenizer, **strategy, chat_template=LLAVA)
    text = hf.LlamaConfig(**TEXT, **special_ids(tokenizer), tie_word_embeddings=tied)
    config = hf.LlavaConfig(
        vision_config=_clip(),
        text_config=text,
        image_token_index=tokenizer.image_token_id,
        vision_feature_layer=-1,
        image_seq_length=4,
        tie_word_embeddings=tied,
    )
    return hf.LlavaForConditionalGeneration(config), processor


def llava_next(tied: bool) -> tuple[Any, Any]:
    tokenizer = build_tokenizer("</s>", {"image_token": "<image>"}, begin="<s>")
    pinpoints = [[32, 64], [64, 32], [64, 64]]
    images = hf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=pinpoints
    )
    strategy = {"patch_size": 16, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = hf.LlavaNextProcessor(images, tokenizer, **strategy, chat_template=MISTRAL)
    config = hf.LlavaNextConfig(
        vision_config=_clip(),
        text_config=hf.MistralConfig(**TEXT, **special_ids(tokenizer), tie_word_embeddings=tied),
        image_token_index=tokenizer.image_token_id,
        vision_feature_layer=-1,
        image_grid_pinpoints=pinpoints,
        image_seq_length=4,
        tie_word_embeddings=tied,
    )
    return hf.LlavaNextForConditionalGeneration(config), processor


def llava_onevision(tied: bool) -> tuple[Any, Any]:
    tokenizer = build_tokenizer("<|im_end|>", {"image_token": "<image>", "video_token": "<video>"}, ("<|im_start|>",))
    pinpoints = [[32, 64], [64, 32], [64, 64]]
    images = hf.LlavaOnevisionImageProcessorPil(size={"height": 32, "width": 32}, image_grid_pinpoints=pinpoints)
    settings = {"num_image_tokens": 4, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9"}
    template = CHATML.replace("IMAGE", "<image>\n")
    processor = HubFolder(
        "LlavaOnevisionProcessor", images, tokenizer, "LlavaOnevisionVideoProcessor", template, settings
    )
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, patch_size=16, vision_use_head=False),
        text_config=hf.Qwen2Config(**TEXT, **special_ids(tokenizer), tie_word_embeddings=tied),
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=pinpoints,
        tie_word_embeddings=tied,
    )
    return hf.LlavaOnevisionForConditionalGeneration(config), processor


def _pixtral_processor(merge_size: int) -> HubFolder:
    named = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    tokenizer = build_tokenizer("</s>", named, ("[INST]", "[/INST]"), begin="<s>")
    images = hf.PixtralImageProcessorPil(size={"longest_edge": 32}, patch_size=8)
    settings = {"patch_size": 8, "spatial_merge_size": merge_size, **named}
    template = MISTRAL.replace("<image>\n", "[IMG]")
    return HubFolder("PixtralProcessor", images, tokenizer, None, template, settings)


def pixtral(tied: bool) -> tuple[Any, Any]:
    processor = _pixtral_processor(1)
    config = hf.LlavaConfig(
        vision_config=hf.PixtralVisionConfig(**VISION, patch_size=8),
        text_config=hf.MistralConfig(**TEXT, **special_ids(processor.tokenizer), tie_word_embeddings=tied),
        image_token_index=processor.tokenizer.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=tied,
    )
    return hf.LlavaForConditionalGeneration(config), processor


def mistral3(tied: bool) -> tuple[Any, Any]:
    processor = _pixtral_processor(2)
    config = hf.Mistral3Config(
        vision_config=hf.PixtralVisionConfig(**VISION, patch_size=8),
        text_config=hf.MistralConfig(**TEXT, **special_ids(processor.tokenizer), tie_word_embeddings=tied),
        image_token_index=processor.tokenizer.image_token_id,
        spatial_merge_size=2,
        tie_word_embeddings=tied,
    )
    return hf.Mistral3ForConditionalGeneration(config), processor
