"""Runs tasks that depend on each other in several processes, or one after the other in this process.

The processes end with this one, also if it is killed, so that no run folder stays locked.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
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
    context = multiprocessing.get_context(method)
    messages = context.SimpleQueue()
    alive, keep_alive = context.Pipe(duplex=False)  # the processes end when the second end is closed
    pool = ProcessPoolExecutor(processes, context, _start_worker, (alive, messages, initializer))
    results = TaskResults()
    try:
        waiting, running = list(tasks), dict[Future[Any], Task]()
        while waiting or running:
            for task in _startable(waiting, results.values)[: processes - len(running)]:
                waiting.remove(task)
                running[pool.submit(_run_task, task, peak_memory_mb)] = task
            finished, _ = wait(running, timeout=PROGRESS_SECONDS, return_when=FIRST_COMPLETED)
            while not messages.empty():
                progress(*messages.get())
            for future in finished:
                value, process_id, peak = future.result()
                results.values[running.pop(future).name] = value
                results.peak_memory_mb[process_id] = peak
                if on_finished is not None:
                    on_finished(len(results.values), len(tasks))
    except BrokenExecutor:
        raise RunError(
            "a process was killed. Most often the machine has run out of memory. Run the same command again, which "
            "resumes, and pass --processes 1.",
            code="worker-died",
        ) from None
    finally:
        keep_alive.close()
        pool.shutdown(wait=False, cancel_futures=True)
        alive.close()
    return results


def _startable(waiting: Sequence[Task], finished: Mapping[str, Any]) -> list[Task]:
    """Returns the tasks that can start, the heaviest first."""
    ready = [task for task in waiting if all(name in finished for name in task.after)]
    return sorted(ready, key=lambda task: -task.weight)


_messages: Any = None  # in a worker process: the queue of messages about its progress


def _start_worker(alive: Any, messages: Any, initializer: Callable[[], object] | None) -> None:
    global _messages
    _messages = messages
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its workers
    parent = multiprocessing.parent_process()
    ends = [alive, *([parent.sentinel] if parent is not None else [])]

    def end_with_parent() -> None:
        multiprocessing.connection.wait(ends)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    if initializer is not None:
        initializer()


def _run_task(task: Task, peak_memory_mb: Callable[[], int] | None) -> tuple[Any, int, int]:
    """Runs a task in a worker process. Returns its value, and the id and the peak memory of the process."""
    last = "", 0.0

    def report(stage: str, done: int, total: int, detail: str = "") -> None:
        nonlocal last
        if stage != last[0] or done == total or time.monotonic() - last[1] > PROGRESS_SECONDS:
            last = stage, time.monotonic()
            _messages.put((stage, done, total, detail))

    value = task.function(*task.arguments, report)
    return value, os.getpid(), peak_memory_mb() if peak_memory_mb is not None else 0
