"""Faster forms of three operations of decoder layers for training in float32 on a CPU, with the same results.

transformers computes RMSNorm, SwiGLU and rotary position embeddings by many small operations, each of which reads and
writes all hidden states, and autograd keeps most of the intermediate values. Here each is one autograd function that
keeps only its inputs. GPUs have kernels for this, and other dtypes convert between operations, so that both keep the
functions of transformers.

A module gets the faster form only if the two agree on random numbers, since classes of the same name differ between
families (Gemma's RMSNorm adds 1 to the weight, for example).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOLERANCE = 1e-5  # of the agreement on random numbers
ROTARY_FUNCTION = "apply_rotary_pos_emb"  # in the modules of transformers


@contextmanager
def fused_layers(layers: nn.ModuleList) -> Iterator[None]:
    """Gives decoder layers the faster forms for the duration of the block, which must contain the backward passes.

    Args:
        layers: The decoder layers of a language model.
    """
    patched: list[nn.Module] = []
    rotary: dict[Any, Callable[..., Any]] = {}
    try:
        for layer, module in ((parent, child) for parent in layers for child in parent.modules()):
            fused = _fused_forward(module)
            if fused is not None:
                options = {"layer": layer} if fused is _gated_forward else {}
                module.forward = partial(fused, module, **options)
                patched.append(module)
            source = sys.modules[type(module).__module__]
            original = getattr(source, ROTARY_FUNCTION, None)
            if source not in rotary and callable(original) and _is_rotary(original):
                rotary[source] = original
                setattr(source, ROTARY_FUNCTION, _rotary_function(original))
        yield
    finally:
        for module in patched:
            del module.forward
        for source, original in rotary.items():
            setattr(source, ROTARY_FUNCTION, original)


def _can_fuse(*tensors: Tensor) -> bool:
    """Returns whether tensors are in float32 on a CPU."""
    return all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)


def _fused_forward(module: nn.Module) -> Callable[..., Any] | None:
    """Returns the faster form of a module's `forward`, None if it has none."""
    if "forward" in vars(module):  # has another one already
        return None
    weight = getattr(module, "weight", None)
    if type(module).__name__.endswith("RMSNorm") and isinstance(weight, Tensor) and weight.dim() == 1:
        return _norm_forward if _agrees(module, _norm_forward, weight.shape[0]) else None
    gate = getattr(module, "gate_proj", None)
    if all(isinstance(getattr(module, name, None), nn.Module) for name in ("gate_proj", "up_proj", "down_proj")):
        return _gated_forward if _agrees(module, _gated_forward, int(getattr(gate, "in_features", 0))) else None
    return None


def _agrees(module: nn.Module, fused: Callable[..., Any], size: int) -> bool:
    """Returns whether a function gives the outputs of a module for random inputs [2, size]."""
    weight = next(module.parameters(), None)
    if size == 0 or weight is None or not _can_fuse(weight):
        return False
    inputs = torch.randn(1, 2, size, generator=torch.Generator().manual_seed(0))
    was_training = module.training
    try:
        module.eval()  # without dropout
        with torch.no_grad():
            expected, output = module(inputs), fused(module, inputs)
    except (AttributeError, TypeError, RuntimeError):  # takes other inputs, or has no such options
        return False
    finally:
        module.train(was_training)
    if not isinstance(expected, Tensor) or expected.shape != output.shape:
        return False
    return bool(torch.allclose(output, expected, rtol=TOLERANCE, atol=TOLERANCE))


# RMSNorm


def _norm_forward(module: Any, states: Tensor) -> Any:
    """Computes RMSNorm of hidden states [..., H]."""
    if not _can_fuse(states):
        return type(module).forward(module, states)
    epsilon = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return _Norm.apply(states, module.weight, epsilon)  # type: ignore[no-untyped-call]


