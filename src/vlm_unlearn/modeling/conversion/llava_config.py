"""Reads the config.json of LLaVA's code, and makes the one of a LLaVA in transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.modeling.compatibility import validate_rope
from vlm_unlearn.modeling.size_limits import validate_config_sizes
from vlm_unlearn.store import read_json

TEXT_TYPES = {
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
}
LANGUAGE_MODELS = ("llama", "mistral")
# The vision towers of the published models, whose weights a complete checkpoint contains, but not their settings.
_CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
PUBLISHED_TOWERS = {
    "clip-vit-large-patch14": {**_CLIP_LARGE, "image_size": 224},
    "clip-vit-large-patch14-336": {**_CLIP_LARGE, "image_size": 336},
}
_SELECT_STRATEGIES = {"patch": "default", "cls_patch": "full"}


@dataclass(frozen=True)
class LlavaSettings:
    """The settings of a LLaVA in its original config.json.

    Attributes:
        file: The config file.
        text: The settings of the language model, as keyword arguments of `text_type`'s config.
        text_type: The type of the language model in transformers.
        vision_tower: The name or path of the CLIP model that the training used.
        projector: ``linear`` or ``mlp2x_gelu``.
        feature_layer: The layer of the vision tower whose output the projector receives.
        feature_strategy: ``default`` leaves out the class token, ``full`` does not.
        image_marks: Whether ``<im_start>`` and ``<im_end>`` enclose each image.
        pads_images: Whether the training padded images to squares.
    """

    file: Path
    text: Mapping[str, Any]
    text_type: str
    vision_tower: str
    projector: str
    feature_layer: int
    feature_strategy: str
    image_marks: bool
    pads_images: bool

    @property
    def vocabulary_size(self) -> int:
        """The number of rows of the embeddings in the checkpoint."""
        return int(self.text["vocab_size"])


def is_llava_config(config: object) -> bool:
    """Returns whether a config.json was written by LLaVA's code. That of transformers has a ``text_config``."""
    return isinstance(config, dict) and "mm_vision_tower" in config and "text_config" not in config


def read_config_file(folder: Path) -> dict[str, Any]:
    """Returns the content of config.json.

    Raises:
        UserError: It is missing, is not an object, or describes something gigantic.
    """
    validate_config_sizes(folder)
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError("must be a JSON object.", code="invalid-model", file=folder / "config.json")
    return config


def read_settings(folder: Path) -> LlavaSettings:
    """Returns the settings of a folder that LLaVA's code has written.

    Raises:
        UserError: A setting is missing, or transformers' LLaVA does not have it.
    """
    config, file = read_config_file(folder), folder / "config.json"

    def error(field: str, problem: str) -> UserError:
        return UserError(problem, code="unsupported-setting", file=file, field=field)

    architecture = next(iter(config.get("architectures") or []), config.get("model_type"))
    text_type = TEXT_TYPES.get(str(architecture), TEXT_TYPES.get(str(config.get("model_type"))))
    if text_type is None:
        raise error("architectures", f"{quoted(architecture)} is not supported. Supported are Llama and Mistral.")
    if not isinstance(config.get("mm_vision_tower"), str):
        raise error("mm_vision_tower", "must be the name of the vision tower.")
    projector = config.get("mm_projector_type", "linear")
    if projector not in ("linear", "mlp2x_gelu"):
        raise error("mm_projector_type", f"{quoted(projector)} is not supported. Supported: linear, mlp2x_gelu.")
    if "unpad" in str(config.get("mm_patch_merge_type")) or config.get("image_aspect_ratio") == "anyres":
        raise error(
            "image_aspect_ratio",
            "images in tiles (LLaVA-1.6) are not supported. Use the model of llava-hf on the hub.",
        )
    if config.get("quantization_config"):
        raise error("quantization_config", "quantized checkpoints are not supported. Use the original weights.")
    strategy = _SELECT_STRATEGIES.get(str(config.get("mm_vision_select_feature", "patch")))
    layer = config.get("mm_vision_select_layer", -2)
    if strategy is None:
        raise error("mm_vision_select_feature", "must be patch or cls_patch.")
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise error("mm_vision_select_layer", "must be the number of a layer.")
    return LlavaSettings(
        file=file,
        text=_text_settings(config, text_type, file),
        text_type=text_type,
        vision_tower=config["mm_vision_tower"],
        projector=projector,
        feature_layer=layer,
        feature_strategy=strategy,
        image_marks=bool(config.get("mm_use_im_start_end")),
        pads_images=config.get("image_aspect_ratio") == "pad",
    )


def _text_settings(config: Mapping[str, Any], text_type: str, file: Path) -> dict[str, Any]:
    """Returns the settings of the language model. Those of LLaVA and of the run are left out.

    Raises:
        UserError: The sizes are missing, which transformers would replace by those of Llama-7B.
    """
    from transformers import AutoConfig

    names = {*AutoConfig.for_model(text_type).to_dict(), "rope_theta"}
    left_out = {"architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "_name_or_path"}
    settings = {name: value for name, value in config.items() if name in names - left_out}
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if isinstance(settings.get(field), bool) or not isinstance(settings.get(field), int) or settings[field] < 1:
            raise UserError("must be a positive integer.", code="invalid-model", file=file, field=field)
    scaling = config.get("rope_scaling")
    if scaling is not None and not isinstance(scaling, dict):
        raise UserError("must be an object or null.", code="invalid-model", file=file, field="rope_scaling")
    if scaling:  # transformers 5 has another name for these settings, and for the type
        theta = {"rope_theta": settings.pop("rope_theta")} if "rope_theta" in settings else {}
        rope_type = scaling.get("rope_type", scaling.get("type"))
        rest = {name: value for name, value in scaling.items() if name != "type"}
        settings["rope_parameters"] = {**theta, **rest, "rope_type": rope_type}
    return settings


def build_config(settings: LlavaSettings, vision_config: Any, tokens: Mapping[str, int], vocabulary_size: int) -> Any:
    """Returns the config of a LLaVA in transformers.

    Args:
        settings: The original settings.
        vision_config: The config of the vision tower.
        tokens: The ids of ``image`` and ``pad``, and of ``bos`` and ``eos``.
        vocabulary_size: The number of rows of the embeddings, with the new tokens.

    Raises:
        UserError: transformers rejects a setting.
    """
    from transformers import AutoConfig, LlavaConfig

    changed = {
        "vocab_size": vocabulary_size,
        "pad_token_id": tokens["pad"],
        "bos_token_id": tokens["bos"],
        "eos_token_id": tokens["eos"],
    }
    try:
        text = AutoConfig.for_model(settings.text_type, **{**settings.text, **changed})
        config = LlavaConfig(
            text_config=text,
            vision_config=vision_config,
            image_token_index=tokens["image"],
            image_seq_length=(vision_config.image_size // vision_config.patch_size) ** 2
            + (settings.feature_strategy == "full"),
            vision_feature_layer=settings.feature_layer,
            vision_feature_select_strategy=settings.feature_strategy,
            # A linear projector is one of two layers without activation, whose second layer changes nothing.
            projector_hidden_act="gelu" if settings.projector == "mlp2x_gelu" else "linear",
            tie_word_embeddings=bool(settings.text.get("tie_word_embeddings", False)),
        )
    except Exception as error:  # broken settings raise many types
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"transformers rejects it: {reason}", code="invalid-model", file=settings.file) from None
    config.architectures = ["LlavaForConditionalGeneration"]
    validate_rope(config, settings.file)
    return config
