"""Limits PyTorch to one thread, so that the numbers of the tiny world do not depend on the number of cores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def limit_to_one_thread() -> Iterator[None]:
    """Limits PyTorch to one thread within the block.

    Several threads round sums differently, and training amplifies the difference to several percentage points. Models
    of less than a million parameters are hardly slower with one thread. On a busy machine they are faster, because
    threads do not wait for each other.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
