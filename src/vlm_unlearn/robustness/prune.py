"""Pruning: whether the model answers again if many of its weights are zero."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vlm_unlearn.config import Strict
from vlm_unlearn.config.base import Positive
from vlm_unlearn.data.encoding import Turn, encode, move
from vlm_unlearn.errors import UserError
from vlm_unlearn.generation.base import evenly_spaced
from vlm_unlearn.robustness.base import AttackedState, AttackTarget, ModelAttack, register


class PruneOptions(Strict):
    """Options of the attack `prune`."""

    criterion: Literal["magnitude", "wanda"] = "magnitude"
    """Which weights are removed: the smallest of each layer, or those whose product with the norm of their input is
    smallest for each output (Wanda)."""
    sparsities: Annotated[
        list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1, default_factory=lambda: [0.1, 0.2, 0.3, 0.5])
    ]
    """Shares of the weights that are removed. Each is one state."""
    calibration_examples: Positive = 128
    """Number of examples of the retain set that determine the norms of the inputs. Only Wanda uses them."""
    batch_size: Positive = 16
    """Examples per batch."""


@register("prune")
class Prune(ModelAttack):
    """Sets the least important weights of the language model's linear layers to zero.

    Small weights can carry what training added last, such as refusals (Wei et al. 2024, arXiv 2402.05162). The criteria
    are the magnitude (Han et al. 2015, arXiv 1506.02626) and that of Wanda (Sun et al. 2024, arXiv 2306.11695). Here,
    all norms are those of the dense model, and the calibration data are the retain set. The control is the base model
    with the same sparsity, which shows what pruning itself destroys.
    """

    options_type = PruneOptions
    changes_weights = True

    def run(self, target: AttackTarget) -> Iterator[AttackedState]:
        """Yields the model at each sparsity, in ascending order."""
        options: PruneOptions = self.options
        layers = target.vlm.decoder_linears()
        curve = "prune" if options.criterion == "magnitude" else "prune/wanda"
        norms: Mapping[str, Tensor] = {}
        if options.criterion == "wanda":
            norms = _input_norms(target, layers, options)
        for sparsity in sorted(set(options.sparsities)):
            # The weights of the previous sparsity are zero, and therefore among the smallest again.
            for name, layer in layers.items():
                prune(layer.weight.data, sparsity, norms.get(name))
            yield AttackedState(f"{curve}/{sparsity:g}", curve=curve, step=sparsity)


def prune(weight: Tensor, sparsity: float, input_norms: Tensor | None = None) -> None:
    """Sets the smallest weights to zero, in place.

    Args:
        weight: [O, I], the weight of a linear layer.
        sparsity: The share of weights that are zero afterwards, rounded down to a number of weights.
        input_norms: [I], the norm of each input for Wanda, which compares the weights of each output. None compares
            the magnitudes of all weights.
    """
    magnitudes = weight.float().abs()
    rows = magnitudes.flatten()[None] if input_norms is None else magnitudes * input_norms
    count = int(sparsity * rows.shape[1])
    mask = torch.zeros_like(rows, dtype=torch.bool)
    mask.scatter_(1, rows.topk(count, largest=False).indices, True)
    weight.masked_fill_(mask.view_as(weight), 0)


def _input_norms(target: AttackTarget, layers: Mapping[str, nn.Linear], options: PruneOptions) -> dict[str, Tensor]:
    """Returns the norm of each input of each layer, over all tokens of the calibration examples."""
    examples = evenly_spaced(target.examples("retain"), options.calibration_examples)
    if not examples:
        raise UserError("the training set has no retain set for Wanda.", code="no-records", field="data")
    turns = [Turn.of_example(example, target.image(example)) for example in examples]
    vlm = target.vlm
    squares: dict[str, Tensor] = {}
    mask = torch.empty(0)

    def add(name: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # Experts get selected tokens without their rows, none of which is padding that a mask could remove.
        states = inputs[0]
        states = states[mask] if states.shape[:-1] == mask.shape else states.flatten(0, -2)
        total = states.float().square().sum(0)
        squares[name] = squares[name] + total if name in squares else total

    handles = [layer.register_forward_pre_hook(partial(add, name)) for name, layer in layers.items()]
    try:
        for start in range(0, len(turns), options.batch_size):
            batch = encode(vlm.processor, turns[start : start + options.batch_size], "right")
            mask = batch["attention_mask"].bool().to(vlm.model.device)
            with torch.no_grad():
                vlm.model(**move(batch, vlm.model.device, vlm.model.dtype), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total.sqrt() for name, total in squares.items()}
