"""The processes that torchrun or accelerate launch started together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from vlm_unlearn.errors import RunError, UserError

TIMEOUT = timedelta(days=14)  # shares of work end at different times; a process that dies is noticed at once


def world_size() -> int:
    """How many processes work together: what torchrun and accelerate launch say.

    Raises:
        UserError: the environment says something else than a number, or says it without the rest of what they set.
    """
    told = os.environ.get("WORLD_SIZE", "1")
    if not told.isdigit() or told == "0" or (told != "1" and "MASTER_ADDR" not in os.environ):
        raise UserError(f"WORLD_SIZE={told[:20]} in the environment, without the rest of what torchrun sets; unset it")
    return int(told)


def is_main_process() -> bool:
    """Whether this is the process that talks, and writes what is written once."""
    return world_size() == 1 or os.environ.get("RANK", "0") == "0"


class ProcessGroup:
    """This process and those beside it."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def broadcast(self, value: bool) -> bool:
        """The first process's value, in all of them; each waits for it.

        Raises:
            RunError: a process has ended.
        """
        if self.size == 1:
            return value
        from torch import distributed

        told = [value]
        _together(lambda: distributed.broadcast_object_list(told, src=0))
        return told[0]

    def wait(self) -> None:
        """Until all processes are here.

        Raises:
            RunError: a process has ended.
        """
        if self.size > 1:
            from torch import distributed

            _together(distributed.barrier)


def _together(step: Callable[[], object]) -> None:
    try:
        step()
    except RuntimeError as error:  # gloo has one type for all that can happen
        raise RunError(
            f"another process of this run ended; the same command goes on where it stopped ({str(error).strip().splitlines()[-1][:200]})"
        ) from None


def destroy_process_group() -> None:
    """Leaves the group that a training has joined: a process that ends within it may be aborted by gloo's threads."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """Joins the processes that were started together for as long as the block lasts; one alone needs nothing.

    They speak over gloo, whatever devices they use: unlike NCCL it notices at once when a process has died.
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
