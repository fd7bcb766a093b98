"""Partial restoration: whether parts of the base model's weights bring the forgotten knowledge back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from vlm_unlearn.config import Strict
from vlm_unlearn.errors import UserError
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.robustness.base import AttackedState, AttackTarget, ModelAttack, register

_LAYERS = re.compile(r"layers_(\d+)(?:-(\d+))?")
DEFAULT_PARTS = ("projector", "embeddings", "lm_head", "layers")
_NAMES = ("projector", "vision_tower", "embeddings", "lm_head", "layers", "quarters")


def _valid_part(part: str) -> str:
    match = _LAYERS.fullmatch(part)
    if part not in _NAMES and match is None:
        raise ValueError(f"must be one of {', '.join(_NAMES)}, layers_N or layers_M-N")
    if match is not None and match[2] is not None and int(match[2]) < int(match[1]):
        raise ValueError("the last layer of a range is before its first")
    return part


class RestoreOptions(Strict):
    """Options of the attack `restore`."""

    parts: Annotated[list[Annotated[str, AfterValidator(_valid_part)]], Field(default_factory=lambda: [*DEFAULT_PARTS])]
    """The parts that are put back, each alone.

    ``projector``, ``vision_tower``, ``embeddings`` and ``lm_head`` are components. ``layers`` stands for each decoder
    layer alone, ``quarters`` for four ranges of equal size, ``layers_3`` for one layer, and ``layers_0-7`` for a range
    with both ends.
    """
    mix: Annotated[list[Annotated[float, Field(ge=-4, le=1)]], Field(default_factory=lambda: [0.25, 0.5, 0.75])]
    """Shares of the base model in a mixture of all weights: 0 is the unlearned model, and 1 the base model.

    Negative shares go beyond the unlearned model, away from the base model.
    """


@register("restore")
class Restore(ModelAttack):
    """Puts parts of the model back to the weights of the base model, or mixes the weights of both.

    Unlearning that changes one component only to suppress answers leaves the knowledge in the others. Putting parts
    back locates the change, as Hong et al. 2024 do (arXiv 2410.06606). Mixtures of all weights are linear
    interpolations as in Ilharco et al. 2023 (arXiv 2212.04089).

    The base model's weights contain the knowledge, so that a part of them may bring it into any model. The control is
    the model that never knew with the same parts. Where it answers too, nothing was recovered.
    """

    options_type = RestoreOptions
    changes_weights = True
    uses_base = True

    def run(self, target: AttackTarget) -> Iterator[AttackedState]:
        """Yields the model with each part put back, and each mixture."""
        options: RestoreOptions = self.options
        mixer = _Mixer(target.vlm, target.load_base())
        for part in _single_parts(options.parts, len(target.vlm.decoder_layers)):
            names = _parameter_names(target.vlm, part)
            mixer.mix(names, 1.0)
            changed = mixer.changed_weights(names)
            yield AttackedState(f"restore/{part}", facts={"changed_weights": changed})
            mixer.mix(names, 0.0)
        for share in sorted(set(options.mix)):
            mixer.mix(mixer.names, share)
            yield AttackedState(f"restore/mix/{share:g}", curve="restore/mix", step=share)


def _single_parts(parts: Sequence[str], num_layers: int) -> list[str]:
    """Returns the parts with ``layers`` and ``quarters`` replaced. Raises a `UserError` if a layer does not exist."""
    single: list[str] = []
    for part in parts:
        if part == "layers":
            single += [f"layers_{layer}" for layer in range(num_layers)]
        elif part == "quarters":
            ends = sorted({quarter * num_layers // 4 for quarter in range(5)})
            single += [f"layers_{first}-{end - 1}" for first, end in pairwise(ends)]
        else:
            single.append(part)
    for part in single:
        match = _LAYERS.fullmatch(part)
        if match is not None and int(match[2] or match[1]) >= num_layers:
            raise UserError(
                f"{part} is out of range. The model has decoder layers 0 to {num_layers - 1}.",
                code="out-of-range",
                field="parts",
            )
    return list(dict.fromkeys(single))


def _parameter_names(vlm: VisionLanguageModel, part: str) -> list[str]:
    """Returns the names of the parameters of a part. Tied weights have the name of the embeddings."""
    model = vlm.base_model
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    match = _LAYERS.fullmatch(part)
    if match is not None:
        first, last = int(match[1]), int(match[2] or match[1])
        modules = list(vlm.decoder_layers[first : last + 1])
    elif part == "embeddings":
        modules = [model.get_input_embeddings()]
    elif part == "lm_head":
        modules = [model.get_output_embeddings()]
    else:
        component = part.replace("_", " ")
        return [name for name in names.values() if vlm.component(name) == component]
    return [names[id(parameter)] for module in modules for parameter in module.parameters()]


class _Mixer:
    """Mixes the parameters of a model with those of its base model, in place.

    Args:
        vlm: The model.
        base: The base model, which moves to the CPU.

    Attributes:
        names: The names of the parameters that differ between both models.
    """

    def __init__(self, vlm: VisionLanguageModel, base: VisionLanguageModel) -> None:
        self._parameters = dict(vlm.base_model.named_parameters())
        self._base: dict[str, Tensor] = dict(base.base_model.cpu().named_parameters())
        shapes, base_shapes = (
            {name: tensor.shape for name, tensor in tensors.items()} for tensors in (self._parameters, self._base)
        )
        if shapes != base_shapes:
            raise UserError(
                "the weights of the base model have other names or shapes than the model's. Pass the base model that "
                "it was trained from.",
                code="model-mismatch",
                field="base",
            )
        # Only parameters that differ are copied, so that frozen components take no memory.
        self._originals = {
            name: parameter.detach().cpu().clone()
            for name, parameter in self._parameters.items()
            if not torch.equal(parameter.detach().cpu(), self._base[name])
        }
        self.names = list(self._originals)

    def mix(self, names: Iterable[str], share: float) -> None:
        """Sets parameters to mixtures with this share of the base model. 0 and 1 are exact."""
        for name in names:
            if name not in self._originals:
                continue
            original, base = self._originals[name], self._base[name].detach()
            mixture = base if share == 1 else torch.lerp(original.float(), base.float(), share)
            self._parameters[name].data.copy_(mixture)

    def changed_weights(self, names: Iterable[str]) -> float:
        """Returns the share of a part's weights that differ between both models."""
        changed = total = 0
        for name in names:
            total += self._base[name].numel()
            if name in self._originals:
                changed += int((self._originals[name] != self._base[name]).sum())
        return changed / total if total else 0.0
