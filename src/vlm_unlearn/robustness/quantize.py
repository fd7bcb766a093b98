"""Quantization: whether fewer bits for each weight bring the forgotten knowledge back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vlm_unlearn.config import Strict
from vlm_unlearn.config.base import Positive
from vlm_unlearn.errors import UserError
from vlm_unlearn.robustness.base import AttackedState, AttackTarget, ModelAttack, register

Format = Literal["int8", "int4", "nf4"]
FORMATS: tuple[Format, ...] = ("int8", "int4", "nf4")
# The levels of NF4 (Dettmers et al. 2023, arXiv 2305.14314, appendix E).
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
NF4_BLOCK = 64


class QuantizeOptions(Strict):
    """Options of the attack `quantize`."""

    formats: Annotated[list[Format], Field(min_length=1, default_factory=lambda: list[Format](("int8", "int4", "nf4")))]
    """The number formats. Each is one state.

    ``int8`` has one scale for each output channel, ``int4`` one for each group of `group_size` weights, and ``nf4`` one
    for each block of 64 weights.
    """
    group_size: Annotated[Positive, Field(le=128)] = 128
    """Weights of an output channel that share a scale in ``int4``. A shorter channel is one group."""
    implementation: Literal["auto", "torch", "bitsandbytes"] = "auto"
    """The implementation of ``nf4``. ``auto`` takes bitsandbytes on a GPU if it is installed, and torch otherwise.

    Both give the same values. The other formats always use torch.
    """


@register("quantize")
class Quantize(ModelAttack):
    """Rounds the weights of the language model's linear layers to the nearest values of a smaller format.

    Unlearning changes weights so little that many of them round to the values of the base model, and 4 bits can bring
    most of the forgotten knowledge back (Zhang et al. 2024, arXiv 2410.16454). The weights keep their dtype, and only
    their values are rounded: results are those of a quantized model that computes in that dtype. The fact
    ``changed_buckets`` is the share of weights whose rounded value has another number than that of the base model. Its
    control is the base model after the same attack, which shows how much of a change comes from the rounding itself.
    """

    options_type = QuantizeOptions
    changes_weights = True
    uses_base = True

    def run(self, target: AttackTarget) -> Iterator[AttackedState]:
        """Yields the model in each format."""
        options: QuantizeOptions = self.options
        layers = target.vlm.decoder_linears()
        formats = list(dict.fromkeys(options.formats))
        shares = _changed_buckets(layers, target.load_base().decoder_linears(), formats, options.group_size)
        originals = {name: layer.weight.detach().cpu().clone() for name, layer in layers.items()}
        for number_format in formats:
            for name, layer in layers.items():
                weight = originals[name].to(layer.weight.device)
                layer.weight.data.copy_(_rounded(weight, number_format, options))
            facts = {"changed_buckets": shares[number_format]}
            yield AttackedState(f"quantize/{number_format}", facts=facts)


def _changed_buckets(
    layers: Mapping[str, nn.Linear], base: Mapping[str, nn.Linear], formats: list[Format], group_size: int
) -> dict[Format, float]:
    """Returns for each format the share of weights whose bucket differs from that of the base model."""
    if layers.keys() != base.keys():
        raise UserError(
            "the base model has other linear layers than the model. Pass the base model that it was trained from.",
            code="model-mismatch",
            field="base",
        )
    changed = dict.fromkeys(formats, 0)
    for name, layer in layers.items():
        for number_format in formats:
            of_model, of_base = (
                buckets(weight.detach(), number_format, group_size)[0] for weight in (layer.weight, base[name].weight)
            )
            changed[number_format] += int((of_model != of_base).sum())
    count = sum(layer.weight.numel() for layer in layers.values())
    return {number_format: changed[number_format] / count for number_format in formats}


def _rounded(weight: Tensor, number_format: Format, options: QuantizeOptions) -> Tensor:
    usable = weight.is_cuda and find_spec("bitsandbytes") is not None
    if number_format == "nf4" and (
        options.implementation == "bitsandbytes" or (options.implementation == "auto" and usable)
    ):
        return round_with_bitsandbytes(weight)
    return dequantize(*buckets(weight, number_format, options.group_size), number_format, weight)


def buckets(weight: Tensor, number_format: Format, group_size: int = 128) -> tuple[Tensor, Tensor]:
    """Quantizes a weight to the nearest values, symmetrically around zero.

    Args:
        weight: [O, I], the weight of a linear layer.
        number_format: The format.
        group_size: The weights that share a scale in ``int4``.

    Returns:
        The number of each weight's bucket [groups, size], and the scales [groups, 1]. The last group of a channel, or
        the last block of the weight, is padded with zeros.
    """
    groups = _groups(weight.float(), number_format, group_size)
    largest = groups.abs().amax(dim=1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)  # a group of zeros stays a group of zeros
    if number_format == "nf4":
        levels = torch.tensor(NF4_LEVELS, device=weight.device)
        return torch.bucketize(groups / largest, (levels[1:] + levels[:-1]) / 2).to(torch.int8), largest
    scale = largest / (127 if number_format == "int8" else 7)
    return (groups / scale).round().to(torch.int8), scale


def dequantize(codes: Tensor, scale: Tensor, number_format: Format, like: Tensor) -> Tensor:
    """Returns the values of `buckets`, in the shape and dtype of the weight `like` [O, I]."""
    if number_format == "nf4":
        values = torch.tensor(NF4_LEVELS, device=codes.device)[codes.int()] * scale
        return values.flatten()[: like.numel()].view_as(like).to(like.dtype)
    return (codes * scale).view(like.shape[0], -1)[:, : like.shape[1]].to(like.dtype)


def _groups(weight: Tensor, number_format: Format, group_size: int) -> Tensor:
    """Divides a weight into the groups that share a scale: output channels, parts of them, or blocks of the rows."""
    if number_format == "int8":
        return weight
    rows = weight.flatten()[None] if number_format == "nf4" else weight
    size = NF4_BLOCK if number_format == "nf4" else min(group_size, weight.shape[1])
    return nn.functional.pad(rows, (0, -rows.shape[1] % size)).reshape(-1, size)


def round_with_bitsandbytes(weight: Tensor) -> Tensor:
    """Returns a weight in NF4 as bitsandbytes rounds it, in its own dtype.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "bitsandbytes is not installed. Install vlm-unlearn[quantization], or set implementation=torch.",
            code="missing-package",
            field="implementation",
        )
    module: Any = import_module("bitsandbytes.functional")
    codes, state = module.quantize_4bit(weight.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
    values: Tensor = module.dequantize_4bit(codes, state)
    return values
