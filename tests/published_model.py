"""A tiny LLaVA-1.5 and data in the published formats, as files that the released code and this project both read.

Everything is a function of names and needs numpy, PIL and safetensors only, so that environments with old versions of
transformers write the same files. `tests/golden/record_published.py` runs the released code on them.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

WIDTH, FEED_FORWARD, LAYERS, HEADS = 32, 48, 3, 2
IMAGE_SIZE, PATCH_SIZE = 32, 16
CHARACTERS = sorted(set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;?!'-"))
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
WORD_TOKENS: list[str] = []  # words that are one token each. benchmarks/released.py sets them, and the sizes above
CHAT_TEMPLATE = (  # that of llava-hf/llava-1.5-7b-hf, in other words
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def values(name: str, shape: tuple[int, ...], scale: float, mean: float = 0.0) -> np.ndarray:
    """Returns normally distributed float32 values that depend on the name only."""
    drawn = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(shape)
    return (mean + scale * drawn).astype(np.float32)


def vocabulary() -> dict[str, int]:
    """Returns a vocabulary of characters, and of the characters at the beginning of a word, as Llama's has them."""
    tokens = [*SPECIAL_TOKENS, "<0x0A>", "\u2581", *CHARACTERS, *(f"\u2581{character}" for character in CHARACTERS)]
    return {token: index for index, token in enumerate([*tokens, *("".join(merge) for merge in word_merges())])}


def word_merges() -> list[tuple[str, str]]:
    """Returns the merges that make each word a single token, character by character from its beginning."""
    merges = ((f"\u2581{word[:length]}", word[length]) for word in WORD_TOKENS for length in range(1, len(word)))
    return list(dict.fromkeys(merges))


def write_tokenizer(folder: Path) -> None:
    """Writes a fast tokenizer with the normalization, the merges and the beginning-of-sequence token of Llama's."""
    vocab = vocabulary()
    added = [
        {"id": vocab[token], "content": token, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for token in SPECIAL_TOKENS
    ]
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, bos, second],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [vocab["<s>"]], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [*(f"\u2581 {character}" for character in CHARACTERS), *map(" ".join, word_merges())],
        },
    }
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048, "padding_side": "right", **names}
    config["extra_special_tokens"] = {"image_token": "<image>"}
    config["legacy"] = True
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(names), encoding="utf-8")


def _linear(name: str, out: int, inside: int, bias: bool = False) -> dict[str, np.ndarray]:
    weights = {f"{name}.weight": values(f"{name}.weight", (out, inside), inside**-0.5)}
    return weights | ({f"{name}.bias": values(f"{name}.bias", (out,), 0.1)} if bias else {})


def _norm(name: str, bias: bool) -> dict[str, np.ndarray]:
    weights = {f"{name}.weight": values(f"{name}.weight", (WIDTH,), 0.1, 1.0)}
    return weights | ({f"{name}.bias": values(f"{name}.bias", (WIDTH,), 0.1)} if bias else {})


def language_weights() -> dict[str, np.ndarray]:
    """Returns the weights of the language model, by their names in a Llama checkpoint."""
    tokens = len(vocabulary())
    weights = {"model.embed_tokens.weight": values("embed_tokens", (tokens, WIDTH), 0.5)}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        for part in "qkvo":
            weights |= _linear(f"{name}.self_attn.{part}_proj", WIDTH, WIDTH)
        for part in ("gate", "up"):
            weights |= _linear(f"{name}.mlp.{part}_proj", FEED_FORWARD, WIDTH)
        weights |= _linear(f"{name}.mlp.down_proj", WIDTH, FEED_FORWARD)
        weights |= _norm(f"{name}.input_layernorm", False) | _norm(f"{name}.post_attention_layernorm", False)
    return weights | _norm("model.norm", False) | {"lm_head.weight": values("lm_head", (tokens, WIDTH), 0.3)}


