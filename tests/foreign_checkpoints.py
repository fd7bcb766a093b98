"""Tiny random checkpoints as LLaVA's and SafeEraser's code write them, and LLaVA's forward pass.

The model is put together from modules of transformers, independently of the conversion: its tensors have the names of
the modules of LLaVA's code, and the features of the image replace the image token as they do there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

IMAGE = -200  # the id that stands for an image in LLaVA's code
WIDTH, LAYERS, IMAGE_SIZE, PATCH_SIZE = 32, 2, 32, 16
VISION = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
    "projection_dim": 24,
}
WORDS = ("the", "cat", "is", "red", "USER", "ASSISTANT", "Describe", "it")
TOWER = "model.vision_tower.vision_tower.vision_model."
Tensors = dict[str, torch.Tensor]


def varint(value: int) -> bytes:
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def field(number: int, content: bytes | int) -> bytes:
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def sentence_pieces() -> list[tuple[str, int]]:
    """The pieces of a Llama vocabulary with their types: special tokens, bytes, characters and merged pieces."""
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{byte:02X}>", 6) for byte in range(256))]
    merged: dict[str, None] = {}
    for word in WORDS:
        for end in range(2, len(word) + 2):
            merged[f"▁{word}"[:end]] = None
    letters = sorted({*"▁abcdefghijklmnopqrstuvwxyzADEINRSTU.:,?", *(letter for word in WORDS for letter in word)})
    return [*pieces, *((text, 1) for text in merged), *((text, 1) for text in letters if text not in merged)]


def sentencepiece_model(pieces: Sequence[tuple[str, int]]) -> bytes:
    """A file of SentencePiece: pieces with score and type, and a trainer's settings."""
    content = b""
    for text, kind in pieces:
        score = b"\x15" + b"\x00\x00\x80\xbf"  # a float of four bytes
        content += field(1, field(1, text.encode()) + score + (field(3, kind) if kind != 1 else b""))
    return content + field(2, field(4, len(pieces)) + field(3, 2))


def write_tokenizer(folder: Path) -> int:
    """Writes the tokenizer files of LLaVA-1.5, and returns the size of the vocabulary."""
    pieces = sentence_pieces()
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(pieces))
    token = {"__type": "AddedToken", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config = {
        "add_bos_token": True,
        "bos_token": {**token, "content": "<s>"},
        "eos_token": {**token, "content": "</s>"},
        "legacy": False,
        "model_max_length": 2048,
        "pad_token": None,
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": {**token, "content": "<unk>"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<unk>"}))
    return len(pieces)


