"""The module layout of each model family: the paths of its decoder layers, projector and vision tower."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from vlm_unlearn.errors import UserError, nearest, quoted


@dataclass(frozen=True)
class Layout:
    """Dotted module paths inside a model that ``AutoModelForImageTextToText`` loads.

    Prefix sharing (see `vlm_unlearn.modeling.packing` and `vlm_unlearn.generation.sharing`) requires that the family
    accepts position ids and that its attention accepts a custom mask.
    """

    layers: str  # the ModuleList of decoder layers
    projector: str
    vision_tower: str
    supports_prefix_sharing: bool = False


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
    """Returns the layout of a model's family (``config.model_type``).

    Raises:
        UserError: The family is not supported.
    """
    family = str(getattr(getattr(model, "config", None), "model_type", ""))
    if family not in LAYOUTS:
        raise UserError(
            f"model family {quoted(family)} is not supported{nearest(family, LAYOUTS) or '.'} Use one of "
            f"{', '.join(sorted(LAYOUTS))}, or add the family to modeling/layout.py.",
            code="unsupported-family",
        )
    return LAYOUTS[family]


def get_base_model(model: nn.Module) -> nn.Module:
    """Returns the model inside PEFT's wrapper, or the model itself. Adapters stay in place."""
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Returns the decoder layers of the language model, from first to last."""
    inner = get_base_model(model)
    layers = inner.get_submodule(layout_of(inner).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def vision_tower(model: nn.Module) -> nn.Module:
    """Returns the vision tower. In some families it contains the projector."""
    inner = get_base_model(model)
    return inner.get_submodule(layout_of(inner).vision_tower)


def is_vision(name: str, layout: Layout) -> bool:
    """Returns whether a parameter belongs to the vision tower but not to a projector inside it."""
    return name.startswith(layout.vision_tower + ".") and not is_projector(name, layout)


def is_projector(name: str, layout: Layout) -> bool:
    """Returns whether a parameter belongs to the multimodal projector."""
    return name.startswith(layout.projector + ".")
