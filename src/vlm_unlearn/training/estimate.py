"""Estimates the memory of a training run by arithmetic.

The estimate leaves out library overhead and fragmentation. It is meant for choosing a machine. Peaks that PyTorch
reported on an H100 for LoRA and full training in three sizes were up to 3 % higher and up to 8 % lower
(benchmarks/results/gpu_memory.json).
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
# Bytes of activations that a decoder layer of Llama stores per token and hidden unit under bf16, without the attention
# matrix, which SDPA and flash attention do not store. Fitted to those peaks. Full training is higher since its
# residual stream is float32, like the weights of the embedding.
ACTIVATION_BYTES = {"full": 54, "lora": 43, "qlora": 43}


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
    defenses: float  # copies of the trainable parameters
    activations: float  # from the forward pass, with the bf16 copies that autocast makes of float32 weights

    @property
    def states(self) -> float:
        """The bytes that FSDP or ZeRO-3 shards over devices."""
        return self.weights + self.gradients + self.optimizer + self.reference + self.defenses

    @property
    def total(self) -> float:
        """The bytes at the peak: gradients appear while the backward pass frees the activations."""
        fixed = self.weights + self.optimizer + self.reference + self.defenses
        return fixed + max(self.gradients, self.activations)

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
    defense_copies: int = 0,
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
        defense_copies: The number of copies of the trainable parameters that the defenses hold.
    """
    bytes_per_value = 4 if precision == "fp32" else 2
    base_bytes = {"full": 4.0, "lora": float(bytes_per_value), "qlora": 0.55}[mode]
    frozen = size.parameters if mode == "full" else size.parameters - size.trained
    weights = frozen * base_bytes + (0 if mode == "full" else 4 * size.trained)
    scale = bytes_per_value / 2
    layer_activations = ACTIVATION_BYTES[mode] * tokens * size.hidden_size * scale
    if checkpointing:
        layer_input = tokens * size.hidden_size * (4 if mode == "full" else bytes_per_value)
        activations = size.layers * layer_input + layer_activations
    else:
        activations = size.layers * layer_activations
    logits = answer_tokens * size.vocabulary * (bytes_per_value + 8)  # with a float32 copy and its gradient
    # Autocast keeps copies of trained weights. Those of frozen weights are kept only for the backward pass.
    copied = size.trained if checkpointing else size.parameters
    copies = 2.0 * copied if mode == "full" and precision == "bf16" else 0.0
    return Memory(
        weights=weights,
        gradients=4.0 * size.trained,
        optimizer=8.0 * size.trained,  # the two moments of AdamW
        reference=4.0 * size.trained if frozen_copy else 0.0,
        defenses=4.0 * size.trained * defense_copies,
        activations=activations + logits + copies,
    )
