"""Models that a checkpoint builds on: LLaVA models in both formats, language models and vision towers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.modeling.conversion.base import is_hub_name, resolve_source
from vlm_unlearn.modeling.conversion.llava_config import (
    LANGUAGE_MODELS,
    PUBLISHED_TOWERS,
    is_llava_config,
    read_config_file,
)
from vlm_unlearn.modeling.conversion.tensor_files import Stored, open_tensors, weight_files
from vlm_unlearn.modeling.size_limits import validate_processor_sizes
from vlm_unlearn.store import read_json

# transformers 5 saves a vision tower alone without its prefix.
_TOWER_MODULES = ("vision_model.", "embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")


@dataclass(frozen=True)
class OriginalModel:
    """A model whose tensors have the names of LLaVA's code: a complete LLaVA, or its language model alone.

    Attributes:
        folder: The model folder.
        is_llava: Whether it is a complete LLaVA, with a projector.
        tensors: The tensors by name.
    """

    folder: Path
    is_llava: bool
    tensors: Mapping[str, Stored]


@dataclass(frozen=True)
class VisionTower:
    """A CLIP vision tower.

    Attributes:
        config: Its config in transformers.
        processor_settings: The settings of its image processor, or None for those of CLIP.
        tensors: Its tensors by their name in LLaVA's code. Empty if the checkpoint must contain them.
        folder: Its folder, or None if only its published settings are used.
    """

    config: Any
    processor_settings: Mapping[str, Any] | None
    tensors: Mapping[str, Stored]
    folder: Path | None


def read_original_model(name: str) -> OriginalModel | None:
    """Opens a base model in the format of LLaVA's code, or a language model.

    Returns:
        The model, or None for a model in the format of Hugging Face.

    Raises:
        UserError: It is not found or broken, or is neither of these.
    """
    folder = resolve_source(name)
    if not folder.is_dir():
        raise UserError("must be a model folder or a hub name.", code="invalid-model", file=name, field="--base")
    config = read_config_file(folder)
    if is_llava_config(config):
        return OriginalModel(folder, True, open_tensors(weight_files(folder)))
    if config.get("model_type") in LANGUAGE_MODELS:
        return OriginalModel(folder, False, open_tensors(weight_files(folder)))
    if any(isinstance(config.get(key), dict) for key in ("text_config", "vision_config")):
        return None
    raise UserError(
        f"{quoted(config.get('model_type'))} is neither a vision-language model nor a Llama or Mistral.",
        code="invalid-model",
        file=folder / "config.json",
        field="model_type",
    )


def read_vision_tower(name: str, option: str | None, weights_included: bool) -> VisionTower:
    """Opens the vision tower of a LLaVA.

    Args:
        name: Its name in the config of the LLaVA.
        option: The folder or hub name that the user has passed.
        weights_included: Whether the checkpoint contains the weights of the tower.

    Raises:
        UserError: It is not found, or is no CLIP model.
    """
    from transformers import CLIPVisionConfig

    published = PUBLISHED_TOWERS.get(name.rstrip("/").rpartition("/")[2])
    if option is None and weights_included and published is not None:
        return VisionTower(CLIPVisionConfig(**published), None, {}, None)
    if option is None and not is_hub_name(name):
        raise UserError(
            f"the vision tower {quoted(name)} is not a hub name. Pass --vision-tower with its folder.",
            code="missing-base",
            field="--vision-tower",
        )
    try:
        folder = resolve_source(option or name)
    except UserError as error:
        raise error.with_fix("Pass --vision-tower with the folder of the CLIP model.") from None
    config, settings = _read_clip_config(folder)
    if weights_included:
        return VisionTower(config, settings, {}, folder)
    tensors = {
        f"model.vision_tower.vision_tower.vision_model.{tensor.removeprefix('vision_model.')}": stored
        for tensor, stored in open_tensors(weight_files(folder)).items()
        if tensor.startswith(_TOWER_MODULES)  # a complete CLIP also has a text model
    }
    return VisionTower(config, settings, tensors, folder)


def _read_clip_config(folder: Path) -> tuple[Any, Mapping[str, Any] | None]:
    """Returns the config of a CLIP model's vision tower, and the settings of its image processor."""
    from transformers import AutoConfig

    content = read_config_file(folder)
    if content.get("model_type") not in ("clip", "clip_vision_model"):
        raise UserError(
            f"{quoted(content.get('model_type'))} is not supported. Supported are CLIP models.",
            code="unsupported-setting",
            file=folder / "config.json",
            field="model_type",
        )
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # broken config.json files raise many types
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"transformers rejects it: {reason}", code="invalid-model", file=folder) from None
    validate_processor_sizes(folder)
    file = folder / "preprocessor_config.json"
    settings = read_json(file) if file.is_file() else None
    return getattr(config, "vision_config", config), settings if isinstance(settings, dict) else None
