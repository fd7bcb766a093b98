"""Limits PyTorch to one thread, so that the numbers of the tiny world do not depend on the number of cores."""

from __future__ import annotations

from contextlib import AbstractContextManager

from vlm_unlearn.modeling.threads import limit_threads


def limit_to_one_thread() -> AbstractContextManager[None]:
    """Limits PyTorch to one thread within the block.

    Several threads round sums differently, and training amplifies the difference to several percentage points. Models
    of less than a million parameters are hardly slower with one thread. On a busy machine they are faster, because
    threads do not wait for each other.
    """
    return limit_threads(1)
