"""Tiny models that split an image into tiles."""

from __future__ import annotations

from typing import Any

import transformers as hf

from families.parts import CHATML, TEXT, UTTERANCES, VISION, HubFolder, build_tokenizer, special_ids


def _utterance_tokenizer(begin: str | None) -> Any:
    tiles = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
    named = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
    }
    return build_tokenizer("<end_of_utterance>", named, ("<|im_start|>", *tiles), begin=begin)


def idefics3(tied: bool) -> tuple[Any, Any]:
    tokenizer = _utterance_tokenizer("<|begin_of_text|>")
    images = hf.Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    template = UTTERANCES.replace("<|im_start|>", "<|begin_of_text|>")
    processor = hf.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)
    config = hf.Idefics3Config(
        vision_config={**VISION, "patch_size": 8},
        text_config=hf.LlamaConfig(**TEXT, **special_ids(processor.tokenizer), tie_word_embeddings=tied),
        image_token_id=processor.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=tied,
    )
    return hf.Idefics3ForConditionalGeneration(config), processor


def smolvlm(tied: bool) -> tuple[Any, Any]:
    tokenizer = _utterance_tokenizer(None)
    images = hf.SmolVLMImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = HubFolder(
        "SmolVLMProcessor", images, tokenizer, "SmolVLMVideoProcessor", UTTERANCES, {"image_seq_len": 4}
    )
    config = hf.SmolVLMConfig(
        vision_config={**VISION, "patch_size": 8},
        text_config=hf.LlamaConfig(**TEXT, **special_ids(tokenizer), tie_word_embeddings=tied),
        image_token_id=tokenizer.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=tied,
    )
    return hf.SmolVLMForConditionalGeneration(config), processor


def internvl(tied: bool) -> tuple[Any, Any]:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = build_tokenizer("<|im_end|>", named, ("<|im_start|>",))
    images = hf.GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=4)
    template = CHATML.replace("IMAGE", "<IMG_CONTEXT>\n")
    processor = HubFolder(
        "InternVLProcessor", images, tokenizer, "InternVLVideoProcessor", template, {"image_seq_length": 4}
    )
    config = hf.InternVLConfig(
        vision_config={**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
        text_config=hf.Qwen2Config(**TEXT, **special_ids(tokenizer), tie_word_embeddings=tied),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
        tie_word_embeddings=tied,
    )
    return hf.InternVLForConditionalGeneration(config), processor
