"""Finds the components of a model: its decoder layers, projectors and vision modules.

Only this file and plug-ins know model families by name. The components of most families are found through the
interface of transformers (`get_decoder`, `get_encoder`), so that a family that is not named here can be trained too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from vlm_unlearn import plugins
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.plugins import Registry

Component = Literal["vision tower", "projector", "language model"]

# Families whose position ids and attention masks prefix sharing reproduces. Each has tests of equal losses, gradients
# and answers (tests/modeling/test_packing.py, tests/generation/test_sharing.py).
PREFIX_SHARING_FAMILIES = frozenset(
    {
        *("llava", "llava_next", "llava_onevision", "mistral3"),
        *("qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
        *("idefics3", "smolvlm", "internvl"),
    }
)
# Families for which no implementation could share an image with equal results, with the reason.
NEVER_SHARED_FAMILIES = {
    "gemma3": "the tokens of an image attend to each other in both directions",
    "instructblip": "the Q-Former reads the question, so that the tokens of an image depend on it",
    "mllama": "an image is not a part of the sequence, decoder layers attend to it separately",
    "paligemma": "the tokens of an image attend to the question",
}
# A projector, between vision tower and language model, contains one of these words in its name.
PROJECTOR_WORDS = ("proj", "connector", "merger", "aligner", "adapter", "resampler")


@dataclass(frozen=True)
class Structure:
    """Dotted module paths inside a model that ``AutoModelForImageTextToText`` loads."""

    layers: str  # the ModuleList of decoder layers
    projectors: tuple[str, ...]  # the modules between vision tower and language model
    vision: tuple[str, ...]  # the vision tower, and others that are frozen with it: a Q-Former, its query tokens

    @property
    def vision_tower(self) -> str:
        """The path of the module that encodes images. In some families it contains the projectors."""
        return self.vision[0]

    def component(self, name: str) -> Component:
        """Returns the component to which a parameter belongs, by its name."""
        if name.startswith(tuple(f"{path}." for path in self.projectors)):
            return "projector"
        is_vision = name in self.vision or name.startswith(tuple(f"{path}." for path in self.vision))
        return "vision tower" if is_vision else "language model"


@dataclass(frozen=True)
class Family:
    """A model family that a plug-in describes. Its name is transformers' `model_type`.

    Attributes:
        structure: Returns the components of a model. None finds them as for other families.
        supports_prefix_sharing: Whether prefix sharing gives equal losses for this family.
    """

    structure: Callable[[nn.Module], Structure] | None = None
    supports_prefix_sharing: bool = False


FAMILIES: Registry[Family] = plugins.FAMILIES


def described_family(name: str) -> Family:
    """Returns the description of a family: that of a plug-in, or else the default.

    Raises:
        UserError: The plug-in is broken, or not a `Family`.
    """
    family: object = FAMILIES[name] if name in FAMILIES else Family(None, name in PREFIX_SHARING_FAMILIES)
    if not isinstance(family, Family):
        raise plugins.invalid_plugin("family", name, family, "a Family")
    return family


def family_of(model: nn.Module) -> str:
    """Returns transformers' name of a model's family, such as ``llava``."""
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def find_structure(model: nn.Module) -> Structure:
    """Finds the components of a model.

    Args:
        model: A model of transformers, not wrapped by PEFT.

    Raises:
        UserError: A component is not found, or the language model is not a decoder.
    """
    family = family_of(model)
    description = described_family(family)
    if description.structure is not None:
        return description.structure(model)
    if not hasattr(model, "get_decoder") or not hasattr(model, "get_encoder"):
        raise _not_found(family, "it is not an image-text-to-text model of transformers")
    config: Any = model.config
    if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
        raise _not_found(family, "its language model has an encoder, and losses are defined for decoders only")
    paths = {id(module): name for name, module in model.named_modules()}
    tower = paths.get(id(model.get_encoder(modality="image")), "")  # type: ignore[operator]
    if not tower:
        raise _not_found(family, "the vision tower was not found (get_encoder)")
    decoder = paths.get(id(model.get_decoder()), "")  # type: ignore[operator]
    if not decoder or f"{decoder}.".startswith(f"{tower}."):
        raise _not_found(family, "the language model was not found (get_decoder)")
    layer_lists = [
        f"{decoder}.{name}"
        for name, module in model.get_submodule(decoder).named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    if not layer_lists:
        raise _not_found(family, f"{decoder} has no list of decoder layers")
    layers = min(layer_lists, key=lambda path: path.count("."))  # lists inside a layer, such as experts, are deeper
    # Next to the vision tower are the language model, projectors, and other modules such as a Q-Former.
    parent = tower.rpartition(".")[0]
    neighbors = [f"{parent}.{name}".lstrip(".") for name, _ in model.get_submodule(parent).named_children()]
    heads = {paths.get(id(model.get_output_embeddings())), paths.get(id(model.get_input_embeddings()))}  # type: ignore[operator]
    neighbors = [path for path in neighbors if path not in heads and not f"{decoder}.".startswith(f"{path}.")]
    projectors = [path for path in neighbors if _is_named_projector(path)]
    vision = [tower, *(path for path in neighbors if path != tower and path not in projectors)]
    if len(vision) > 1:  # parameters next to a Q-Former are its inputs
        vision += [
            f"{parent}.{name}".lstrip(".") for name, _ in model.get_submodule(parent).named_parameters(recurse=False)
        ]
    if not projectors:
        inside = [f"{tower}.{name}" for name, _ in model.get_submodule(tower).named_children()]
        projectors = [path for path in inside if _is_named_projector(path)]
    if not projectors:
        raise _not_found(family, f"no projector was found next to or inside the vision tower {tower}")
    return Structure(layers, tuple(item for path in projectors for item in _items_of_list(model, path)), tuple(vision))


def _is_named_projector(path: str) -> bool:
    return any(word in path.rpartition(".")[2] for word in PROJECTOR_WORDS)


def _items_of_list(model: nn.Module, path: str) -> list[str]:
    """Returns the paths of a ModuleList's items, since PEFT cannot wrap the list itself, or the path of the module."""
    module = model.get_submodule(path)
    return [f"{path}.{index}" for index in range(len(module))] if isinstance(module, nn.ModuleList) else [path]


def _not_found(family: str, reason: str) -> UserError:
    return UserError(
        f"models of the family {quoted(family)} cannot be trained: {reason}. docs/extend/family.md tells how to add "
        "a family.",
        code="unsupported-family",
    )


def get_base_model(model: nn.Module) -> Any:
    """Returns the model inside PEFT's wrapper, or the model itself. Adapters stay in place."""
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model