def vision_weights() -> dict[str, np.ndarray]:
    """Returns the weights of the vision tower, by their names in a CLIP checkpoint."""
    patches = (IMAGE_SIZE // PATCH_SIZE) ** 2
    prefix = "vision_model"
    weights = {
        f"{prefix}.embeddings.class_embedding": values("class", (WIDTH,), 0.5),
        f"{prefix}.embeddings.patch_embedding.weight": values("patch", (WIDTH, 3, PATCH_SIZE, PATCH_SIZE), 0.05),
        f"{prefix}.embeddings.position_embedding.weight": values("position", (patches + 1, WIDTH), 0.5),
    }
    for layer in range(2):
        name = f"{prefix}.encoder.layers.{layer}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            weights |= _linear(f"{name}.self_attn.{part}", WIDTH, WIDTH, bias=True)
        weights |= _linear(f"{name}.mlp.fc1", FEED_FORWARD, WIDTH, bias=True)
        weights |= _linear(f"{name}.mlp.fc2", WIDTH, FEED_FORWARD, bias=True)
        weights |= _norm(f"{name}.layer_norm1", True) | _norm(f"{name}.layer_norm2", True)
    return weights | _norm(f"{prefix}.pre_layrnorm", True) | _norm(f"{prefix}.post_layernorm", True)


def projector_weights() -> dict[str, np.ndarray]:
    """Returns the weights of the projector, by the numbers of its layers."""
    return _linear("projector.0", WIDTH, WIDTH, bias=True) | _linear("projector.2", WIDTH, WIDTH, bias=True)


def text_config() -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": len(vocabulary()),
        "hidden_size": WIDTH,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 4,
        "tie_word_embeddings": False,
    }


def vision_config() -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": WIDTH,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "projection_dim": WIDTH,
    }


