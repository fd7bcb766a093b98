"""How much memory a run will take, by arithmetic, without what libraries and fragmentation take: enough to choose a machine."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
# Bytes of activations that one decoder layer keeps per token and hidden unit, 16-bit, without the attention matrix, which neither
# SDPA nor flash attention keeps (Korthikanti et al. 2022, arXiv 2205.05198, sec. 4).
ACTIVATION_BYTES = 34


@dataclass(frozen=True)
class Shape:
    """What the arithmetic needs to know of a model and its trained part."""

    parameters: int
    trained: int
    hidden_size: int
    layers: int
    vocabulary: int


@dataclass(frozen=True)
class Memory:
    """Bytes by purpose, on one device that holds everything."""

    weights: float
    gradients: float
    optimizer: float
    reference: float
    activations: float

    @property
    def states(self) -> float:
        """What FSDP or ZeRO-3 splits over devices."""
        return self.weights + self.gradients + self.optimizer + self.reference

    @property
    def total(self) -> float:
        return self.states + self.activations

    def devices(self, device_bytes: float, most: int = 1024) -> int:
        """How many devices of a size hold it once the states are split; a tenth of each is left free. 0: more than `most`."""
        room = 0.9 * device_bytes - self.activations
        if room <= 0:
            return 0
        needed = max(1, -(-int(self.states) // int(room)))
        return needed if needed <= most else 0


def estimate(
    shape: Shape,
    mode: str,
    precision: str,
    tokens: float,
    answer_tokens: float,
    checkpointing: bool,
    copies_trained: bool,
) -> Memory:
    """Memory of one device without splitting.

    Args:
        mode: ``full`` (fp32 master weights), ``lora`` (frozen base in the compute precision) or ``qlora`` (in 4 bits).
        precision: of the computation, ``fp32`` or ``bf16``.
        tokens: of one micro-batch, all roles and padding together.
        answer_tokens: of them, those whose logits are kept.
        copies_trained: whether a frozen copy of what trains is held as the reference.
    """
    size = 4 if precision == "fp32" else 2
    base_bytes = {"full": 4.0, "lora": float(size), "qlora": 0.55}[mode]
    frozen = shape.parameters if mode == "full" else shape.parameters - shape.trained
    weights = frozen * base_bytes + (0 if mode == "full" else 4 * shape.trained)
    scale = size / 2
    layer = ACTIVATION_BYTES * tokens * shape.hidden_size * scale
    kept = shape.layers * tokens * shape.hidden_size * size + layer if checkpointing else shape.layers * layer
    logits = answer_tokens * shape.vocabulary * (size + 8)  # and a float32 copy with its gradient
    return Memory(
        weights=weights,
        gradients=4.0 * shape.trained,
        optimizer=8.0 * shape.trained,  # AdamW's two moments
        reference=4.0 * shape.trained if copies_trained else 0.0,
        activations=kept + logits,
    )
