"""The number of threads with which PyTorch computes on a CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

# The threads of an operation wait for each other at its end. The operations of a small model are so short that the
# threads mostly wait, and on a busy machine each wait lasts until the other thread gets a core again. Two threads are
# slower there at all measured sizes. On an idle machine they are faster, and least so for small models
# (benchmarks/threads.py). The number must not depend on how busy the machine is, since it changes how sums are rounded,
# and a resumed run is exact.
SMALL_MODEL = 3_000_000  # parameters
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # with which users set the number themselves


def cpu_threads(parameters: int) -> int:
    """Returns the number of threads for a model on a CPU: one for a model of less than `SMALL_MODEL` parameters.

    A number that the user has set by one of `THREAD_VARIABLES` is kept.

    Args:
        parameters: The number of parameters of the model.
    """
    threads = torch.get_num_threads()
    if any(os.environ.get(name) for name in THREAD_VARIABLES):
        return threads
    return 1 if parameters < SMALL_MODEL else threads


def threads_for(model: nn.Module) -> AbstractContextManager[None]:
    """Returns a context that computes with the number of threads for a model (see `cpu_threads`), if it is on a CPU."""
    parameters = list(model.parameters())
    if not parameters or parameters[0].device.type != "cpu":
        return nullcontext()
    return limit_threads(cpu_threads(sum(parameter.numel() for parameter in parameters)))


@contextmanager
def limit_threads(threads: int) -> Iterator[None]:
    """Sets the number of PyTorch's threads within the block.

    Args:
        threads: The number of threads.
    """
    previous = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(previous)
