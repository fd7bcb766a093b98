"""Processes many files in threads. Decoding an image releases Python's global lock, so threads use all cores."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")
OnDone = Callable[[int, int], None]  # called with (done, total)


def map_in_threads(
    function: Callable[[Key], Value], keys: Iterable[Key], on_done: OnDone | None = None
) -> Iterator[tuple[Key, Value]]:
    """Yields ``(key, function(key))`` for each key, in the order of `keys`.

    At most 128 calls per core are pending, so `keys` may be an iterator of any length.

    Args:
        on_done: Called with (done, total) after each result. The total is 0 if `keys` has no length.
    """
    total = len(keys) if isinstance(keys, Sized) else 0
    workers = os.cpu_count() or 1
    pending: deque[tuple[Key, Future[Value]]] = deque()
    done = 0
    with ThreadPoolExecutor(workers) as pool:
        for key in keys:
            pending.append((key, pool.submit(function, key)))
            if len(pending) >= 128 * workers:
                oldest, future = pending.popleft()
                yield oldest, future.result()
                done += 1
                if on_done:
                    on_done(done, total)
        for oldest, future in pending:
            yield oldest, future.result()
            done += 1
            if on_done:
                on_done(done, total)
