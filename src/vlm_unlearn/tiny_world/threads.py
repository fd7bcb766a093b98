"""One thread for the tiny world, so that its numbers are the same on machines with more cores or fewer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def limit_to_one_thread() -> Iterator[None]:
    """Within the block PyTorch computes with one thread.

    Sums that several threads share are rounded otherwise, and training makes whole percentages of that. Models of under a million
    parameters lose little by it, and on a busy machine they win: threads that wait for each other take longer than one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
