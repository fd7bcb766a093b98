"""Errors of the processes that load data ahead of the training steps."""

from __future__ import annotations

import gc
import re
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from vlm_unlearn.errors import RunError, quoted

RESUME = "Then run the same command again: it resumes from the last checkpoint."
FEWER = "Lower training.dataloader_num_workers, or set it to 0 to load the data in the main process."
DEATH_SECONDS = 2.0  # from a broken connection to the end of the process that has broken it
# Parts of messages of PyTorch and of the operating system.
SHARED_MEMORY = re.compile(r"shared memory|No space left on device|</?torch_|unable to mmap")
DEAD = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")
KILLED = re.compile(r"is killed by signal: ([^.]+)\.")
EXITED = re.compile(r"exited unexpectedly with exit code (\d+)")
CAUGHT = re.compile(r"Caught (\w+) in DataLoader worker process (\d+)")


class data_worker_errors:  # noqa: N801  (used like a function, as contextlib.suppress)
    """Turns an error about a data worker, which may be raised anywhere in the block, into one with its reason.

    Raises:
        RunError: A worker was killed, has run out of shared memory or of open files, or has failed.
    """

    def __enter__(self) -> None:
        return None

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, RunError):
            return
        try:
            failure = _explained(error)
        except RuntimeError as signaled:  # PyTorch reports the end of a worker before its signals are off
            failure = _explained(signaled)
        if failure is not None:
            raise failure from error


def _explained(error: Exception) -> RunError | None:
    with _without_child_signals():
        failure = _data_worker_error(error)
        if failure is not None:
            # Frees the iterator over the batches, which ends the other workers.
            traceback.clear_frames(error.__traceback__)
            gc.collect()
    return failure


@contextmanager
def _without_child_signals() -> Iterator[None]:
    """Within the block, the end of a worker raises no error. PyTorch raises one anywhere in the main thread."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


def _data_worker_error(error: Exception) -> RunError | None:
    """Returns the reason why a data worker has died or failed, or None if the error is about something else."""
    text = str(error)
    if text.startswith("Too many open files"):
        return RunError(
            "the data workers have too many open files. Raise the limit, for example with `ulimit -n 65536`. "
            f"{FEWER} {RESUME}",
            code="too-many-open-files",
        )
    caught = CAUGHT.search(text)
    if caught:
        worker, reason = f"data worker {caught[2]}", text.strip().splitlines()[-1]
        if SHARED_MEMORY.search(reason):
            return _out_of_shared_memory(worker)
        return RunError(
            f"{worker} failed: {quoted(reason, 300)}. Set training.dataloader_num_workers=0 to see where.",
            code="data-worker-failed",
        )
    pid, code = _dead_worker(error)
    if pid is None:
        return None
    worker = f"the data worker with process id {pid}"
    name = signal.Signals(-code).name if code is not None and code < 0 else None
    if name == "SIGBUS" or SHARED_MEMORY.search(text):
        return _out_of_shared_memory(worker)
    if name == "SIGKILL":
        reason = "was killed by SIGKILL. Most often the machine has run out of memory."
    elif name:
        reason = f"was ended by {name}. A library that decodes images may have crashed. "
        reason += "`vlm-unlearn data check` opens all of them."
    else:
        reason = "ended without a reason." if code is None else f"ended with exit code {code}."
    return RunError(f"{worker} {reason} {FEWER} {RESUME}", code="data-worker-killed")


def _dead_worker(error: Exception) -> tuple[str | None, int | None]:
    """Returns the process id of a worker that has died, and its exit code, which is negative for a signal.

    Both are None if the error is about something else.
    """
    dead = DEAD.search(str(error))
    for frame, _ in traceback.walk_tb(error.__traceback__):
        batches = frame.f_locals.get("self")
        if isinstance(batches, _MultiProcessingDataLoaderIter) and (dead or isinstance(error, OSError | EOFError)):
            end = time.monotonic() + DEATH_SECONDS
            while time.monotonic() < end:  # a connection breaks before the worker has ended
                for worker in batches._workers:
                    worker.join(0.01)
                    if worker.exitcode is not None:
                        return str(worker.pid), worker.exitcode
    if dead is None:
        return None, None
    killed, exited = KILLED.search(str(error)), EXITED.search(str(error))
    names = {signal.strsignal(number): -number for number in signal.Signals}
    return dead[1], names.get(killed[1]) if killed else int(exited[1]) if exited else None


def _out_of_shared_memory(worker: str) -> RunError:
    try:
        usage = shutil.disk_usage("/dev/shm")
        size = f" (/dev/shm has {usage.free / 1e6:,.0f} of {usage.total / 1e6:,.0f} MB free)"
    except OSError:
        size = ""
    return RunError(
        f"{worker} ran out of shared memory{size}. Raise the limit, for example with `docker run --shm-size=8g`. "
        f"{FEWER} {RESUME}",
        code="out-of-shared-memory",
    )
