"""Checks a model's processor, configuration and stored weights against each other, naming the key that is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from vlm_unlearn.data.processor_call import Processor
from vlm_unlearn.errors import UserError, nearest, quoted

# Vision towers of LLaVA models, with the number of tokens besides the patches (the class token).
CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}
# Processors whose settings have the meaning of the model's. Those of some other families scale them first.
LLAVA_PROCESSORS = ("LlavaProcessor", "LlavaNextProcessor", "LlavaOnevisionProcessor", "PixtralProcessor")
PATCH_KEYS = {
    "patch_size": "patch_size",
    "merge_size": "spatial_merge_size",
    "temporal_patch_size": "temporal_patch_size",
}


def match_processor(processor: Processor, config: Any, folder: Path) -> None:
    """Takes settings that a processor lacks from the model's config, and checks the others.

    Args:
        processor: The processor. Missing settings are set in place.
        config: The transformers config of the model.
        folder: The model folder, for error messages.

    Raises:
        UserError: A setting of the processor contradicts the model. `field` names it.
    """
    vision = getattr(config, "vision_config", None)
    if type(processor).__name__ in LLAVA_PROCESSORS and vision is not None:
        expected = {
            "patch_size": getattr(vision, "patch_size", None),
            "vision_feature_select_strategy": getattr(config, "vision_feature_select_strategy", None),
            "num_additional_image_tokens": CLASS_TOKENS.get(vision.model_type),
            "spatial_merge_size": getattr(config, "spatial_merge_size", 1),  # a LLaVA with Pixtral's tower has none
        }
        stored = _stored_settings(folder)
        for key, value in expected.items():
            if value is None or not hasattr(processor, key):
                continue
            if stored is not None and stored.get(key) is None:
                setattr(processor, key, value)
            _check_equal(getattr(processor, key, None), value, key, folder)
    elif vision is not None and getattr(vision, "spatial_merge_size", None) is not None:
        for key, model_key in PATCH_KEYS.items():
            value = getattr(processor.image_processor, key, None)
            if value is not None and getattr(vision, model_key, None) is not None:
                _check_equal(value, getattr(vision, model_key), key, folder)
    image_token_id = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    # In Gemma 3, the processor's image token is the one that starts an image. InternVL's tokenizer has another name.
    tokenizer = processor.tokenizer
    sources = ((tokenizer, "image_token"), (tokenizer, "context_image_token"), (processor, "image_token"))
    image_token = next((token for source, name in sources if (token := getattr(source, name, None))), None)
    if isinstance(image_token, str) and isinstance(image_token_id, int):
        _check_equal(processor.tokenizer.convert_tokens_to_ids(image_token), image_token_id, "image_token", folder)


def _stored_settings(folder: Path) -> Mapping[str, Any] | None:
    """Returns the settings of a processor's file, in which LLaVA's defaults are missing, or None without a file."""
    from vlm_unlearn.store import read_json

    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            content = read_json(folder / name)
            if isinstance(content, dict):
                return content
    return None


def _check_equal(value: object, expected: object, key: str, folder: Path) -> None:
    if value != expected:
        raise UserError(
            f"the processor has {key}={value!r}, but the model needs {expected!r}. Correct {key} in "
            "processor_config.json, or use the model's own processor.",
            code="processor-mismatch",
            file=folder,
            field=key,
        )


def validate_rope(config: Any, folder: Path) -> None:
    """Checks the settings of rotary position embeddings (RoPE) in the language model's config.

    Raises:
        UserError: A setting is unknown, is not a positive number, or does not fit the size of the attention heads.
    """
    text = config.get_text_config()
    for parameters in _rope_settings(getattr(text, "rope_parameters", None)):
        _validate_rope_settings(parameters, text, folder)


def validate_rope_keys(folder: Path) -> None:
    """Checks that the older and the newer keys of RoPE in config.json do not contradict each other.

    transformers 5 ignores ``rope_theta`` next to ``rope_parameters``, and prefers ``rope_scaling``. Older programs read
    the older keys.

    Raises:
        UserError: Two keys have different values, or one is not an object. `field` names it.
    """
    from vlm_unlearn.store import read_json

    file = folder / "config.json"
    config = read_json(file) if file.is_file() else None
    for section in (config, config.get("text_config")) if isinstance(config, dict) else ():
        problem = _contradiction(section) if isinstance(section, dict) else None
        if problem is not None:
            key, reason = problem
            raise UserError(
                f"the RoPE setting {key} {reason}. Correct it in config.json.",
                code="invalid-model",
                file=folder,
                field=key,
            )


def _contradiction(section: Mapping[str, Any]) -> tuple[str, str] | None:
    """Returns the key that contradicts ``rope_parameters``, and how, or None."""
    theta, parameters, scaling = (section.get(key) for key in ("rope_theta", "rope_parameters", "rope_scaling"))
    for key, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if value is not None and not isinstance(value, dict):
            return key, f"is {value!r}, not an object or null"
    if theta is not None and (isinstance(theta, bool) or not isinstance(theta, int | float) or not theta > 0):
        return "rope_theta", f"is {theta!r}, not a positive number"
    if not parameters or any(isinstance(value, dict) for value in parameters.values()):  # one per type of layer
        return None
    if theta is not None and parameters.get("rope_theta", theta) != theta:
        return "rope_theta", f"is {theta!r}, but rope_parameters has {parameters['rope_theta']!r}"
    different = [
        key
        for key in sorted((scaling or {}).keys() & parameters.keys() - {"type", "rope_type", "rope_theta"})
        if (scaling or {})[key] != parameters[key]
    ]
    if scaling and _rope_type(scaling) != _rope_type(parameters):
        different.append("rope_type")
    return ("rope_scaling", f"contradicts rope_parameters ({', '.join(different)})") if different else None


def _rope_type(parameters: Mapping[str, Any]) -> object:
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    return "default" if rope_type == "mrope" else rope_type  # mrope is the older name


def _rope_settings(parameters: object) -> Iterator[Mapping[str, Any]]:
    """Yields the settings of a model, or those of each type of its layers."""
    if not isinstance(parameters, Mapping):
        return
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    yield from nested or [parameters]


def _validate_rope_settings(parameters: Mapping[str, Any], text: Any, folder: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    def error(key: str, problem: str) -> UserError:
        return UserError(
            f"the RoPE setting {key} {problem} Correct it in config.json.", code="invalid-model", file=folder, field=key
        )

    rope_types = ["default", "mrope", *ROPE_INIT_FUNCTIONS]
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type not in rope_types:
        raise error("rope_type", f"is {quoted(str(rope_type))}{nearest(str(rope_type), rope_types)}.")
    for key in ("rope_theta", "factor"):
        value = parameters.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
            raise error(key, f"is {value!r}, not a positive number.")
    sections = parameters.get("mrope_section")
    if sections is not None:
        heads = getattr(text, "num_attention_heads", None) or 1
        head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
        numbers = sections if isinstance(sections, list | tuple) else [None]
        if not all(isinstance(number, int) for number in numbers) or sum(numbers) != head_size // 2:
            raise error("mrope_section", f"is {sections!r}, but must be integers with the sum {head_size // 2}.")


def validate_tied_head(model: Any, folder: Path) -> None:
    """Checks that the output head equals the input embeddings if the config ties them.

    If the weight files contain two different ones, transformers does not tie them and only warns. Other readers do.

    Raises:
        UserError: The config ties them, but they differ.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if not getattr(model.config, "tie_word_embeddings", False) or head is None or embeddings is None:
        return
    if head.weight is embeddings.weight or head.weight.shape != embeddings.weight.shape:
        return  # tied, or of a family whose embeddings have more rows than the head (mllama)
    if not torch.equal(head.weight, embeddings.weight):
        raise UserError(
            "config.json ties the output head to the input embeddings, but they differ in the weight files. Set "
            "tie_word_embeddings to false in config.json.",
            code="invalid-model",
            file=folder,
            field="tie_word_embeddings",
        )
