"""A tiny random model with its processor for every supported model family, saved as a model folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

WIDTH = 32  # hidden size of language model and vision tower
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
}

LLAVA = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] {% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% if message['role'] == 'user' %} [/INST]{% else %}</s>{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
UTTERANCES = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def build(family: str, folder: Path, tied: bool = False) -> None:
    """Writes a random model of the family and its processor into `folder`.

    Args:
        family: A key of `FAMILIES`.
        folder: The model folder to write.
        tied: Whether to tie the output embeddings to the input embeddings.
    """
    torch.manual_seed(0)
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


def _tokenizer(
    end: str, named_tokens: Mapping[str, str], special_tokens: tuple[str, ...] = (), begin: str | None = None
) -> Any:
    """Returns a byte-level tokenizer with a family's special tokens.

    Args:
        end: The end-of-sequence token.
        named_tokens: Special tokens that are attributes of the tokenizer, by the name of the attribute.
        special_tokens: Further special tokens.
        begin: The beginning-of-sequence token, if the family has one.
    """
    special = ["<|pad|>", *([begin] if begin else []), end, *dict.fromkeys([*named_tokens.values(), *special_tokens])]
    backend = Tokenizer(
        BPE({word: i for i, word in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}, [])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if begin:
        backend.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, 1)])
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=begin,
        eos_token=end,
        pad_token="<|pad|>",
        extra_special_tokens=dict(named_tokens),
    )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": list(special_tokens)}, replace_extra_special_tokens=False
    )
    return tokenizer


@dataclass(frozen=True)
class HubFolder:
    """The files of a processor with a video processor, which cannot be built without torchvision."""

    processor_class: str
    image_processor: Any
    tokenizer: Any
    video_processor: str
    chat_template: str
    settings: dict[str, int]

    def save_pretrained(self, folder: Path) -> None:
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(self.chat_template)
        (folder / "processor_config.json").write_text(
            json.dumps({**self.settings, "processor_class": self.processor_class})
        )
        videos = {
            "video_processor_type": self.video_processor,
            "num_frames": 8,
            "fps": 2,
            "size": {"longest_edge": 512},
        }
        (folder / "video_preprocessor_config.json").write_text(json.dumps(videos))


def _ids(tokenizer: Any) -> dict[str, int]:
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _clip() -> hf.CLIPVisionConfig:
    return hf.CLIPVisionConfig(**VISION, patch_size=16)


def _llava(tied: bool) -> tuple[Any, Any]:
    tokenizer = _tokenizer("</s>", {"image_token": "<image>"}, begin="<s>")
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    strategy = {"patch_size": 16, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = hf.LlavaProcessor(images, tokenizer, **strategy, chat_template=LLAVA)
    text = hf.LlamaConfig(**TEXT, **_ids(tokenizer), tie_word_embeddings=tied)
    config = hf.LlavaConfig(
        vision_config=_clip(),
        text_config=text,
        image_token_index=tokenizer.image_token_id,
        vision_feature_layer=-1,
        image_seq_length=4,
        tie_word_embeddings=tied,
    )
    return hf.LlavaForConditionalGeneration(config), processor


def _llava_next(tied: bool) -> tuple[Any, Any]:
    tokenizer = _tokenizer("</s>", {"image_token": "<image>"}, begin="<s>")
    pinpoints = [[32, 64], [64, 32], [64, 64]]
    images = hf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=pinpoints
    )
    strategy = {"patch_size": 16, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = hf.LlavaNextProcessor(images, tokenizer, **strategy, chat_template=MISTRAL)
    config = hf.LlavaNextConfig(
        vision_config=_clip(),
        text_config=hf.MistralConfig(**TEXT, **_ids(tokenizer), tie_word_embeddings=tied),
        image_token_index=tokenizer.image_token_id,
        vision_feature_layer=-1,
        image_grid_pinpoints=pinpoints,
        image_seq_length=4,
        tie_word_embeddings=tied,
    )
    return hf.LlavaNextForConditionalGeneration(config), processor


def _qwen2_5_vl(tied: bool) -> tuple[Any, Any]:
    tokenizer = _tokenizer(
        "<|im_end|>",
        {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
        ("<|im_start|>", "<|vision_start|>", "<|vision_end|>"),
    )
    images = hf.Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, min_pixels=16 * 16, max_pixels=32 * 32)
    template = CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = HubFolder("Qwen2_5_VLProcessor", images, tokenizer, "Qwen2VLVideoProcessor", template, {})
    config = hf.Qwen2_5_VLConfig(
        text_config={
            **TEXT,
            **_ids(tokenizer),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]},
            "tie_word_embeddings": tied,
        },
        vision_config={
            "depth": 2,
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_heads": 2,
            "patch_size": 8,
            "window_size": 32,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [1],
        },
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=tied,
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config), processor


def _mllama(tied: bool) -> tuple[Any, Any]:
    headers = ("<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>")
    tokenizer = _tokenizer("<|eot_id|>", {"image_token": "<|image|>"}, headers, begin="<|begin_of_text|>")
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
        text_config={**text, **_ids(tokenizer), "tie_word_embeddings": tied},
        image_token_index=tokenizer.image_token_id,
        tie_word_embeddings=tied,
    )
    return hf.MllamaForConditionalGeneration(config), processor


def _utterance_tokenizer(begin: str | None) -> Any:
    tiles = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
    named = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
    }
    return _tokenizer("<end_of_utterance>", named, ("<|im_start|>", *tiles), begin=begin)


def _idefics3(tied: bool) -> tuple[Any, Any]:
    tokenizer = _utterance_tokenizer("<|begin_of_text|>")
    images = hf.Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    template = UTTERANCES.replace("<|im_start|>", "<|begin_of_text|>")
    processor = hf.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)
    config = hf.Idefics3Config(
        vision_config={**VISION, "patch_size": 8},
        text_config=hf.LlamaConfig(**TEXT, **_ids(processor.tokenizer), tie_word_embeddings=tied),
        image_token_id=processor.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=tied,
    )
    return hf.Idefics3ForConditionalGeneration(config), processor


def _smolvlm(tied: bool) -> tuple[Any, Any]:
    tokenizer = _utterance_tokenizer(None)
    images = hf.SmolVLMImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = HubFolder(
        "SmolVLMProcessor", images, tokenizer, "SmolVLMVideoProcessor", UTTERANCES, {"image_seq_len": 4}
    )
    config = hf.SmolVLMConfig(
        vision_config={**VISION, "patch_size": 8},
        text_config=hf.LlamaConfig(**TEXT, **_ids(tokenizer), tie_word_embeddings=tied),
        image_token_id=tokenizer.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=tied,
    )
    return hf.SmolVLMForConditionalGeneration(config), processor


def _gemma3(tied: bool) -> tuple[Any, Any]:
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = _tokenizer("<eos>", named, ("<start_of_turn>", "<end_of_turn>"), begin="<bos>")
    images = hf.Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    processor = hf.Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=GEMMA)
    config = hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(
            **TEXT,
            **_ids(tokenizer),
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


def _internvl(tied: bool) -> tuple[Any, Any]:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = _tokenizer("<|im_end|>", named, ("<|im_start|>",))
    images = hf.GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=4)
    template = CHATML.replace("IMAGE", "<IMG_CONTEXT>\n")
    processor = HubFolder(
        "InternVLProcessor", images, tokenizer, "InternVLVideoProcessor", template, {"image_seq_length": 4}
    )
    config = hf.InternVLConfig(
        vision_config={**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
        text_config=hf.Qwen2Config(**TEXT, **_ids(tokenizer), tie_word_embeddings=tied),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
        tie_word_embeddings=tied,
    )
    return hf.InternVLForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable[[bool], tuple[Any, Any]]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "qwen2_5_vl": _qwen2_5_vl,
    "mllama": _mllama,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "gemma3": _gemma3,
    "internvl": _internvl,
}
