"""Estimates the memory of a training run by arithmetic.

The estimate leaves out library overhead and fragmentation. It is meant for choosing a machine.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
# Bytes of 16-bit activations that a decoder layer stores per token and hidden unit (Korthikanti et al. 2022, arXiv
# 2205.05198, sec. 4), without the attention matrix, which SDPA and flash attention do not store.
ACTIVATION_BYTES = 34


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a model that its memory depends on."""

    parameters: int
    trained: int  # parameters
    hidden_size: int
    layers: int
    vocabulary: int


@dataclass(frozen=True)
class Memory:
    """Memory of a run in bytes by purpose, on a single device."""

    weights: float
    gradients: float
    optimizer: float
    reference: float
    activations: float

    @property
    def states(self) -> float:
        """The bytes that FSDP or ZeRO-3 shards over devices."""
        return self.weights + self.gradients + self.optimizer + self.reference

    @property
    def total(self) -> float:
        """The sum of all bytes."""
        return self.states + self.activations

    def devices(self, device_bytes: float, max_devices: int = 1024) -> int:
        """Returns how many devices the run needs if its states are sharded and a tenth of each device stays free.

        Args:
            device_bytes: Memory of one device.
            max_devices: Returns 0 if the run needs more than this many.
        """
        available = 0.9 * device_bytes - self.activations
        if available <= 0:
            return 0
        count = max(1, -(-int(self.states) // int(available)))
        return count if count <= max_devices else 0


def estimate(
    size: ModelSize,
    mode: str,
    precision: str,
    tokens: float,
    answer_tokens: float,
    checkpointing: bool,
    frozen_copy: bool,
) -> Memory:
    """Returns the memory of a run on one device without sharding.

    Args:
        size: The model.
        mode: ``full`` (float32 master weights), ``lora`` (frozen base in the compute precision) or ``qlora`` (base
            in 4 bits).
        precision: Compute precision, ``fp32`` or ``bf16``.
        tokens: Tokens of one micro-batch, over all roles and including padding.
        answer_tokens: The number of those tokens whose logits are computed.
        checkpointing: Whether gradient checkpointing is on.
        frozen_copy: Whether the reference is a frozen copy of the trainable parameters.
    """
    bytes_per_value = 4 if precision == "fp32" else 2
    base_bytes = {"full": 4.0, "lora": float(bytes_per_value), "qlora": 0.55}[mode]
    frozen = size.parameters if mode == "full" else size.parameters - size.trained
    weights = frozen * base_bytes + (0 if mode == "full" else 4 * size.trained)
    scale = bytes_per_value / 2
    layer_activations = ACTIVATION_BYTES * tokens * size.hidden_size * scale
    if checkpointing:
        activations = size.layers * tokens * size.hidden_size * bytes_per_value + layer_activations
    else:
        activations = size.layers * layer_activations
    logits = answer_tokens * size.vocabulary * (bytes_per_value + 8)  # with a float32 copy and its gradient
    return Memory(
        weights=weights,
        gradients=4.0 * size.trained,
        optimizer=8.0 * size.trained,  # the two moments of AdamW
        reference=4.0 * size.trained if frozen_copy else 0.0,
        activations=activations + logits,
    )
