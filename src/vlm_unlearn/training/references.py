"""The reference model, which has the weights from before training, without a second model in memory.

There are three strategies, with equal results:

- ``cache``: computes each sample's answer NLL once before training and stores it on disk.
- ``adapter``: disables the LoRA adapters of the model in training.
- ``copy``: keeps a frozen copy of the trainable parameters. The frozen parameters are shared with the model in
  training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from vlm_unlearn.data.encoding import Batch
from vlm_unlearn.errors import UserError
from vlm_unlearn.methods import ReferenceLogits, ReferenceNLL, ReferenceRequirement, Role
from vlm_unlearn.modeling.forward import ForwardOutput
from vlm_unlearn.records import Example
from vlm_unlearn.store import digest_json

ReferenceStrategy = Literal["cache", "adapter", "copy"]


NLL = tuple[float, int]  # an answer's NLL sum and its number of tokens


@dataclass(frozen=True)
class CachedOutput:
    """The cached part of a reference output: the answers' ``(nll_sum [B], tokens [B])``."""

    answer_nll: tuple[Tensor, Tensor]


BatchKey = tuple[int, Role]  # the number of a micro-batch, and the role of one of its batches
Outputs = Mapping[BatchKey, ForwardOutput | CachedOutput]


class Reference(Protocol):
    """Gives the outputs of the reference model."""

    def outputs(self, model: nn.Module, batches: Mapping[BatchKey, Batch], run: Callable[[], Outputs]) -> Outputs:
        """Returns the reference model's output for each batch, without gradient and without dropout.

        Args:
            model: The model in training, without the wrapper of DDP, FSDP or DeepSpeed.
            batches: The batches that `run` computes.
            run: Runs the batches through `model`.
        """


def resolve_reference_strategy(
    setting: str, requirements: Sequence[ReferenceRequirement], lora: bool
) -> ReferenceStrategy | None:
    """Returns the strategy of a recipe. ``auto`` resolves to the one that needs the least memory.

    Args:
        setting: The recipe's ``reference``.
        requirements: The reference values that the method needs. The strategy is None if it needs none.
        lora: Whether the model trains adapters.

    Raises:
        UserError: The strategy does not provide the values that the method needs.
    """
    if not requirements:
        return None
    only_nll = all(isinstance(requirement, ReferenceNLL) for requirement in requirements)
    if setting == "auto":
        return "cache" if only_nll else "adapter" if lora else "copy"
    if setting == "cache" and not only_nll:
        logits = any(isinstance(requirement, ReferenceLogits) for requirement in requirements)
        raise UserError(
            f"cache stores one NLL per sample, but this method needs {'logits' if logits else 'hidden states'}. "
            "Set reference=auto.",
            code="conflicting-settings",
            field="reference",
        )
    if setting == "adapter" and not lora:
        raise UserError(
            "adapter needs trainable.mode=lora. Set reference=auto.", code="conflicting-settings", field="reference"
        )
    return "cache" if setting == "cache" else "adapter" if setting == "adapter" else "copy"


class CachedReference:
    """Returns NLLs that were computed before training.

    Args:
        values: The values of each role, by `answer_key`.
    """

    def __init__(self, values: Mapping[Role, Mapping[int, NLL]]) -> None:
        self._values = values

    def outputs(self, _model: nn.Module, batches: Mapping[BatchKey, Batch], _run: Callable[[], Outputs]) -> Outputs:
        outputs = {}
        for (number, role), batch in batches.items():
            if role in self._values:
                rows = [self._values[role][key] for key in batch["answer_keys"].tolist()]
                device = batch["input_ids"].device
                nll_sum, tokens = (torch.tensor(column, device=device) for column in zip(*rows, strict=True))
                outputs[number, role] = CachedOutput((nll_sum, tokens))
        return outputs


class AdapterReference:
    """Uses the model in training with its adapters disabled."""

    def outputs(self, model: Any, _batches: Mapping[BatchKey, Batch], run: Callable[[], Outputs]) -> Outputs:
        requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
        with _eval_without_grad(model):
            try:
                with model.disable_adapter():
                    return run()
            finally:
                # PEFT makes every parameter of `modules_to_save` trainable again, even the frozen weights of a sine
                # projector.
                for parameter, value in requires_grad.items():
                    parameter.requires_grad_(value)


class FrozenCopyReference:
    """Swaps frozen copies of the trainable parameters into the model in training.

    Under FSDP2, each process holds copies of only its own shards.

    Args:
        model: The model before training and before any wrapper. Its trainable parameters are copied.
    """

    def __init__(self, model: nn.Module) -> None:
        self._frozen_copies = {
            name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad
        }
        self._sharded = False

    def outputs(self, model: nn.Module, _batches: Mapping[BatchKey, Batch], run: Callable[[], Outputs]) -> Outputs:
        trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
        if not self._sharded:
            self._frozen_copies = {
                name: _shard_like(value, trainable[name]) for name, value in self._frozen_copies.items()
            }
            self._sharded = True
        with _eval_without_grad(model):
            self._swap_parameters(trainable)
            try:
                return run()
            finally:
                self._swap_parameters(trainable)

    def _swap_parameters(self, trainable: dict[str, nn.Parameter]) -> None:
        for name, parameter in trainable.items():
            # Swap via `.data` so that autograd's version counters do not change. The trained values are restored
            # before backward.
            values, frozen = _local_shard(parameter.data), self._frozen_copies[name]
            trained_values = values.clone()
            values.copy_(frozen)
            frozen.copy_(trained_values)
        torch.clear_autocast_cache()  # drop autocast's cached bf16 casts, which belong to the swapped-out weights


def _local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """Returns this process's shard of a DTensor, and any other tensor unchanged."""
    to_local = getattr(tensor, "to_local", None)
    return to_local() if callable(to_local) else tensor


def _shard_like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Returns this process's shard of `value`, sharded like the parameter and on its device."""
    if not hasattr(parameter, "device_mesh"):
        return value.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    dtensor: Any = parameter
    return _local_shard(distribute_tensor(value.to(parameter.device), dtensor.device_mesh, dtensor.placements)).clone()


@contextmanager
def _eval_without_grad(model: nn.Module) -> Iterator[None]:
    """Disables gradients and dropout for the duration of the block."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def answer_key(example: Example) -> int:
    """Returns a key for an example and its answer, since a method may change the answer from epoch to epoch."""
    return key_of_digest(answer_digest(example))


def answer_digest(example: Example) -> str:
    """Returns the digest of an example's id and its answer."""
    return digest_json([example.id, example.answer])


def key_of_digest(digest: str) -> int:
    """Returns the `answer_key` of an `answer_digest`, its first 60 bits."""
    return int(digest[:15], 16)
