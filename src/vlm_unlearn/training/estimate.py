"""Estimates the memory of a training run by arithmetic.

The estimate leaves out library overhead and fragmentation. It is meant for choosing a machine, and for choosing whether
to use gradient checkpointing. Peaks that PyTorch reported on an H100 for LoRA and full training in three sizes were up
to 3 % higher and up to 8 % lower (benchmarks/results/gpu_memory.json).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import LoraLayer

from vlm_unlearn.methods import Method, ReferenceLogits, Role
from vlm_unlearn.modeling.trainable import trainable_table
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.training.passes import tokens_per_pass

GIB = 2**30
# Bytes of activations that a decoder layer of Llama stores per token and hidden unit under bf16, without the attention
# matrix, which SDPA and flash attention do not store. Fitted to those peaks. Full training is higher since its
# residual stream is float32, like the weights of the embedding.
ACTIVATION_BYTES = {"full": 54, "lora": 43, "qlora": 43}
FP32_ACTIVATION_BYTES = 86  # the same in float32, for every mode
# A loss that compares logits with those of the reference model stores three times as much for each: both logits with
# padding, their logarithmic softmax, and gradients.
COMPARED_LOGITS = 3
LLAMA_FEED_FORWARD = 2.6875  # width of the feed-forward block divided by the hidden size, in the models of those peaks


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a model that its memory depends on."""

    parameters: int
    trained: int  # parameters
    hidden_size: int
    layers: int
    vocabulary: int
    feed_forward_size: int | None = None  # None takes that of Llama
    lora_dropout_inputs: int = 0  # input values of all LoRA layers with dropout, per token

    @property
    def layer_width(self) -> float:
        """The hidden size of a Llama whose decoder layers store as many values per token.

        A layer stores about ten values of the hidden size, and four of the width of its feed-forward block.
        """
        if self.feed_forward_size is None:
            return self.hidden_size
        return (10 * self.hidden_size + 4 * self.feed_forward_size) / (10 + 4 * LLAMA_FEED_FORWARD)


def model_size(vlm: VisionLanguageModel) -> ModelSize:
    """Returns the sizes of a model whose trainable parameters are marked. It can be a skeleton without weights."""
    table = trainable_table(vlm)
    config: Any = vlm.base_model.config.get_text_config()
    width = getattr(config, "intermediate_size", None)
    return ModelSize(
        parameters=sum(total for _, _, total in table),
        trained=sum(trained for _, trained, _ in table),
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        vocabulary=config.vocab_size,
        feed_forward_size=width if isinstance(width, int) else None,
        lora_dropout_inputs=sum(
            module.in_features
            for module in vlm.model.modules()
            if isinstance(module, LoraLayer) and any(getattr(item, "p", 0) for item in module.lora_dropout.values())
        ),
    )


def largest_pass(
    longest: Mapping[Role, tuple[int, int]], method: Method, batch_size: int, micro_batches: int, setting: str | int
) -> tuple[float, float]:
    """Returns the number of tokens that run through the model at once, at most, and of those with logits.

    Args:
        longest: The number of tokens of the longest sample of each role, and of its longest answer.
        method: Declares whose logits its loss uses.
        batch_size: The number of samples of each role in a micro-batch.
        micro_batches: The number of micro-batches in an optimizer step.
        setting: The setting `tokens_per_pass`.
    """
    requirements = method.requirements
    compared = {item.role for item in requirements.references if isinstance(item, ReferenceLogits)}
    logits = 0
    for role, (tokens, answer_tokens) in longest.items():
        count = tokens if role in requirements.full_logit_roles else answer_tokens
        logits += count * (COMPARED_LOGITS if role in compared else 1)
    micro_batch = batch_size * len(longest) * max(tokens for tokens, _ in longest.values())
    together = max(1.0, min(tokens_per_pass(setting, micro_batch) / micro_batch, micro_batches))
    return together * micro_batch, together * batch_size * logits


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

    def on_each_device(self, devices: int) -> float:
        """Returns the bytes on each of some devices over which FSDP or ZeRO-3 shards the states.

        They include the gradients, which earlier passes of an optimizer step have left.
        """
        return self.states / devices + self.activations

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
        tokens: Tokens of a forward pass, over all roles and including padding.
        answer_tokens: The number of those tokens whose logits are computed (see `largest_pass`).
        checkpointing: Whether gradient checkpointing is on.
        frozen_copy: Whether the reference is a frozen copy of the trainable parameters.
        defense_copies: The number of copies of the trainable parameters that the defenses hold.
    """
    bytes_per_value = 4 if precision == "fp32" else 2
    base_bytes = {"full": 4.0, "lora": float(bytes_per_value), "qlora": 0.55}[mode]
    frozen = size.parameters if mode == "full" else size.parameters - size.trained
    weights = frozen * base_bytes + (0 if mode == "full" else 4 * size.trained)
    layer_bytes = FP32_ACTIVATION_BYTES if precision == "fp32" else ACTIVATION_BYTES[mode]
    layer_activations = layer_bytes * tokens * size.layer_width
    if precision != "fp32":  # in float32 on a CPU, `fast_lora` stores next to nothing for dropout
        layer_activations += 3 * tokens * size.lora_dropout_inputs / size.layers  # the mask, and the input with zeros
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
