"""Functions that the tests of the worker pool run in other processes, and a program with such a pool."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from vlm_unlearn.errors import UserError
from vlm_unlearn.worker_pool import Task, run_tasks

Report = Callable[[str, int, int, str], None]


def append(log: Path, name: str, seconds: float, report: Report) -> str:
    """Writes a line when it starts and when it ends."""
    for event in ("start", "end"):
        with log.open("a") as handle:
            handle.write(f"{event} {name}\n")
        if event == "start":
            report(name, 0, 1, "detail")
            time.sleep(seconds)
    report(name, 1, 1, "detail")
    return f"{name} {os.getpid()}"


def fail(_log: Path, _report: Report) -> None:
    raise UserError("no such thing.", code="unknown-name", field="field")


def fail_unpicklably(_log: Path, _report: Report) -> None:
    error = ValueError("cannot be sent")
    error.connection = sys.stdout  # type: ignore[attr-defined]
    raise error


def exit_at_once(_log: Path, _report: Report) -> None:
    os._exit(3)


def wait_forever(folder: Path, name: str, _report: Report) -> None:
    (folder / f"{name}.{os.getpid()}").touch()
    time.sleep(600)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background commands without it
    out = Path(sys.argv[1])
    run_tasks([Task(name, wait_forever, (out, name)) for name in "ab"], 2, lambda *_: None)
