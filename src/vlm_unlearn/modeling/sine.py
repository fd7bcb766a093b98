"""SineProject: a projector whose weights change by at most one during training (arXiv 2511.18444)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class SineDelta(nn.Module):
    """The parametrization ``W + sin(dW)`` of a frozen weight W, with a trainable dW that starts at 0.

    Args:
        weight: W. The module takes its shape, dtype and device only.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.sin(self.delta)


def add_sine(projector: nn.Module) -> None:
    """Freezes a projector and reparametrizes its matrices and their biases as ``W + sin(dW)``.

    Source: Garg et al. 2025, arXiv 2511.18444.
    """
    for module in list(projector.modules()):
        parameters = dict(module.named_parameters(recurse=False))
        matrices = [name for name, value in parameters.items() if value.dim() >= 2]
        for name in [*matrices, *(["bias"] if matrices and "bias" in parameters else [])]:
            parametrize.register_parametrization(module, name, SineDelta(parameters[name].detach()))
    for name, parameter in projector.named_parameters():
        parameter.requires_grad = name.endswith(".delta")


def merge_sine(model: nn.Module) -> None:
    """Writes ``W + sin(dW)`` into the weights of a model and removes the parametrizations. Does nothing without any."""
    for module in list(model.modules()):
        # Attribute access would return the parametrizations of the module that a PEFT wrapper contains.
        parametrizations = module._modules.get("parametrizations")
        if not isinstance(parametrizations, nn.ModuleDict):
            continue
        for name, parametrization in list(parametrizations.items()):
            if isinstance(parametrization[0], SineDelta):  # type: ignore[index]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
