"""A faster forward and backward pass of LoRA layers in training on a CPU, with the results of PEFT's.

PEFT computes ``base(x) + B(A(dropout(x))) * scaling`` as separate operations. The product, the scaling and the sum each
pass over an output of the layer, and autograd saves the mask of dropout and the values after it. Here a layer is one
function of autograd. Its matrix products add to the output and to the gradient directly.

The random numbers of dropout take more time on a CPU than the matrix products of a small layer. `dropped_positions`
draws the distances between dropped values instead, which are geometrically distributed. That takes one random number
for each dropped value. The masks have the same distribution as those of `torch.nn.Dropout`, but are different ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

MAX_SPARSE_RATE = 0.25  # at higher rates, ordinary dropout takes about as much time
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextmanager
def fast_lora(model: nn.Module) -> Iterator[None]:
    """Gives the plain LoRA layers of a model the faster forward pass for the duration of the block.

    Outputs and gradients equal PEFT's up to rounding. The pass runs on a CPU, without autocast, for one active adapter
    of the dtype of its base layer, which must be a plain `torch.nn.Linear`. In every other case, such as DoRA, merged
    or disabled adapters, quantized weights and modules with hooks, PEFT's forward pass runs.

    Dropout draws its masks from the default generator of PyTorch, so that a restored random state repeats them.

    Args:
        model: The model. It may have no LoRA layer.
    """
    layers = [layer for layer in model.modules() if type(layer) is Linear]
    for layer in layers:
        # In contrast to an attribute `forward` of the layer, a class is correct in copies of the layer too.
        layer.__class__ = _FastLinear
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = Linear


class _FastLinear(Linear):  # type: ignore[misc]
    """A LoRA layer of PEFT with the faster forward pass where it applies."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Computes the output [..., out_features] for inputs [..., in_features]."""
        name = None if args or kwargs else self._fast_adapter(x)
        if name is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        base, dropout, scale = self.base_layer, self.lora_dropout[name], float(self.scaling[name])
        positions = None
        if isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0:
            positions = dropped_positions(x.numel(), dropout.p)
            scale /= 1 - dropout.p
        weights = (base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight)
        # The function has matrices as inputs and output. A view that it returned could not be changed in place.
        rows = x.reshape(-1, x.shape[-1])
        output: Tensor = _LoraFunction.apply(rows, *weights, positions, scale)  # type: ignore[no-untyped-call]
        return output.view(*x.shape[:-1], output.shape[-1])

    def _get_name(self) -> str:
        return "Linear"

    def _fast_adapter(self, x: Tensor) -> str | None:
        """Returns the name of the active adapter if the faster forward pass applies to it and the inputs."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1 or torch.compiler.is_compiling():
            return None
        name: str = self.active_adapters[0]
        if name not in self.lora_A or name in self.lora_variant:
            return None
        base, lora_a, lora_b, dropout = self.base_layer, self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        if not (type(base) is type(lora_a) is type(lora_b) is nn.Linear and type(dropout) in (nn.Dropout, nn.Identity)):
            return None
        if lora_a.bias is not None or lora_b.bias is not None or _has_hooks(base, lora_a, lora_b, dropout):
            return None
        if isinstance(dropout, nn.Dropout) and (dropout.inplace or (dropout.training and dropout.p > MAX_SPARSE_RATE)):
            return None
        tensors = [x, base.weight, lora_a.weight, lora_b.weight, *([] if base.bias is None else [base.bias])]
        if any(type(tensor) not in (Tensor, nn.Parameter) or not tensor.is_cpu for tensor in tensors):
            return None  # subclasses hold quantized or sharded values
        same_dtype = x.is_floating_point() and all(tensor.dtype == x.dtype for tensor in tensors)
        return name if same_dtype and not torch.is_autocast_enabled("cpu") else None


def _has_hooks(*modules: nn.Module) -> bool:
    """Returns whether calling one of the modules would do more than its class's forward pass."""
    if any(getattr(torch_module, f"_global{hooks}") for hooks in HOOKS):
        return True
    return any("forward" in module.__dict__ or any(getattr(module, hooks) for hooks in HOOKS) for module in modules)


class _LoraFunction(torch.autograd.Function):
    """Computes ``x W' + b + scale * zeroed(x) A' B'`` for inputs x [rows, in_features], and its gradients.

    Saves the inputs, the positions of dropped values and ``zeroed(x) A'``, which has few columns.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        positions: Tensor | None,
        scale: float,
    ) -> Tensor:
        output = F.linear(x, weight, bias)
        hidden = _zeroed(x, positions) @ lora_a.t()
        output.addmm_(hidden, lora_b.t(), alpha=scale)
        ctx.save_for_backward(x, weight, lora_a, lora_b, positions, hidden)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_a, lora_b, positions, hidden = ctx.saved_tensors
        gradient = gradients[0]
        x_needed, weight_needed, bias_needed, a_needed, b_needed = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():  # for gradients of gradients, hidden must be a function of the inputs
            hidden = _zeroed(x, positions) @ lora_a.t()
        x_gradient = weight_gradient = bias_gradient = a_gradient = b_gradient = None
        if x_needed or a_needed:
            hidden_gradient = (gradient @ lora_b) * ctx.scale
        if a_needed:
            a_gradient = hidden_gradient.t() @ _zeroed(x, positions)
        if b_needed:
            b_gradient = (gradient.t() @ hidden) * ctx.scale
        if x_needed:
            x_gradient = hidden_gradient @ lora_a
            if positions is not None:
                x_gradient.view(-1).index_fill_(0, positions, 0.0)
            x_gradient.addmm_(gradient, weight)
        if weight_needed:
            weight_gradient = gradient.t() @ x
        if bias_needed:
            bias_gradient = gradient.sum(dim=0)
        return x_gradient, weight_gradient, bias_gradient, a_gradient, b_gradient, None, None


def _zeroed(values: Tensor, positions: Tensor | None) -> Tensor:
    """Returns the values with 0 at the positions in the flattened tensor. Without positions, returns the values."""
    if positions is None:
        return values
    result = values.clone(memory_format=torch.contiguous_format)
    result.view(-1).index_fill_(0, positions, 0.0)
    return result


def dropped_positions(size: int, rate: float) -> Tensor:
    """Draws which of `size` values dropout sets to zero, with one random number for each of them.

    Args:
        size: The number of values.
        rate: The probability of each position, independent of all others, greater than 0 and less than 1.

    Returns:
        The positions [K] in ascending order, int64 on the CPU.
    """
    parts, last = [], -1
    while last < size - 1:
        expected = (size - 1 - last) * rate
        count = int(expected + 4 * math.sqrt(expected)) + 8  # almost always enough
        # A uniform number u gives the geometrically distributed distance 1 + floor(log(u) / log(1 - rate)).
        distances = torch.rand(count, dtype=torch.float64, device="cpu").log_().div_(math.log1p(-rate)).clamp_(max=size)
        part = distances.long().add_(1).cumsum_(dim=0).add_(last)
        parts.append(part)
        last = int(part[-1])
    if not parts:
        return torch.empty(0, dtype=torch.long)
    positions = torch.cat(parts) if len(parts) > 1 else parts[0]
    return positions[: int(torch.searchsorted(positions, size))]