class OriginalLlava(nn.Module):
    """LLaVA as its code defines it, with the names of its tensors in `original_tensors`."""

    def __init__(
        self,
        vocabulary_size: int,
        projector: str = "mlp2x_gelu",
        seed: int = 0,
        width: int = WIDTH,
        layers: int = LAYERS,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.text_config = LlamaConfig(
            vocab_size=vocabulary_size,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_theta=5000.0,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        )
        self.language_model = LlamaForCausalLM(self.text_config).eval()
        self.tower = CLIPVisionModel(CLIPVisionConfig(**VISION)).eval()
        self.projector_type = projector
        self.projector: nn.Module = nn.Linear(VISION["hidden_size"], width)
        if projector == "mlp2x_gelu":
            self.projector = nn.Sequential(self.projector, nn.GELU(), nn.Linear(width, width))

    def config(self) -> dict[str, Any]:
        """The config.json, with the keys that LLaVA's training writes."""
        text = self.text_config
        return {
            "architectures": ["LlavaLlamaForCausalLM"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "freeze_mm_mlp_adapter": False,
            "hidden_act": "silu",
            "hidden_size": text.hidden_size,
            "image_aspect_ratio": "pad",
            "initializer_range": 0.02,
            "intermediate_size": text.intermediate_size,
            "max_position_embeddings": 4096,
            "mm_hidden_size": VISION["hidden_size"],
            "mm_patch_merge_type": "flat",
            "mm_projector_lr": 2e-05,
            "mm_projector_type": self.projector_type,
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "mm_vision_tower": "openai/clip-vit-tiny",
            "model_type": "llava_llama",
            "num_attention_heads": 4,
            "num_hidden_layers": text.num_hidden_layers,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 5000.0,
            "tie_word_embeddings": False,
            "tokenizer_model_max_length": 2048,
            "tokenizer_padding_side": "right",
            "torch_dtype": "float16",
            "transformers_version": "4.37.2",
            "tune_mm_mlp_adapter": False,
            "unfreeze_mm_vision_tower": False,
            "use_cache": True,
            "use_mm_proj": True,
            "vocab_size": text.vocab_size,
        }

    def tower_tensors(self) -> Tensors:
        """The tensors of the vision tower under the names of the hub's CLIP models."""
        return {f"vision_model.{name.removeprefix('vision_model.')}": t for name, t in self.tower.state_dict().items()}

    def projector_tensors(self) -> Tensors:
        return {f"model.mm_projector.{name}": tensor for name, tensor in self.projector.state_dict().items()}

    def original_tensors(self, with_tower: bool = True) -> Tensors:
        """All tensors under the names of LLaVA's code."""
        tensors = {**self.language_model.state_dict(), **self.projector_tensors()}
        if with_tower:
            tensors |= {f"model.vision_tower.vision_tower.{name}": t for name, t in self.tower_tensors().items()}
        return {name: tensor.clone() for name, tensor in tensors.items()}

    @torch.no_grad()
    def forward(self, ids: Sequence[int], pixels: torch.Tensor) -> torch.Tensor:
        """Returns the logits. The image features replace the id `IMAGE`."""
        features = self.tower(pixels[None], output_hidden_states=True).hidden_states[-2][:, 1:]
        features = self.projector(features)[0]
        embed = self.language_model.get_input_embeddings()
        position = ids.index(IMAGE)
        parts = [embed(torch.tensor(ids[:position])), features, embed(torch.tensor(ids[position + 1 :]))]
        logits: torch.Tensor = self.language_model(inputs_embeds=torch.cat(parts)[None]).logits[0]
        return logits


def write_clip(folder: Path, model: OriginalLlava, pickled: bool = True) -> Path:
    """Writes the vision tower as a CLIP model of the hub, which also has a text model."""
    folder.mkdir(parents=True)
    config = {"model_type": "clip", "vision_config": VISION, "text_config": {"hidden_size": 8}, "projection_dim": 24}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"crop_size": IMAGE_SIZE, "size": IMAGE_SIZE, "image_processor_type": "CLIPFeatureExtractor"})
    )
    more = {
        "vision_model.embeddings.position_ids": torch.arange(5)[None],
        "text_model.final_layer_norm.weight": torch.ones(8),
        "logit_scale": torch.tensor(2.0),
    }
    tensors = {**model.tower_tensors(), **more}
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


def write_llava(
    folder: Path,
    model: OriginalLlava,
    pickled: bool = True,
    shards: int = 2,
    with_tower: bool = True,
    dtype: torch.dtype = torch.float32,
    edit: Callable[[Tensors, dict[str, Any]], None] = lambda tensors, config: None,
) -> Path:
    """Writes a complete model in LLaVA's format."""
    folder.mkdir(parents=True)
    write_tokenizer(folder)
    tensors = {name: tensor.to(dtype) for name, tensor in model.original_tensors(with_tower).items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # older releases saved this constant
    config = model.config()
    edit(tensors, config)
    (folder / "config.json").write_text(json.dumps(config))
    write_weights(folder, tensors, pickled, shards)
    return folder


def write_weights(folder: Path, tensors: Mapping[str, torch.Tensor], pickled: bool, shards: int) -> None:
    """Writes weights in one file, or in several with an index."""
    stem, suffix = ("pytorch_model", ".bin") if pickled else ("model", ".safetensors")
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        part = {name: tensors[name].contiguous() for name in names[number::shards]}
        file = f"{stem}-{number + 1:05}-of-{shards:05}{suffix}" if shards > 1 else f"{stem}{suffix}"
        torch.save(part, folder / file) if pickled else save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))


