"""Checks of a model folder: the processor, the position embeddings and tied weights against the model.

Without them, a wrong setting stops a run with an error that names no key, or silently changes the answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_unlearn.data.processor_call import Processor
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.store import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Prefixes of the processor classes whose settings have the meaning of the model's. Others scale them first.
CHECKED_PROCESSORS = ("Llava", "VipLlava", "VideoLlava", "Pixtral", "Qwen2VL", "Qwen2_5_VL", "Qwen3VL")
# The number of tokens that a vision tower adds to the patches, by the `model_type` of its config.
CLASS_TOKENS = {"clip_vision_model": 1, "clip": 1, "siglip_vision_model": 0, "siglip2_vision_model": 0, "pixtral": 0}
# Settings of a processor that must equal one of the model: (processor, setting, path in config.json).
SAME_SETTINGS = (
    ("processor", "patch_size", "vision_config.patch_size"),
    ("processor", "vision_feature_select_strategy", "vision_feature_select_strategy"),
    ("processor", "spatial_merge_size", "spatial_merge_size"),
    ("image processor", "patch_size", "vision_config.patch_size"),
    ("image processor", "merge_size", "vision_config.spatial_merge_size"),
    ("image processor", "temporal_patch_size", "vision_config.temporal_patch_size"),
)


def check_processor(processor: Processor, config: PreTrainedConfig, folder: Path) -> None:
    """Checks that a processor inserts as many image tokens as the model has features. Missing settings are filled in.

    Processors other than those of LLaVA, Pixtral and Qwen are not checked.

    Args:
        processor: The processor, changed in place.
        config: The model's config.
        folder: The processor's folder, for error messages and to find the settings that its files lack.

    Raises:
        UserError: A setting differs from the model's. `field` is the setting.
    """
    if not type(processor).__name__.startswith(CHECKED_PROCESSORS):
        return
    for component, name, path in SAME_SETTINGS:
        owner = processor if component == "processor" else getattr(processor, "image_processor", None)
        # Only Qwen's image processors split images into the patches of the model.
        if not hasattr(owner, name) or (component != "processor" and not hasattr(owner, "merge_size")):
            continue
        expected = _plain(_lookup(config, path))
        if expected is None and name == "spatial_merge_size":
            expected = 1  # a LLaVA with Pixtral's tower merges no patches
        if expected is not None:
            _fill_or_compare(owner, name, expected, f"{path} of config.json", folder)
    if hasattr(processor, "num_additional_image_tokens"):
        _check_class_token(processor, config, folder)
    _check_image_token(processor, config, folder)


def _check_class_token(processor: Processor, config: PreTrainedConfig, folder: Path) -> None:
    """Checks the number of tokens that the vision tower adds to the patches."""
    name, tower = "num_additional_image_tokens", str(_lookup(config, "vision_config.model_type"))
    if tower not in CLASS_TOKENS:
        return
    if not any(name in _settings(folder / file) for file in ("processor_config.json", "preprocessor_config.json")):
        setattr(processor, name, None)  # the default of transformers fits no CLIP tower
    _fill_or_compare(processor, name, CLASS_TOKENS[tower], f"the vision tower {tower}", folder)


def _check_image_token(processor: Processor, config: PreTrainedConfig, folder: Path) -> None:
    actual, expected = getattr(processor, "image_token_id", None), getattr(config, "image_token_id", None)
    if isinstance(actual, int) and isinstance(expected, int):
        _fill_or_compare(processor, "image_token_id", expected, "image_token_id of config.json", folder)


def _fill_or_compare(owner: Any, name: str, expected: object, source: str, folder: Path) -> None:
    actual = _plain(getattr(owner, name))
    if actual is None:
        setattr(owner, name, expected)
    elif actual != expected:
        raise UserError(
            f"{name} of the processor is {actual!r}, but {source} has {expected!r}. Correct the processor's files.",
            code="processor-mismatch",
            file=folder,
            field=name,
        )


def _plain(value: object) -> object:
    """Returns the number of a pair or a mapping of equal numbers: the patches of all models are squares."""
    items = list(value.values()) if isinstance(value, Mapping) else value
    if isinstance(items, list | tuple) and items and all(item == items[0] for item in items):
        return items[0]
    return value


def _lookup(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    return config


def _settings(file: Path) -> Mapping[str, Any]:
    content = read_json(file) if file.is_file() else {}
    return content if isinstance(content, dict) else {}


def check_rope(folder: Path) -> None:
    """Checks the settings of rotary position embeddings in config.json.

    transformers 5 reads ``rope_parameters`` and ignores ``rope_theta`` next to it, which older programs read.

    Raises:
        UserError: A setting is invalid, unknown, or contradicts another one. `field` is the setting.
    """
    file = folder / "config.json"
    config = read_json(file)
    for path, section in _sections(config if isinstance(config, dict) else {}):
        problem = _rope_problem(section)
        if problem is not None:
            name, reason = problem
            raise UserError(f"{name} {reason}.", code="invalid-model", file=file, field=f"{path}{name}")


def _sections(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield "", config
    if isinstance(config.get("text_config"), dict):  # vision towers have position embeddings of many other kinds
        yield "text_config.", config["text_config"]


def _rope_problem(section: Mapping[str, Any]) -> tuple[str, str] | None:
    """Returns the name of the first wrong setting and the reason, or None."""
    theta, parameters, scaling = (section.get(name) for name in ("rope_theta", "rope_parameters", "rope_scaling"))
    for name, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if value is not None and not isinstance(value, dict):
            return name, "must be an object or null"
    parameters, scaling = parameters or {}, scaling or {}
    by_layer = [value for value in parameters.values() if isinstance(value, dict)]  # one per type of layer
    for values in by_layer or [parameters, scaling]:
        if (problem := _values_problem(values, section)) is not None:
            return problem
    if theta is not None and not _is_positive(theta):
        return "rope_theta", f"is {theta!r}, but must be a positive number"
    if by_layer or not parameters:
        return None
    if theta is not None and parameters.get("rope_theta", theta) != theta:
        return "rope_theta", f"is {theta!r}, but rope_parameters has {parameters['rope_theta']!r}. Keep one of the two"
    different = sorted(
        name for name in scaling.keys() & parameters.keys() if name not in ("type", "rope_type", "rope_theta")
        and scaling[name] != parameters[name]
    )  # fmt: skip
    if different or (scaling and _rope_type(scaling) != _rope_type(parameters)):
        reason = ", ".join(different) or "rope_type"
        return "rope_scaling", f"contradicts rope_parameters ({reason}). Keep one of the two"
    return None


def _values_problem(values: Mapping[str, Any], section: Mapping[str, Any]) -> tuple[str, str] | None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if "rope_theta" in values and not _is_positive(values["rope_theta"]):
        return "rope_theta", f"is {values['rope_theta']!r}, but must be a positive number"
    if "factor" in values and not _is_positive(values["factor"]):
        return "factor", f"is {values['factor']!r}, but must be a positive number"
    kind = _rope_type(values)
    if kind not in (*ROPE_INIT_FUNCTIONS, "default", "su"):  # su is the old name of longrope
        types = ", ".join(sorted(ROPE_INIT_FUNCTIONS))
        return "rope_type", f"{quoted(str(kind))} is unknown to transformers. Use one of default, {types}"
    sizes = values.get("mrope_section")
    heads, width = section.get("num_attention_heads"), section.get("hidden_size")
    head_dim = section.get("head_dim") or (width // heads if heads and width else None)
    partial = values.get("partial_rotary_factor") or section.get("partial_rotary_factor") or 1
    if isinstance(sizes, list) and head_dim and 2 * sum(sizes) != int(head_dim * partial):
        return "mrope_section", f"{sizes} must add up to {int(head_dim * partial) // 2}, half of the size of a head"
    return None


def _rope_type(values: Mapping[str, Any]) -> object:
    kind = values.get("rope_type", values.get("type", "default"))
    return "default" if kind == "mrope" else kind


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def check_tied_weights(model: Any, missing_keys: list[str], folder: Path) -> None:
    """Checks that input and output embeddings are one matrix if config.json says so, and two otherwise.

    transformers 5 does not tie two different matrices, but other programs do, which then give other answers.

    Args:
        model: The loaded model.
        missing_keys: The names of the parameters that the weight files lack.
        folder: The model folder.

    Raises:
        UserError: The weights contradict ``tie_word_embeddings``.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    problem = None
    names = {name for name, parameter in model.named_parameters() if head is not None and parameter is head.weight}
    if not tied and names & set(missing_keys):
        problem = "is false, but the weight files contain no output embeddings. Set it to true"
    elif tied and head is not None and head.weight is not embeddings.weight:
        left, right = head.weight, embeddings.weight
        # Llama 3.2 Vision has further input embeddings, for images. It is never tied.
        if left.shape == right.shape and not bool((left == right).all()):
            problem = "is true, but the weight files contain output embeddings that differ. Set it to false"
    if problem is not None:
        raise UserError(
            f"tie_word_embeddings {problem}.",
            code="invalid-model",
            file=folder / "config.json",
            field="tie_word_embeddings",
        )
