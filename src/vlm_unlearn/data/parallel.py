"""Work on many files at once: decoding an image lets go of Python's lock, so that threads use all cores."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")
OnDone = Callable[[int, int], None]


def map_in_threads(
    work: Callable[[Key], Value], keys: Iterable[Key], on_done: OnDone | None = None
) -> Iterator[tuple[Key, Value]]:
    """``(key, work(key))`` for each key, in order, never more than a few hundred ahead of the reader.

    Args:
        on_done: called with (done, all), all being 0 where `keys` doesn't know how many it has.
    """
    total = len(keys) if isinstance(keys, Sized) else 0
    workers = os.cpu_count() or 1
    waiting: deque[tuple[Key, Future[Value]]] = deque()
    done = 0
    with ThreadPoolExecutor(workers) as pool:
        for key in keys:
            waiting.append((key, pool.submit(work, key)))
            if len(waiting) >= 128 * workers:
                first, future = waiting.popleft()
                yield first, future.result()
                done += 1
                if on_done:
                    on_done(done, total)
        for first, future in waiting:
            yield first, future.result()
            done += 1
            if on_done:
                on_done(done, total)
