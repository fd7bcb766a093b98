"""Where values of the model as it was before training come from, without holding a second model where that can be helped.

`cache`: each sample's answer NLL is computed once before training and kept on disk. `adapter`: the model with its LoRA
adapters disabled. `copy`: a frozen copy of the *trained* parameters only; the frozen ones are shared with the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from vlm_unlearn.errors import UserError
from vlm_unlearn.methods import ReferenceLogits, ReferenceNLL, ReferenceRequirement
from vlm_unlearn.records import Example
from vlm_unlearn.store import build_atomically, digest_json, read_json, write_json

ReferenceStrategy = Literal["cache", "adapter", "copy"]


class ReferenceModel(Protocol):
    """Gives the model as it was before training."""

    def active(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """Within the block, the yielded module computes reference values, without gradient and without dropout."""


def resolve_reference_strategy(
    wanted: Literal["auto", "cache", "adapter", "copy"], needs: Sequence[ReferenceRequirement], lora: bool
) -> ReferenceStrategy | None:
    """The source that costs least memory, or the one asked for; None when the method needs no reference.

    Raises:
        UserError: the source asked for can't give what the method needs.
    """
    if not needs:
        return None
    only_nll = all(isinstance(need, ReferenceNLL) for need in needs)
    if wanted == "auto":
        return "cache" if only_nll else "adapter" if lora else "copy"
    if wanted == "cache" and not only_nll:
        what = "logits" if any(isinstance(need, ReferenceLogits) for need in needs) else "hidden states"
        raise UserError(f"reference: cache holds one NLL a sample, and this method needs {what}; use reference=auto")
    if wanted == "adapter" and not lora:
        raise UserError("reference: adapter needs trainable.mode=lora; use reference=auto")
    return wanted


class AdapterReference:
    """The base model under disabled adapters."""

    @contextmanager
    def active(self, model: nn.Module) -> Iterator[nn.Module]:
        inner: Any = getattr(model, "module", model)
        trains = {parameter: parameter.requires_grad for parameter in inner.parameters()}
        with _as_reference(inner):
            try:
                with inner.disable_adapter():
                    yield inner
            finally:  # PEFT makes all of a module that it trains whole trainable again, what a sine is added to included
                for parameter, trained in trains.items():
                    parameter.requires_grad_(trained)


class CopyReference:
    """Frozen copies of the parameters that train, exchanged with their values for the reference pass.

    Each process holds copies of its own shards only, where FSDP2 has cut the parameters up.
    """

    def __init__(self, model: nn.Module) -> None:
        self._frozen = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
        self._cut = False

    @contextmanager
    def active(self, model: nn.Module) -> Iterator[nn.Module]:
        inner: nn.Module = getattr(model, "module", model)
        trained = {name: value for name, value in inner.named_parameters() if value.requires_grad}
        if not self._cut:
            self._frozen = {name: _shard_like(value, trained[name]) for name, value in self._frozen.items()}
            self._cut = True
        with _as_reference(inner):
            self._swap_parameters(trained)
            try:
                yield inner
            finally:
                self._swap_parameters(trained)

    def _swap_parameters(self, trained: dict[str, nn.Parameter]) -> None:
        for name, parameter in trained.items():
            # Through `data`: the values are back before the backward pass, which must not see that they were away.
            values, frozen = _local_shard(parameter.data), self._frozen[name]
            held = values.clone()
            values.copy_(frozen)
            frozen.copy_(held)
        torch.clear_autocast_cache()  # bf16 twins of the other values


def _local_shard(tensor: torch.Tensor) -> torch.Tensor:
    local = getattr(tensor, "to_local", None)
    return local() if callable(local) else tensor


def _shard_like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of `value`, cut as the parameter is."""
    if not hasattr(parameter, "device_mesh"):
        return value.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    placed: Any = parameter
    return _local_shard(distribute_tensor(value.to(parameter.device), placed.device_mesh, placed.placements)).clone()


@contextmanager
def _as_reference(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def cached_nll(
    file: Path,
    examples: Sequence[Example],
    compute: Callable[[Sequence[Example]], list[tuple[float, int]]],
    batch_size: int,
    on_done: Callable[[int, int], None] | None = None,
) -> dict[str, tuple[float, int]]:
    """Reference ``key -> (nll sum, tokens)``, read from `file` or computed with `compute` and written there.

    `file` must be named by a digest of everything the values depend on.

    Args:
        on_done: told of each batch computed: examples done, examples in all.
    """
    with build_atomically(file.with_suffix("")) as scratch:
        if scratch is not None:
            values: list[list[object]] = []
            for start in range(0, len(examples), batch_size):
                part = examples[start : start + batch_size]
                values += [[answer_key(example), *pair] for example, pair in zip(part, compute(part), strict=True)]
                if on_done:
                    on_done(len(values), len(examples))
            write_json(scratch / file.name, values)
    try:
        found = {
            str(key): (float(nll), int(tokens)) for key, nll, tokens in read_json(file.with_suffix("") / file.name)
        }
    except (UserError, TypeError, ValueError):
        found = {}
    if not found.keys() >= {answer_key(example) for example in examples}:
        raise UserError(
            f"{file.with_suffix('')}: reference values are damaged; delete this folder, they are made again"
        )
    return found


def answer_key(example: Example) -> str:
    """Names an example with the answer it is given: a method may draw another one at each turn."""
    return digest_json([example.id, example.answer])
