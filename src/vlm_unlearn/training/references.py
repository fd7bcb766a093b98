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

from vlm_unlearn.errors import RequestError
from vlm_unlearn.methods import Need, ReferenceNLL
from vlm_unlearn.records import Example
from vlm_unlearn.store import build_once, read_json, write_json

Source = Literal["cache", "adapter", "copy"]


class ReferenceModel(Protocol):
    """Gives the model as it was before training."""

    def active(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """Within the block, the yielded module computes reference values, without gradient and without dropout."""


def choose_source(wanted: Literal["auto", "cache", "adapter", "copy"], needs: Sequence[Need], lora: bool) -> Source | None:
    """The source that costs least memory, or the one asked for; None when the method needs no reference.

    Raises:
        RequestError: the source asked for can't give what the method needs.
    """
    if not needs:
        return None
    only_nll = all(isinstance(need, ReferenceNLL) for need in needs)
    if wanted == "auto":
        return "cache" if only_nll else "adapter" if lora else "copy"
    if wanted == "cache" and not only_nll:
        raise RequestError("reference: cache holds one NLL a sample, and this method needs hidden states; use reference=auto")
    if wanted == "adapter" and not lora:
        raise RequestError("reference: adapter needs trainable.mode=lora; use reference=auto")
    return wanted


class AdapterReference:
    """The base model under disabled adapters."""

    @contextmanager
    def active(self, model: nn.Module) -> Iterator[nn.Module]:
        inner: Any = getattr(model, "module", model)
        with _as_reference(inner), inner.disable_adapter():
            yield inner


class CopyReference:
    """Frozen copies of the parameters that train, swapped in for the reference pass."""

    def __init__(self, model: nn.Module) -> None:
        self._frozen = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}

    @contextmanager
    def active(self, model: nn.Module) -> Iterator[nn.Module]:
        inner: nn.Module = getattr(model, "module", model)
        with _as_reference(inner):
            yield _Swapped(inner, self._frozen)


class _Swapped(nn.Module):
    def __init__(self, model: nn.Module, parameters: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._call: Callable[..., Any] = lambda **inputs: torch.func.functional_call(model, parameters, kwargs=inputs)

    def forward(self, **inputs: Any) -> Any:
        return self._call(**inputs)


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
    file: Path, examples: Sequence[Example], compute: Callable[[Sequence[Example]], list[tuple[float, int]]], batch_size: int
) -> dict[str, tuple[float, int]]:
    """Reference ``id -> (nll sum, tokens)``, read from `file` or computed with `compute` and written there.

    `file` must be named by a digest of everything the values depend on.
    """
    with build_once(file.with_suffix("")) as scratch:
        if scratch is not None:
            values: list[list[object]] = []
            for start in range(0, len(examples), batch_size):
                part = examples[start : start + batch_size]
                values += [[example.id, *pair] for example, pair in zip(part, compute(part), strict=True)]
            write_json(scratch / file.name, values)
    return {str(id): (float(nll), int(tokens)) for id, nll, tokens in read_json(file.with_suffix("") / file.name)}
