"""The group of processes that torchrun or accelerate launch started for one run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from vlm_unlearn.errors import RunError, UserError, quoted

TIMEOUT = timedelta(days=14)  # the processes may finish days apart, and gloo reports a dead process at once


def world_size() -> int:
    """Returns the number of processes of the run, from the environment that torchrun and accelerate launch set.

    Raises:
        UserError: ``WORLD_SIZE`` is not a positive integer, or it is set without the other variables of torchrun.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdigit() or size == "0" or (size != "1" and "MASTER_ADDR" not in os.environ):
        raise UserError(
            f"this environment variable is {quoted(size, 20)} without the other variables of torchrun. Unset it.",
            code="invalid-environment",
            field="WORLD_SIZE",
        )
    return int(size)


def is_main_process() -> bool:
    """Returns whether this process prints messages and writes files that are written once."""
    return world_size() == 1 or os.environ.get("RANK", "0") == "0"


class ProcessGroup:
    """This process and the other processes of its run.

    Args:
        rank: The number of this process, 0 for the main process.
        size: The number of processes.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def broadcast(self, value: bool) -> bool:
        """Returns the main process's value in all processes. All processes must call this method.

        Raises:
            RunError: Another process has ended.
        """
        if self.size == 1:
            return value
        from torch import distributed

        values = [value]
        _run_collective(lambda: distributed.broadcast_object_list(values, src=0))
        return values[0]

    def wait(self) -> None:
        """Waits until all processes have called this method.

        Raises:
            RunError: Another process has ended.
        """
        if self.size > 1:
            from torch import distributed

            _run_collective(distributed.barrier)


def _run_collective(operation: Callable[[], object]) -> None:
    try:
        operation()
    except RuntimeError as error:  # gloo raises it for every failure
        last_line = str(error).strip().splitlines()[-1][:200]
        raise RunError(
            f"another process of this run ended ({last_line}). The same command resumes the run.", code="process-ended"
        ) from None


def destroy_process_group() -> None:
    """Destroys the process group that a training run created. Exiting with it alive can abort in gloo's threads."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """Creates the process group of this run for the duration of the block. A single process needs none.

    The group communicates over gloo on all devices. Unlike NCCL, gloo reports at once that a process has died.
    """
    size = world_size()
    if size == 1:
        yield ProcessGroup(0, 1)
        return
    from torch import distributed

    distributed.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield ProcessGroup(distributed.get_rank(), size)
    finally:
        distributed.destroy_process_group()
