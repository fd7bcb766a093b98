"""Makes a LLaVA of transformers from tensors with the names of LLaVA's code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.modeling.conversion.base import Conversion, ConversionOptions, LoraPair, Weight, is_supported_dtype
from vlm_unlearn.modeling.conversion.bases import read_vision_tower
from vlm_unlearn.modeling.conversion.llava_config import LlavaSettings, build_config
from vlm_unlearn.modeling.conversion.llava_processor import build_processor, read_tokens
from vlm_unlearn.modeling.conversion.names import canonical, hub_name, is_buffer
from vlm_unlearn.modeling.conversion.tensor_files import Stored
from vlm_unlearn.modeling.loader import DTYPES, build_skeleton
from vlm_unlearn.modeling.older_readers import add_older_forms
from vlm_unlearn.modeling.processors import save_processor
from vlm_unlearn.store import write_json

EMBEDDINGS = "model.embed_tokens.weight"
VISION_TOWER = "model.vision_tower."
_VOCABULARY_TENSORS = ("language_model.embed_tokens.weight", "lm_head.weight")


def assemble(
    format_name: str,
    settings: LlavaSettings,
    tensors: Mapping[str, Stored],
    lora: Mapping[str, LoraPair],
    tokenizer_folder: Path,
    inputs: Sequence[Path],
    options: ConversionOptions,
) -> Conversion:
    """Returns the conversion of a LLaVA.

    Args:
        format_name: The name of the format.
        settings: The settings of its config.json.
        tensors: All tensors but those of the vision tower, which may be missing, by their name in LLaVA's code.
        lora: LoRA matrices by the name of the module in LLaVA's code.
        tokenizer_folder: The folder of the tokenizer.
        inputs: The files and folders that the conversion reads.
        options: Settings of the conversion.

    Raises:
        UserError: A tensor is missing, unexpected, or has a wrong shape, or a file of the processor is broken.
    """
    source = inputs[0]
    includes_tower = any(name.startswith(VISION_TOWER) for name in tensors)
    tower = read_vision_tower(settings.vision_tower, options.vision_tower, includes_tower)
    tensors = {name: stored for name, stored in {**tower.tensors, **tensors}.items() if not is_buffer(name)}
    if EMBEDDINGS not in tensors:
        raise _missing([hub_name(EMBEDDINGS)], source)
    dtype = DTYPES.get(options.precision, tensors[EMBEDDINGS].info.dtype)
    tokens = read_tokens(tokenizer_folder, settings.vocabulary_size)
    config = build_config(settings, tower.config, tokens.ids, tokens.num_rows)
    config.dtype = dtype
    weights = [
        Weight(hub_name(name), stored, dtype, stored.info.shape, lora.get(name.removesuffix(".weight")))
        for name, stored in tensors.items()
    ]
    if settings.projector == "linear":
        weights += _identity_layer(config.text_config.hidden_size, dtype)
    weights = _match(weights, config, settings, tokens.num_rows, source)
    _check_lora(weights, lora, source)
    processor = build_processor(tokens, settings, tower.config, tower.processor_settings, options.template)

    def write_files(out: Path) -> None:
        config.save_pretrained(str(out))
        ids = {f"{name}_token_id": tokens.ids[name] for name in ("bos", "eos", "pad")}
        write_json(out / "generation_config.json", {"_from_model_config": True, **ids})
        save_processor(processor, out)
        add_older_forms(out)

    notes = []
    if settings.pads_images:
        notes.append("The model was trained on images padded to squares. Pass image_aspect_ratio=pad to train.")
    folders = [] if tower.folder is None else [tower.folder]
    return Conversion(format_name, weights, write_files, [*inputs, *folders], notes)


def _identity_layer(size: int, dtype: torch.dtype) -> list[Weight]:
    """Returns a layer that changes nothing, the second one of a projector that has only one."""
    name = "multi_modal_projector.linear_2"
    return [
        Weight(f"{name}.weight", None, dtype, (size, size), fill=lambda: torch.eye(size)),
        Weight(f"{name}.bias", None, dtype, (size,), fill=lambda: torch.zeros(size)),
    ]


def _match(
    weights: Sequence[Weight], config: Any, settings: LlavaSettings, num_rows: int, source: Path
) -> list[Weight]:
    """Compares the tensors with those that the model of the config has, and lengthens the embeddings.

    Raises:
        UserError: A tensor is missing, unexpected, of another shape, or does not hold floating-point numbers.
    """
    skeleton = build_skeleton(config, str(source), len(weights))
    expected = {canonical(name): tuple(parameter.shape) for name, parameter in skeleton.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
        weights = [weight for weight in weights if canonical(weight.name) != "lm_head.weight"]
    names = {canonical(weight.name) for weight in weights}
    missing, unexpected = sorted(expected.keys() - names), sorted(names - expected.keys())
    if missing:
        raise _missing(missing, source)
    if unexpected:
        raise UserError(
            f"contains {len(unexpected)} tensors that the model of config.json does not have, for example "
            f"{quoted(unexpected[0])}. Use the config.json of this checkpoint.",
            code="unexpected-tensors",
            file=source,
        )
    matched = []
    for weight in weights:
        shape = expected[canonical(weight.name)]
        stored_shape = shape
        if canonical(weight.name) in _VOCABULARY_TENSORS:
            stored_shape = (settings.vocabulary_size, *shape[1:])
        if weight.shape != stored_shape:
            raise UserError(
                f"{quoted(weight.name)} has the shape {weight.shape}, but config.json describes {stored_shape}. Use "
                "the config.json of this checkpoint.",
                code="invalid-model",
                file=source if weight.stored is None else weight.stored.source.file,
            )
        if weight.stored is not None and not is_supported_dtype(weight.stored.info):
            raise UserError(
                f"{quoted(weight.name)} does not hold floating-point numbers. Quantized checkpoints are not supported.",
                code="unsupported-setting",
                file=weight.stored.source.file,
            )
        matched.append(replace(weight, shape=shape))
    return matched


def _missing(names: Sequence[str], source: Path) -> UserError:
    projector = all(name.startswith("multi_modal_projector.") for name in names)
    tower = all(name.startswith("vision_tower.") for name in names)
    fix = "Download the model again."
    if projector:
        fix = "This is a language model without a projector. Check the path."
    elif tower:
        fix = "Pass --vision-tower with the folder of the complete CLIP model."
    return UserError(
        f"{len(names)} tensors are missing, for example {quoted(names[0])}. {fix}",
        code="missing-tensors",
        file=source,
    )


def _check_lora(weights: Sequence[Weight], lora: Mapping[str, LoraPair], source: Path) -> None:
    """Checks that all LoRA matrices belong to a tensor, and fit its shape."""
    merged = {weight.name: weight for weight in weights if weight.lora is not None}
    for module, pair in lora.items():
        weight = merged.get(hub_name(f"{module}.weight"))
        product = (pair.b.info.shape[0], pair.a.info.shape[1])
        if weight is None or weight.shape != product:
            problem = "does not exist in the base model" if weight is None else f"has another shape than {product}"
            raise UserError(
                f"the adapter changes {quoted(module)}, which {problem}. Pass the model that the training began with "
                "as --base.",
                code="adapter-mismatch",
                file=source,
            )
