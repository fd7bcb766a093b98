"""Chooses what trains: whole model, layers and parameters by name, or LoRA adapters; and tells it as a table."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from vlm_unlearn.config import TrainableConfig
from vlm_unlearn.errors import UserError, nearest
from vlm_unlearn.models.layout import decoder_layers, get_base_model, is_projector, is_vision, layout_of
from vlm_unlearn.models.sine import add_sine

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prepare_trainable(model: PreTrainedModel, config: TrainableConfig) -> PreTrainedModel:
    """Freezes all but what `config` names; with ``mode: lora`` or ``qlora`` returns the PEFT-wrapped model.

    What trains is held in float32, whatever the frozen rest is in.

    Raises:
        UserError: a layer is out of range, or nothing would train.
    """
    count = len(decoder_layers(model))
    outside = [layer for layer in config.layers or [] if not 0 <= layer < count]
    if outside:
        raise UserError(f"trainable.layers: {outside} out of range; the model has decoder layers 0 to {count - 1}")
    prepared: Any = _full(model, config) if config.mode == "full" else _lora(model, config)
    if config.projector:
        trainable_projector(prepared).float()  # the frozen weights that a sine is added to included
    if config.projector == "sine":
        add_sine(trainable_projector(prepared))
    for parameter in prepared.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if not any(parameter.requires_grad for parameter in prepared.parameters()):
        raise UserError(f"trainable: nothing would train; no parameter's name holds any of {config.parameter_patterns}")
    return prepared


def _full(model: PreTrainedModel, config: TrainableConfig) -> PreTrainedModel:
    layout = layout_of(model)
    names = [name for name, _ in model.named_parameters()]
    for pattern in config.parameter_patterns or []:
        if not any(pattern in name for name in names):
            raise UserError(
                f'trainable.parameter_patterns: no parameter\'s name holds "{pattern}"{nearest(pattern, _short(names))}'
            )
    chosen = None if config.layers is None else tuple(f"{layout.layers}.{layer}." for layer in config.layers)
    for name, parameter in model.named_parameters():
        if is_vision(name, layout):
            parameter.requires_grad = config.vision_tower
        elif is_projector(name, layout):
            parameter.requires_grad = bool(config.projector)
        else:
            in_layer = chosen is None or name.startswith(chosen)
            parameter.requires_grad = in_layer and (
                config.parameter_patterns is None or any(part in name for part in config.parameter_patterns)
            )
    return model


def _lora(model: PreTrainedModel, config: TrainableConfig) -> Any:
    from peft import LoraConfig, get_peft_model

    if config.parameter_patterns is not None or config.vision_tower:
        raise UserError(
            f"trainable: parameters and vision_tower are for mode=full; with mode={config.mode} choose trainable.lora.target_modules"
        )
    layout = layout_of(model)
    linear = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules() if name.startswith(layout.layers + ".")}
    for target in config.lora.target_modules:
        if target not in linear:
            raise UserError(
                f'trainable.lora.target_modules: no decoder layer has "{target}"{nearest(target, sorted(linear))}'
            )
    names = "|".join(re.escape(name) for name in config.lora.target_modules)
    layers = r"\d+" if config.layers is None else "|".join(map(str, config.layers))
    lora = LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.lora_alpha,
        lora_dropout=config.lora.lora_dropout,
        target_modules=rf"{re.escape(layout.layers)}\.({layers})\..*\.({names})",
        # The projector trains whole, beside the adapters, and is saved with them.
        modules_to_save=[layout.projector.rsplit(".", 1)[-1]] if config.projector else None,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise UserError(f"trainable.lora.target_modules: {str(error).splitlines()[0][:200]}") from None


def _short(names: Iterable[str]) -> list[str]:
    """``mlp.down_proj`` of ``model.language_model.layers.0.mlp.down_proj.weight``, once each."""
    return sorted({".".join(name.split(".")[-3:-1]) for name in names})


def trainable_projector(model: nn.Module) -> nn.Module:
    """The projector that trains: the model's own, or the copy that PEFT trains beside it."""
    inner = get_base_model(model)
    projector = inner.get_submodule(layout_of(inner).projector)
    copies = getattr(projector, "modules_to_save", None)
    return projector if copies is None else next(iter(copies.values()))


def trainable_table(model: PreTrainedModel) -> list[tuple[str, int, int]]:
    """``(part, trained parameters, all parameters)`` for vision tower, projector, language model and adapters."""
    inner = get_base_model(model)
    layout = layout_of(inner)
    rows = {"vision tower": [0, 0], "projector": [0, 0], "language model": [0, 0], "adapters": [0, 0]}
    for name, parameter in inner.named_parameters():
        if ".original_module." in name:  # the untrained twin that PEFT keeps of a module it trains whole
            continue
        if ".parametrizations." in name and name.endswith(
            ".original"
        ):  # SineProject's frozen weight, beside the delta that trains
            continue
        part = (
            "vision tower"
            if is_vision(name, layout)
            else "projector"
            if is_projector(name, layout)
            else "language model"
        )
        if ".lora_" in name:
            part = "adapters"
        rows[part][0] += parameter.numel() if parameter.requires_grad else 0
        rows[part][1] += parameter.numel()
    return [(part, trained, total) for part, (trained, total) in rows.items()]
