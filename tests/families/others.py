"""Tiny models whose image tokens are not plain causal tokens: cross-attention, both directions, or a Q-Former."""

from __future__ import annotations

from typing import Any

import transformers as hf

from families.parts import GEMMA, LLAMA3, TEXT, VISION, WIDTH, build_tokenizer, special_ids


def mllama(tied: bool) -> tuple[Any, Any]:
    headers = ("<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>")
    tokenizer = build_tokenizer("<|eot_id|>", {"image_token": "<|image|>"}, headers, begin="<|begin_of_text|>")
    images = hf.MllamaImageProcessorPil(size={"height": 32, "width": 32}, max_image_tiles=4)
    processor = hf.MllamaProcessor(images, tokenizer, chat_template=LLAMA3)
    text = TEXT | {"num_hidden_layers": 3, "cross_attention_layers": [1]}
    config = hf.MllamaConfig(
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 2 * WIDTH,
            "max_num_tiles": 4,
            "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
        },
        text_config={**text, **special_ids(tokenizer), "tie_word_embeddings": tied},
        image_token_index=tokenizer.image_token_id,
        tie_word_embeddings=tied,
    )
    return hf.MllamaForConditionalGeneration(config), processor


def gemma3(tied: bool) -> tuple[Any, Any]:
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = build_tokenizer("<eos>", named, ("<start_of_turn>", "<end_of_turn>"), begin="<bos>")
    images = hf.Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    processor = hf.Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=GEMMA)
    config = hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(
            **TEXT,
            **special_ids(tokenizer),
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
            tie_word_embeddings=tied,
        ),
        vision_config=hf.SiglipVisionConfig(**VISION, patch_size=8),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
        tie_word_embeddings=tied,
    )
    return hf.Gemma3ForConditionalGeneration(config), processor


def paligemma(tied: bool) -> tuple[Any, Any]:
    tokenizer = build_tokenizer("<eos>", {}, begin="<bos>")
    images = hf.SiglipImageProcessorPil(size={"height": 32, "width": 32}, image_seq_length=4)
    processor = hf.PaliGemmaProcessor(images, tokenizer)  # without a chat template, as on the hub
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, patch_size=16, vision_use_head=False),
        text_config=hf.GemmaConfig(**TEXT, **special_ids(tokenizer), head_dim=WIDTH // 2, tie_word_embeddings=tied),
        image_token_index=processor.image_token_id,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
        tie_word_embeddings=tied,
    )
    return hf.PaliGemmaForConditionalGeneration(config), processor


def instructblip(tied: bool) -> tuple[Any, Any]:
    tokenizer = build_tokenizer("</s>", {}, begin="<s>")
    qformer_tokenizer = build_tokenizer("[SEP]", {}, begin="[CLS]")
    images = hf.BlipImageProcessorPil(size={"height": 32, "width": 32})
    processor = hf.InstructBlipProcessor(images, tokenizer, qformer_tokenizer, num_query_tokens=4)
    sizes = {name: TEXT[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    config = hf.InstructBlipConfig(
        vision_config=hf.InstructBlipVisionConfig(**VISION, patch_size=16).to_dict(),
        qformer_config=hf.InstructBlipQFormerConfig(
            **sizes,
            num_attention_heads=2,
            vocab_size=len(qformer_tokenizer),
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ).to_dict(),
        text_config=hf.LlamaConfig(**TEXT, **special_ids(tokenizer), tie_word_embeddings=tied).to_dict(),
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=tied,
    )
    return hf.InstructBlipForConditionalGeneration(config), processor