def write_language_model(folder: Path, model: OriginalLlava) -> Path:
    """Writes the language model alone, as Vicuna is on the hub."""
    folder.mkdir(parents=True)
    write_tokenizer(folder)
    config = {k: v for k, v in model.config().items() if not k.startswith(("mm_", "tune_", "image_", "use_mm"))}
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    write_weights(folder, model.language_model.state_dict(), pickled=True, shards=1)
    return folder


def random_lora(
    modules: Mapping[str, torch.Tensor], rank: int, alpha: float, seed: int = 1
) -> tuple[Tensors, dict[str, torch.Tensor]]:
    """Returns LoRA matrices ``MODULE.lora_A`` and ``MODULE.lora_B``, and the merged weights of the modules."""
    generator = torch.Generator().manual_seed(seed)
    matrices, merged = {}, {}
    for module, weight in modules.items():
        a = torch.randn(rank, weight.shape[1], generator=generator) * 0.1
        b = torch.randn(weight.shape[0], rank, generator=generator) * 0.1
        matrices |= {f"{module}.lora_A": a, f"{module}.lora_B": b}
        merged[module] = weight + alpha / rank * b @ a
    return matrices, merged


def language_layers(model: OriginalLlava) -> dict[str, nn.Linear]:
    """The linear layers of the decoder, to which both codes add LoRA."""
    return {
        name: module
        for name, module in model.language_model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }


def write_llava_lora(folder: Path, model: OriginalLlava, base: OriginalLlava, rank: int = 4, alpha: int = 8) -> Path:
    """Writes an adapter in LLaVA's format, after which `model` has the weights of the base with the adapter."""
    folder.mkdir(parents=True)
    layers = language_layers(base)
    matrices, merged = random_lora({name: layer.weight.data for name, layer in layers.items()}, rank, alpha)
    for name, layer in language_layers(model).items():
        layer.weight.data = merged[name]
    torch.save(
        {f"base_model.model.{name}.weight": tensor for name, tensor in matrices.items()}, folder / "adapter_model.bin"
    )
    others = {f"base_model.model.{name}": nn.Parameter(tensor) for name, tensor in model.projector_tensors().items()}
    torch.save(others, folder / "non_lora_trainables.bin")
    (folder / "config.json").write_text(json.dumps(model.config()))
    adapter = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", "task_type": "CAUSAL_LM"}
    adapter |= {"base_model_name_or_path": "lmsys/vicuna-7b-v1.5", "target_modules": ["q_proj"], "lora_dropout": 0.05}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    return folder


def write_safe_eraser(folder: Path, base: Path, rank: int = 4) -> Path:
    """Writes a checkpoint of SafeEraser's code for a model of transformers: random LoRA matrices and its projector."""
    folder.mkdir(parents=True)
    tensors = load_file(base / "model.safetensors")
    layers = {
        name.removesuffix(".weight"): tensor
        for name, tensor in tensors.items()
        if name.endswith("_proj.weight") and name.startswith("language_model.")
    }
    matrices, _ = random_lora(layers, rank, alpha=256)
    trained = {f"{name}.default.weight": tensor for name, tensor in matrices.items()}
    trained |= {name: tensor for name, tensor in tensors.items() if name.startswith("multi_modal_projector.")}
    torch.save(
        {f"base_model.model.{name}": tensor.half() for name, tensor in trained.items()}, folder / "checkpoint.pt"
    )
    return folder / "checkpoint.pt"


class Exploit:
    """An object whose unpickling would run a program."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))