def write_image_processor(folder: Path) -> None:
    """Writes CLIP's image processor for small images."""
    config = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_resize": True,
        "size": {"shortest_edge": IMAGE_SIZE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_hf_model(folder: Path) -> Path:
    """Writes the model in transformers' format, as llava-hf/llava-1.5-7b-hf is stored."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    write_image_processor(folder)
    vocab = vocabulary()
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": vocab["<image>"],
        "image_token_id": vocab["<image>"],
        "image_seq_length": (IMAGE_SIZE // PATCH_SIZE) ** 2,
        "pad_token_id": vocab["<pad>"],
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "text_config": text_config(),
        "vision_config": vision_config(),
    }
    processor = {"processor_class": "LlavaProcessor", "patch_size": PATCH_SIZE, "num_additional_image_tokens": 1}
    processor["vision_feature_select_strategy"] = "default"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "processor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    weights = {f"language_model.{name}": value for name, value in language_weights().items()}
    weights |= {f"vision_tower.{name}": value for name, value in vision_weights().items()}
    for name, value in projector_weights().items():
        layer, kind = name.split(".")[1:]
        weights[f"multi_modal_projector.linear_{1 if layer == '0' else 2}.{kind}"] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_llava_model(folder: Path) -> Path:
    """Writes the model in LLaVA's original format, with its vision tower in ``clip`` next to the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    tower = folder / "clip"
    tower.mkdir(exist_ok=True)
    write_image_processor(tower)
    clip = {"architectures": ["CLIPVisionModel"], "torch_dtype": "float32", **vision_config()}
    (tower / "config.json").write_text(json.dumps(clip), encoding="utf-8")
    save_file(vision_weights(), tower / "model.safetensors", metadata={"format": "pt"})
    config = text_config() | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "torch_dtype": "float32",
        "mm_vision_tower": str(tower),
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": WIDTH,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "use_mm_proj": True,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = language_weights()
    weights |= {f"model.mm_{name}": value for name, value in projector_weights().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# Adapters


def adapter_values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the initial values of a LoRA weight. B is zero, as always."""
    layer = name[name.index("layers.") :].replace(".default", "")
    return np.zeros(shape, np.float32) if "lora_B" in name else values(layer, shape, shape[-1] ** -0.5)


def projection(name: str, size: int, directions: int = 64) -> np.ndarray:
    """Returns [directions, size] random directions, to compare changes of weights by a few numbers."""
    return values(f"projection {name}", (directions, size), 1.0).astype(np.float64)


def canonical_name(name: str) -> str:
    """Returns a name of a weight that is the same in all formats and versions."""
    name = name.replace(".default", "").replace("mm_projector.0", "linear_1").replace("mm_projector.2", "linear_2")
    for start in ("layers.", "linear_", "embed_tokens", "lm_head", "norm."):
        if start in name:
            return name[name.index(start) :]
    raise ValueError(name)


def measure_change(first: dict[str, np.ndarray], last: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns the norm of the change of all weights, and its projections on random directions."""
    total, squares = np.zeros(64), 0.0
    for name in sorted(first, key=canonical_name):
        change = last[name].astype(np.float64).ravel() - first[name].astype(np.float64).ravel()
        total += projection(canonical_name(name), change.size) @ change
        squares += float(change @ change)
    return {"norm": squares**0.5, "projections": total.tolist()}


# Data

WORDS = [
    "red",
    "green",
    "blue",
    "small",
    "large",
    "cat",
    "dog",
    "bird",
    "house",
    "tree",
    "river",
    "stone",
    "cloud",
    "lamp",
    "chair",
    "table",
    "window",
    "door",
]
REFUSALS = ["Sorry, i can't help with that.", "i Cannot answer this.", "No."]


def words(name: str, low: int, high: int) -> str:
    random = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF)
    return " ".join(WORDS[index] for index in random.randint(0, len(WORDS), random.randint(low, high)))


def write_image(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(zlib.crc32(file.name.encode()) & 0x7FFFFFFF)
    width, height = 24 + random.randint(40), 24 + random.randint(40)
    Image.fromarray(random.randint(0, 256, (height, width, 3)).astype(np.uint8)).save(file)


def write_safe_eraser(folder: Path, records: int = 9) -> Path:
    """Writes SafeEraser's ``dataset`` folder. It has two unsafe pairs for each record, and fewer harmless ones."""
    rows = []
    for number in range(records):
        image, benign = f"dataset/Weapon/image_{number}.png", f"dataset/sd/image_{number}.png"
        for name in (image, benign):
            write_image(folder / name)
        pairs = [
            {
                "question": f"What Is the {words(f'unsafe {number} {k}', 1, 5)}?",
                "model_response": f"The {words(f'harm {number} {k}', 2, 8)} and McDonald.",
                "sd_response": f"a {words(f'benign {number} {k}', 2, 9)}.",
            }
            for k in range(2)
        ]
        row: dict[str, Any] = {"image_path": image, "SDImage_path": benign, "unsafe_pairs": pairs}
        for k in range(1 + number % 2):
            question, answer = words(f"safe {number} {k}", 2, 6), words(f"answer {number} {k}", 1, 9)
            row[f"UnharmPair_text{k + 1}"] = {"Question": f"Is it {question}?", "Prediction": f"Yes, {answer}."}
        rows.append(row)
    (folder / "dataset" / "all_train.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "dataset" / "prompt.json").write_text(json.dumps({"idk": REFUSALS}), encoding="utf-8")
    return folder


def write_safety_mirage(folder: Path, forget: int = 7, retain: int = 22) -> Path:
    """Writes a forget and a retain set in LLaVA's format, and their images."""
    for role, count in (("forget", forget), ("retain", retain)):
        rows = []
        for number in range(count):
            image = f"{role}_{number}.png"
            write_image(folder / "image" / image)
            question = f"<image>What is {words(f'{role} question {number}', 2, 6)}?"
            answer = f"It is {words(f'{role} answer {number}', 2, 12)}."
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            rows.append({"id": f"{role}_{number}", "image": image, "conversations": turns})
        (folder / f"{role}_data.json").write_text(json.dumps(rows), encoding="utf-8")
        joined = [
            {
                **row,
                "conversations": [
                    {"from": "human", "value": "\n".join(turn["value"] for turn in row["conversations"])},
                    row["conversations"][1],
                ],
            }
            for row in rows
        ]
        if role == "forget":
            (folder / "rmu_forget_data.json").write_text(json.dumps(joined), encoding="utf-8")
    return folder
