"""A LLaVA with fewer than a million parameters and a word-level tokenizer, for the tiny world and for tests."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "user:", "assistant:")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image> ' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% if message['role'] == 'assistant' %}{{ '</s> ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def tiny_processor(words: Sequence[str], image_size: int = 32, patch_size: int = 16) -> LlavaProcessor:
    """Returns a LLaVA processor whose vocabulary is `words` and the special tokens.

    Args:
        words: Lower-case words. The tokenizer lowercases its input, and splits off ``.``, ``,``, ``?`` and ``!``.
        image_size: Height and width of the processed images, in pixels.
        patch_size: Height and width of a patch, in pixels.
    """
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *words])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    split_marks = pre_tokenizers.Split(Regex(r"[.,?!]"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), split_marks])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        # Close to the statistics of the tiny world's images. The base model learns in half the steps it needs with
        # the mean and deviation of CLIP.
        image_mean=[0.7] * 3,
        image_std=[0.25] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_llava(
    processor: LlavaProcessor, width: int = 128, vision_layers: int = 2, layers: int = 3
) -> LlavaForConditionalGeneration:
    """Returns a randomly initialized LLaVA for a processor from `tiny_processor`. Seed torch before the call.

    With the default sizes an image is 5 tokens: 4 patches and CLS.

    Args:
        processor: The processor, which determines vocabulary and image size.
        width: Hidden size of language model and vision tower.
        vision_layers: Number of layers of the vision tower.
        layers: Number of decoder layers.
    """
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=vision_layers,
        num_attention_heads=4,
        image_size=processor.image_processor.crop_size["height"],
        patch_size=processor.patch_size,
        projection_dim=width,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=(vision.image_size // vision.patch_size) ** 2 + 1,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    return model
