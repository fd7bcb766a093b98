"""Chooses whether a run needs gradient checkpointing: ``gradient_checkpointing: auto``.

Gradient checkpointing stores only the inputs of the decoder layers and computes the rest again in the backward pass.
The results are equal up to rounding, but a step takes up to 1.4 times longer. It is therefore on only if the estimated
memory of the largest pass that the data can give does not fit into the device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from accelerate.utils import gather_object

from vlm_unlearn.training.device_memory import free_memory
from vlm_unlearn.training.estimate import GIB, estimate, largest_pass, model_size
from vlm_unlearn.training.setup import TrainingParts

# The fraction of the memory that stays free. A step that runs out of a GPU's memory is repeated. The system kills a
# process that takes too much of a CPU's memory, and other programs use it too.
MARGIN = {"cuda": 0.1, "cpu": 0.25}


@dataclass(frozen=True)
class CheckpointingChoice:
    """Whether gradient checkpointing is on, and why."""

    enabled: bool
    reason: str

    def __str__(self) -> str:
        return f"gradient checkpointing: {'on' if self.enabled else 'off'} ({self.reason})"


def choose_checkpointing(needed: float, available: float, device: torch.device) -> CheckpointingChoice:
    """Returns the choice for one device.

    Args:
        needed: The bytes of the run without gradient checkpointing.
        available: The bytes of the device that the run can use.
        device: The device.
    """
    is_gpu = device.type == "cuda"
    margin = MARGIN["cuda" if is_gpu else "cpu"]
    return CheckpointingChoice(
        needed > (1 - margin) * available,
        f"without it, training takes up to about {_size_text(needed)}, and {_size_text(available)} of "
        f"{'the GPU' if is_gpu else 'main memory'} are available",
    )


def _size_text(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def resolve_checkpointing(parts: TrainingParts, sharded: bool) -> CheckpointingChoice:
    """Returns the choice of a run before its first step, the same in all of its processes.

    Args:
        parts: The parts of the run, with the loaded model.
        sharded: Whether FSDP or DeepSpeed shards the states over the processes.

    Raises:
        UserError: An image or a text of the data is invalid.
    """
    vlm, args, method = parts.vlm, parts.args, parts.method
    hooks = ("forget_gradient", "latent_shifts")  # of defenses that need the micro-batches one by one
    runs_alone = sharded or any(defense.overrides(hook) for defense in parts.defenses for hook in hooks)
    tokens, answer_tokens = largest_pass(
        {role: parts.collator.longest_sample(role) for role in method.requirements.roles},
        method,
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        0 if runs_alone else args.tokens_per_pass,
    )
    memory = estimate(
        model_size(vlm),
        "lora" if vlm.has_adapters else "full",
        "fp32" if args.precision == "fp32" else "bf16",  # fp16 takes as much as bf16
        tokens,
        answer_tokens,
        checkpointing=False,
        frozen_copy=parts.reference_strategy == "copy",
        defense_copies=sum(defense.weight_copies for defense in parts.defenses),
    )
    weights = [value for value in vlm.model.parameters() if value.device.type == args.device.type]
    loaded = sum(value.numel() * value.element_size() for value in weights)
    if sharded:
        needed = memory.on_each_device(args.world_size)
    else:
        needed = replace(memory, weights=loaded).on_each_device(1)  # they can be in 4 bits, for example
        needed += memory.gradients if args.world_size > 1 else 0  # the buckets of DDP
    choice = choose_checkpointing(needed, free_memory(args.device) + loaded, args.device)
    choices: list[CheckpointingChoice] = gather_object([choice]) if args.world_size > 1 else [choice]
    return next((item for item in choices if item.enabled), choice)
