"""SineProject: a projector whose weights move only within one of where they were (arXiv 2511.18444)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class SineDelta(nn.Module):
    """The parametrization ``W + sin(dW)`` of a frozen W; dW is what trains, and starts at 0."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros_like(like))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.sin(self.delta)


def add_sine(projector: nn.Module) -> None:
    """Freezes a projector and reparametrises its matrices, and the biases beside them, as ``W + sin(dW)``
    (Garg et al. 2025, arXiv 2511.18444)."""
    for module in list(projector.modules()):
        own = dict(module.named_parameters(recurse=False))
        matrices = [name for name, value in own.items() if value.dim() >= 2]
        for name in [*matrices, *(["bias"] if matrices and "bias" in own else [])]:
            parametrize.register_parametrization(module, name, SineDelta(own[name].detach()))
    for name, parameter in projector.named_parameters():
        parameter.requires_grad = name.endswith(".delta")


def merge_sine(model: nn.Module) -> None:
    """Writes ``W + sin(dW)`` into the weights and takes the parametrizations away, wherever there are any."""
    for module in list(model.modules()):
        own = module._modules.get(
            "parametrizations"
        )  # not by attribute: PEFT's wrappers pass on what their modules have
        for name, found in list(own.items()) if isinstance(own, nn.ModuleDict) else []:
            if isinstance(found[0], SineDelta):  # type: ignore[index]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
