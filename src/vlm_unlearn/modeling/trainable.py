"""Selects trainable parameters (full, by layer and name, or LoRA) and summarizes them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from vlm_unlearn.config import TrainableConfig
from vlm_unlearn.errors import UserError, nearest, quoted
from vlm_unlearn.modeling.sine import add_sine
from vlm_unlearn.modeling.vlm import VisionLanguageModel


def prepare_trainable(vlm: VisionLanguageModel, config: TrainableConfig) -> VisionLanguageModel:
    """Freezes all parameters but those that `config` selects.

    Trainable parameters are converted to float32. Frozen parameters keep their precision.

    Args:
        vlm: The model, changed in place.
        config: The selection.

    Returns:
        The model, wrapped by PEFT with ``mode: lora`` and ``mode: qlora``.

    Raises:
        UserError: A layer is out of range, a name matches no parameter, or no parameter is trainable.
    """
    num_layers = len(vlm.decoder_layers)
    invalid_layers = [layer for layer in config.layers or [] if not 0 <= layer < num_layers]
    if invalid_layers:
        raise UserError(
            f"{invalid_layers} out of range. The model has decoder layers 0 to {num_layers - 1}.",
            code="out-of-range",
            field="trainable.layers",
        )
    if config.mode == "full":
        _select_parameters(vlm, config)
    else:
        vlm = vlm.with_model(_add_lora(vlm, config))
    for projector in vlm.projectors if config.projector else ():
        projector.float()  # includes the frozen weights that SineProject adds a sine to
        if config.projector == "sine":
            add_sine(projector)
    for parameter in vlm.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if not any(parameter.requires_grad for parameter in vlm.model.parameters()):
        raise UserError(
            f"no parameter is trainable: no parameter name contains any of {config.parameter_patterns}.",
            code="conflicting-settings",
            field="trainable",
        )
    return vlm


def _select_parameters(vlm: VisionLanguageModel, config: TrainableConfig) -> None:
    names = [name for name, _ in vlm.model.named_parameters()]
    for pattern in config.parameter_patterns or []:
        if not any(pattern in name for name in names):
            raise UserError(
                f"no parameter name contains {quoted(pattern)}{nearest(pattern, _short_names(names))}",
                code="unknown-name",
                field="trainable.parameter_patterns",
            )
    path = vlm.structure.layers
    layer_prefixes = None if config.layers is None else tuple(f"{path}.{layer}." for layer in config.layers)
    for name, parameter in vlm.model.named_parameters():
        component = vlm.component(name)
        if component == "vision tower":
            parameter.requires_grad = config.vision_tower
        elif component == "projector":
            parameter.requires_grad = bool(config.projector)
        else:
            in_layers = layer_prefixes is None or name.startswith(layer_prefixes)
            parameter.requires_grad = in_layers and (
                config.parameter_patterns is None or any(pattern in name for pattern in config.parameter_patterns)
            )


def without_lora_input_casts(model: nn.Module) -> AbstractContextManager[None]:
    """Keeps PEFT from converting inputs to the float32 of LoRA's weights for the duration of the block.

    Under autocast that conversion is undone at once. Results are the same without it.
    """
    if not hasattr(model, "peft_config"):
        return nullcontext()
    from peft.helpers import disable_input_dtype_casting

    context: AbstractContextManager[None] = disable_input_dtype_casting(model)
    return context


def _add_lora(vlm: VisionLanguageModel, config: TrainableConfig) -> Any:
    from peft import LoraConfig, get_peft_model

    if config.parameter_patterns is not None or config.vision_tower:
        raise UserError(
            f"parameter_patterns and vision_tower require mode=full. With mode={config.mode}, use "
            "trainable.lora.target_modules.",
            code="conflicting-settings",
            field="trainable",
        )
    path = vlm.structure.layers
    module_names = sorted(
        {name.rsplit(".", 1)[-1] for name, _ in vlm.model.named_modules() if name.startswith(f"{path}.")}
    )
    for target in config.lora.target_modules:
        if target not in module_names:
            raise UserError(
                f"no decoder layer contains {quoted(target)}{nearest(target, module_names)}",
                code="unknown-name",
                field="trainable.lora.target_modules",
            )
    targets = "|".join(re.escape(name) for name in config.lora.target_modules)
    layers = r"\d+" if config.layers is None else "|".join(map(str, config.layers))
    lora = LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.lora_alpha,
        lora_dropout=config.lora.lora_dropout,
        target_modules=rf"{re.escape(path)}\.({layers})\..*\.({targets})",
        # The projector has no adapter: all its weights are trained and saved next to the adapters.
        modules_to_save=_names_for_peft(vlm.structure.projectors) if config.projector else None,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(vlm.model, lora)
    except ValueError as error:
        raise UserError(
            str(error).splitlines()[0][:200], code="invalid-field", field="trainable.lora.target_modules"
        ) from None


def _short_names(names: Iterable[str]) -> list[str]:
    """Returns ``mlp.down_proj`` for ``model.language_model.layers.0.mlp.down_proj.weight``, without duplicates."""
    return sorted({".".join(name.split(".")[-3:-1]) for name in names})


def _names_for_peft(paths: Iterable[str]) -> list[str]:
    """Returns the names by which PEFT selects modules: the last component of a path, two for an item of a list."""
    return [".".join(path.split(".")[-2 if path.rpartition(".")[2].isdigit() else -1 :]) for path in paths]


def trainable_table(vlm: VisionLanguageModel) -> list[tuple[str, int, int]]:
    """Returns ``(component, trainable parameters, all parameters)`` of each component of the model.

    The components are the vision tower, the projector, the language model and the adapters.
    """
    counts = {"vision tower": [0, 0], "projector": [0, 0], "language model": [0, 0], "adapters": [0, 0]}
    for name, parameter in vlm.base_model.named_parameters():
        if ".original_module." in name:  # the frozen copy that PEFT keeps of a module in `modules_to_save`
            continue
        if ".parametrizations." in name and name.endswith(".original"):  # the frozen weight of SineProject
            continue
        component = "adapters" if ".lora_" in name else vlm.component(name)
        counts[component][0] += parameter.numel() if parameter.requires_grad else 0
        counts[component][1] += parameter.numel()
    return [(component, trainable, total) for component, (trainable, total) in counts.items()]