class _Norm(torch.autograd.Function):
    """RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467): ``weight * states / sqrt(mean(states^2) + epsilon)``."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        squares = torch.linalg.vector_norm(states, dim=-1, keepdim=True).square_()
        factors = squares.div_(states.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(states, weight, factors)
        normalized: Tensor = states * factors
        return normalized.mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        states, weight, factors = ctx.saved_tensors
        weight_gradient = None
        if ctx.needs_input_grad[1]:
            weight_gradient = (states * factors).mul_(gradients[0]).flatten(0, -2).sum(dim=0)
        gradient = gradients[0] * weight
        products = torch.linalg.vecdot(gradient, states)[..., None]
        shrinkage = products.mul_(factors.square()).div_(states.shape[-1])
        return gradient.sub_(states * shrinkage).mul_(factors), weight_gradient, None


# SwiGLU


def _gated_forward(module: Any, states: Tensor, layer: nn.Module | None = None) -> Any:
    """Computes a SwiGLU feed-forward block for hidden states [..., H].

    Gradient checkpointing of its layer saves nothing of the block, which must not save anything either.
    """
    gate, up = module.gate_proj(states), module.up_proj(states)
    if not _can_fuse(gate, up):
        return module.down_proj(F.silu(gate) * up)
    computed_again: list[Tensor] = []
    product: Tensor = _SwiGLU.apply(gate, up, computed_again)  # type: ignore[no-untyped-call]
    if getattr(layer, "gradient_checkpointing", False):
        return module.down_proj(product)
    start, gate, up = product.data_ptr(), gate.detach(), up.detach()

    # The projection saves the product, which is as large as its two factors, which are saved anyway.
    def pack(tensor: Tensor) -> Tensor | torch.Size:
        return tensor.shape if tensor.data_ptr() == start and tensor.numel() == gate.numel() else tensor

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        computed_again[:] = [F.silu(gate)]  # the backward pass of the product follows
        result: Tensor = computed_again[0] * up
        return result.view(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return module.down_proj(product)


class _SwiGLU(torch.autograd.Function):
    """``silu(gate) * up`` (Shazeer 2020, arXiv 2002.05202).

    The backward pass computes ``silu(gate)`` again, unless the list `computed_again` contains it.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, computed_again: list[Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.computed_again = computed_again
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        activation = ctx.computed_again.pop() if ctx.computed_again else F.silu(gate)
        gate_gradient = torch.ops.aten.silu_backward(gradients[0] * up, gate)
        return gate_gradient, activation.mul_(gradients[0]), None


# Rotary position embeddings


def _rotary_function(original: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the faster form of transformers' function of the same arguments."""

    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not _can_fuse(query, key, cos, sin):
            return original(query, key, cos, sin, *args, **kwargs)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return _Rotary.apply(query, cos, sin), _Rotary.apply(key, cos, sin)  # type: ignore[no-untyped-call]

    return rotate


def _is_rotary(function: Callable[..., Any]) -> bool:
    """Returns whether a function is the usual rotation of the two halves of each head, by numbers."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 2, 3, 8, generator=generator)
    angles = torch.randn(1, 3, 4, generator=generator).repeat(1, 1, 2)
    try:
        expected = function(query, key, angles.cos(), angles.sin())
        output = _rotary_function(function)(query, key, angles.cos(), angles.sin())
        return all(
            torch.allclose(left, right, rtol=TOLERANCE, atol=TOLERANCE)
            for left, right in zip(output, expected, strict=True)
        )
    except (TypeError, RuntimeError, ValueError):  # takes other arguments
        return False


class _Rotary(torch.autograd.Function):
    """Rotary position embeddings (Su et al. 2021, arXiv 2104.09864) of states [B, heads, S, D].

    ``cos`` and ``sin`` are [B, 1, S, D], and their halves along D are equal.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(states, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(gradients[0], cos, -sin), None, None


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns states [B, heads, S, D], each pair of positions d and d + D / 2 rotated by its angle."""
    half = states.shape[-1] // 2
    result = states * cos
    result[..., :half].addcmul_(states[..., half:], sin[..., :half], value=-1)
    result[..., half:].addcmul_(states[..., :half], sin[..., half:])
    return result
