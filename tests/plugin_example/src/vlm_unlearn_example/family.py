"""A model family, by transformers' name of it."""

from __future__ import annotations

from torch import nn

from vlm_unlearn.modeling.structure import Family, Structure


def structure(model: nn.Module) -> Structure:
    """Returns the components of a model."""
    return Structure(layers="decoder.blocks", projectors=("bridge",), vision=("eye",))


EXAMPLE_VLM = Family(structure)
