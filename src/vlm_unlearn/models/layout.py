"""Where a model family keeps its decoder layers, projector and vision tower: the only place that knows families."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from vlm_unlearn.errors import UserError, nearest


@dataclass(frozen=True)
class Layout:
    """Dotted module paths inside the model that AutoModelForImageTextToText gives."""

    layers: str  # the ModuleList of decoder layers
    projector: str
    vision_tower: str
    supports_prefix_sharing: bool = False  # whether questions on one image can share it: attention takes a mask of ours and positions are ours to give


LAYOUTS = {
    "llava": Layout(
        "model.language_model.layers", "model.multi_modal_projector", "model.vision_tower", supports_prefix_sharing=True
    ),
    "llava_next": Layout(
        "model.language_model.layers", "model.multi_modal_projector", "model.vision_tower", supports_prefix_sharing=True
    ),
    "qwen2_5_vl": Layout(
        "model.language_model.layers", "model.visual.merger", "model.visual", supports_prefix_sharing=True
    ),
    "mllama": Layout("model.language_model.layers", "model.multi_modal_projector", "model.vision_model"),
    "idefics3": Layout("model.text_model.layers", "model.connector", "model.vision_model"),
    "smolvlm": Layout("model.text_model.layers", "model.connector", "model.vision_model"),
    "gemma3": Layout("model.language_model.layers", "model.multi_modal_projector", "model.vision_tower"),
    "internvl": Layout("model.language_model.layers", "model.multi_modal_projector", "model.vision_tower"),
}


def layout_of(model: nn.Module) -> Layout:
    """The layout of a model's family (``config.model_type``).

    Raises:
        UserError: the family is not known yet.
    """
    family = str(getattr(getattr(model, "config", None), "model_type", ""))
    if family not in LAYOUTS:
        known = ", ".join(sorted(LAYOUTS))
        raise UserError(
            f'model family "{family}" is not known ({known}){nearest(family, LAYOUTS)}; add it to models/layout.py'
        )
    return LAYOUTS[family]


def get_base_model(model: nn.Module) -> nn.Module:
    """The model inside PEFT's wrapper, if there is one (adapters stay in place)."""
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of the language model, first to last."""
    inner = get_base_model(model)
    layers = inner.get_submodule(layout_of(inner).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def vision_tower(model: nn.Module) -> nn.Module:
    """The vision tower; in some families the projector is a part of it."""
    inner = get_base_model(model)
    return inner.get_submodule(layout_of(inner).vision_tower)


def is_vision(name: str, layout: Layout) -> bool:
    """Whether a parameter belongs to the vision tower (the projector does not, even where it lies inside)."""
    return name.startswith(layout.vision_tower + ".") and not is_projector(name, layout)


def is_projector(name: str, layout: Layout) -> bool:
    """Whether a parameter belongs to the multimodal projector."""
    return name.startswith(layout.projector + ".")
