"""Runs tasks that depend on each other in several processes, or one after the other in this process.

The processes end with this one, also if it is killed, so that no run folder stays locked.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm_unlearn.errors import RunError

Progress = Callable[[str, int, int, str], None]  # called with (stage, done, total, detail)
MAX_PROCESSES = 4  # by default, as each may need a gigabyte
PROGRESS_SECONDS = 0.2  # between two messages of a process about one stage
# Large pages for the memory of glibc's malloc. A training step of a tiny model takes 8 % less time with them.
LARGE_PAGES = "glibc.malloc.hugetlb=1"


@dataclass(frozen=True)
class Task:
    """A call of a function, which other processes can import.

    Attributes:
        name: The name, by which other tasks refer to it.
        function: The function. It is called with `arguments` and, as the last one, with a function of type `Progress`.
        arguments: The arguments, which can be pickled.
        after: The names of the tasks that have to be finished before.
        weight: Of the tasks that can start, the one with the greatest weight starts first.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    after: Sequence[str] = ()
    weight: float = 0.0


@dataclass
class TaskResults:
    """The results of tasks.

    Attributes:
        values: What the functions returned, by the name of the task.
        peak_memory_mb: The peak memory of each process besides this one in MiB, by process id.
    """

    values: dict[str, Any] = field(default_factory=dict)
    peak_memory_mb: dict[int, int] = field(default_factory=dict)


def default_processes() -> int:
    """Returns the number of processor cores that this process may use, at most `MAX_PROCESSES`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_PROCESSES)


def prepare_processes(modules: Sequence[str]) -> None:
    """Starts to import modules for the processes of `run_tasks`, while this process goes on.

    It has an effect where processes can be forked from a server process, which has these modules.

    Args:
        modules: The modules.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return
    from multiprocessing import forkserver

    multiprocessing.get_context("forkserver").set_forkserver_preload(list(modules))
    had_tunables = "GLIBC_TUNABLES" in os.environ
    if sys.platform == "linux":
        os.environ.setdefault("GLIBC_TUNABLES", LARGE_PAGES)
    try:
        forkserver.ensure_running()
    finally:
        if not had_tunables:
            os.environ.pop("GLIBC_TUNABLES", None)


def run_tasks(
    tasks: Sequence[Task],
    processes: int,
    progress: Progress,
    initializer: Callable[[], object] | None = None,
    peak_memory_mb: Callable[[], int] | None = None,
    on_finished: Callable[[int, int], None] | None = None,
) -> TaskResults:
    """Runs tasks and returns what their functions returned.

    Args:
        tasks: The tasks, each behind those that it depends on.
        processes: The number of processes. With 1, this process runs the tasks in their order.
        progress: Called in this process with the progress of the tasks.
        initializer: Called in each process before its first task. It can be pickled. Not with one process.
        peak_memory_mb: Returns the peak memory of the process that calls it.
        on_finished: Called after each task with the number of finished tasks and of all tasks.

    Raises:
        RunError: A process was killed.
        Exception: The first error of a task. The other processes are ended.
    """
    processes = min(processes, len(tasks))
    if processes > 1:
        return _run_in_processes(tasks, processes, progress, initializer, peak_memory_mb, on_finished)
    results = TaskResults()
    for task in tasks:
        results.values[task.name] = task.function(*task.arguments, progress)
        if on_finished is not None:
            on_finished(len(results.values), len(tasks))
    return results


def _run_in_processes(
    tasks: Sequence[Task],
    processes: int,
    progress: Progress,
    initializer: Callable[[], object] | None,
    peak_memory_mb: Callable[[], int] | None,
    on_finished: Callable[[int, int], None] | None,
) -> TaskResults:
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(method)
    results, waiting = TaskResults(), list(tasks)
    workers: list[_Worker] = []
    try:
        while waiting or any(worker.task for worker in workers):
            for task in _startable(waiting, results.values):
                worker = next((worker for worker in workers if worker.task is None), None)
                if worker is None:
                    if len(workers) == processes:
                        break
                    worker = _Worker(context, initializer, peak_memory_mb)
                    workers.append(worker)
                worker.start(task)
                waiting.remove(task)
            busy = {worker.connection: worker for worker in workers if worker.task is not None}
            for connection in multiprocessing.connection.wait(list(busy)):
                worker = busy[connection]
                kind, value = worker.receive()
                if kind == "progress":
                    progress(*value)
                elif kind == "error":
                    raise value
                else:
                    results.values[worker.end()], results.peak_memory_mb[worker.process.pid] = value
                    if on_finished is not None:
                        on_finished(len(results.values), len(tasks))
    finally:
        for worker in workers:  # files are complete or missing at any moment
            worker.process.kill()
        for worker in workers:
            worker.process.join()
            worker.connection.close()
    return results


def _startable(waiting: Sequence[Task], finished: Mapping[str, Any]) -> list[Task]:
    """Returns the tasks that can start, the heaviest first."""
    ready = [task for task in waiting if all(name in finished for name in task.after)]
    return sorted(ready, key=lambda task: -task.weight)


class _Worker:
    """A process that runs tasks.

    Attributes:
        process: The process.
        connection: The connection to it.
        task: The task that it runs, or None.
    """

    def __init__(
        self, context: Any, initializer: Callable[[], object] | None, peak_memory_mb: Callable[[], int] | None
    ) -> None:
        self.connection, remote = context.Pipe()
        self.process = context.Process(target=_work, args=(remote, initializer, peak_memory_mb), daemon=False)
        self.process.start()
        remote.close()  # so that the connection ends with the process
        self.task: Task | None = None

    def start(self, task: Task) -> None:
        """Starts a task."""
        self.task = task
        try:
            self.connection.send(task)
        except OSError:
            raise _killed() from None

    def receive(self) -> tuple[str, Any]:
        """Returns the kind and the content of the next message.

        Raises:
            RunError: The process was killed.
        """
        try:
            message: tuple[str, Any] = self.connection.recv()
        except (EOFError, OSError):
            raise _killed() from None
        return message

    def end(self) -> str:
        """Ends the task, and returns its name."""
        assert self.task is not None
        name, self.task = self.task.name, None
        return name


def _killed() -> RunError:
    return RunError(
        "a process was killed. Most often the machine has run out of memory. Run the same command again, which "
        "resumes, with --processes 1.",
        code="worker-died",
    )


def _work(connection: Any, initializer: Callable[[], object] | None, peak_memory_mb: Callable[[], int] | None) -> None:
    """Runs the tasks of the main process, until that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its workers
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    if initializer is not None:
        initializer()
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        try:
            value = task.function(*task.arguments, _Report(connection))
            connection.send(("result", (value, peak_memory_mb() if peak_memory_mb is not None else 0)))
        except Exception as error:
            error.add_note(traceback.format_exc())  # pickling loses the traceback
            try:
                connection.send(("error", error))
            except (pickle.PicklingError, TypeError, AttributeError):
                connection.send(("error", RuntimeError(traceback.format_exc())))


def _end_with(sentinel: Any) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


class _Report:
    """Sends the progress of a task to the main process, a few times a second."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._latest = "", 0.0

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        now = time.monotonic()
        if stage != self._latest[0] or done == total or now - self._latest[1] > PROGRESS_SECONDS:
            self._latest = stage, now
            self._connection.send(("progress", (stage, done, total, detail)))
