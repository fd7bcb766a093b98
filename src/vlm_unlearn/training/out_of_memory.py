"""Repeats a computation in less memory if the memory of the device is not enough for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from vlm_unlearn.errors import RunError


def repeat_in_less_memory(compute: Callable[[], Tensor], save_memory: Callable[[], bool]) -> Tensor:
    """Returns the result of a computation, which is repeated from its first random state until memory is enough.

    Args:
        compute: The computation. It runs out of memory by raising the error of PyTorch.
        save_memory: Undoes what `compute` did, and makes it take less memory. It returns False if that is not possible.

    Raises:
        RunError: Memory is not enough, and nothing is left that saves memory.
    """
    random_state = torch.get_rng_state()
    gpu_random_state = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    while True:
        try:
            return compute()
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            reason = error.args[0].partition(". ")[0]
        # Outside of the handler, whose traceback refers to the activations.
        if not save_memory():
            raise RunError(
                f"memory is not enough for a training step ({reason}). Set training.gradient_checkpointing=true, or "
                "lower training.per_device_train_batch_size and raise training.gradient_accumulation_steps. The last "
                "checkpoint remains.",
                code="out-of-memory",
            )
        torch.set_rng_state(random_state)
        if gpu_random_state is not None:
            torch.cuda.empty_cache()
            torch.cuda.set_rng_state(gpu_random_state)
