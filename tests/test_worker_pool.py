"""Tests of tasks in several processes: order, errors, and that no process outlives the main one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pooled_tasks
from pooled_tasks import append, exit_at_once, fail, fail_unpicklably, wait_forever
from vlm_unlearn.errors import RunError, UserError
from vlm_unlearn.worker_pool import Task, TaskResults, default_processes, run_tasks

pytestmark = pytest.mark.multiprocess


def diamond(log: Path) -> list[Task]:
    """Four tasks: b and c after a, d after both. The light task b is listed before the heavy c."""
    return [
        Task("a", append, (log, "a", 0.1)),
        Task("b", append, (log, "b", 0.1), ("a",)),
        Task("c", append, (log, "c", 0.3), ("a",), weight=2),
        Task("d", append, (log, "d", 0.0), ("b", "c")),
    ]


def run(tasks: list[Task], processes: int) -> tuple[TaskResults, list[str], list[tuple[int, int]]]:
    messages: list[str] = []
    counts: list[tuple[int, int]] = []
    results = run_tasks(
        tasks,
        processes,
        lambda stage, done, total, detail: messages.append(f"{stage} {done} {total} {detail}"),
        on_finished=lambda done, total: counts.append((done, total)),
    )
    return results, messages, counts


def test_one_process_runs_the_tasks_in_their_order_itself(tmp_path: Path) -> None:
    log = tmp_path / "log"
    results, messages, counts = run(diamond(log), 1)
    assert log.read_text().split("\n")[:-1] == [f"{event} {name}" for name in "abcd" for event in ("start", "end")]
    assert set(results.values.values()) == {f"{name} {os.getpid()}" for name in "abcd"}
    assert results.peak_memory_mb == {}
    assert messages[0] == "a 0 1 detail"
    assert counts == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_several_processes_start_a_task_after_those_it_depends_on(tmp_path: Path) -> None:
    log = tmp_path / "log"
    results, messages, counts = run(diamond(log), 2)
    events = log.read_text().split("\n")[:-1]
    assert events[:2] == ["start a", "end a"]
    assert events[-2:] == ["start d", "end d"]
    assert events.index("end b") < events.index("end c")  # both have run at the same time
    assert list(results.values) == ["a", "b", "c", "d"]
    processes = {value.split()[1] for value in results.values.values()}
    assert len(processes) == 2
    assert str(os.getpid()) not in processes
    assert sorted(messages) == sorted(f"{name} {done} 1 detail" for name in "abcd" for done in (0, 1))
    assert counts[-1] == (4, 4)


def test_the_heaviest_task_that_can_start_is_first(tmp_path: Path) -> None:
    log = tmp_path / "log"
    tasks = [Task(name, append, (log, name, 0.4), weight=weight) for name, weight in [("a", 0), ("b", 5), ("c", 9)]]
    run(tasks, 2)
    assert {log.read_text().split("\n")[index] for index in (0, 1)} == {"start b", "start c"}


@pytest.mark.parametrize("processes", [1, 2])
def test_the_error_of_a_task_is_raised(tmp_path: Path, processes: int) -> None:
    tasks = [Task("bad", fail, (tmp_path,)), Task("later", append, (tmp_path / "log", "later", 0.0), ("bad",))]
    with pytest.raises(UserError) as failure:
        run(tasks, processes)
    assert (failure.value.code, failure.value.field) == ("unknown-name", "field")
    assert not (tmp_path / "log").exists()


def test_an_error_ends_the_other_processes(tmp_path: Path) -> None:
    tasks = [Task("long", wait_forever, (tmp_path, "long")), Task("bad", fail, (tmp_path,))]
    with pytest.raises(UserError):
        run(tasks, 2)
    assert all_end(tmp_path)


def test_a_killed_process_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError) as failure:
        run([Task("dies", exit_at_once, (tmp_path,)), Task("long", wait_forever, (tmp_path, "long"))], 2)
    assert failure.value.code == "worker-died"
    assert all_end(tmp_path)


@pytest.mark.parametrize("count", [1, 2])
def test_processes_that_are_killed_at_once_are_an_error(tmp_path: Path, count: int) -> None:
    """Both orders of a process that dies before the other has started its task."""
    for number in range(3):
        tasks = [Task(f"{index}", exit_at_once, (tmp_path,)) for index in range(count)]
        tasks.insert(number % 2, Task("long", wait_forever, (tmp_path, "long")))
        with pytest.raises(RunError):
            run(tasks, 2)
    assert all_end(tmp_path)


def test_an_error_that_cannot_be_pickled_is_raised_as_text(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="cannot be sent"):
        run([Task("bad", fail_unpicklably, (tmp_path,)), Task("long", wait_forever, (tmp_path, "long"))], 2)


def test_more_tasks_than_processes(tmp_path: Path) -> None:
    tasks = [Task(str(index), append, (tmp_path / "log", str(index), 0.0)) for index in range(12)]
    results, _, counts = run(tasks, 3)
    assert len(results.values) == counts[-1][0] == 12
    assert len({value.split()[1] for value in results.values.values()}) <= 3


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT", "SIGTERM"])
def test_the_processes_end_with_the_main_process(tmp_path: Path, name: str) -> None:
    source = Path(pooled_tasks.__file__)
    environment = {**os.environ, "PYTHONPATH": f"{source.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with subprocess.Popen(
        [sys.executable, source, tmp_path], env=environment, start_new_session=True, stderr=subprocess.PIPE
    ) as program:
        wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
        if name == "SIGINT":  # as Ctrl-C, which all processes of the terminal get
            os.killpg(program.pid, signal.SIGINT)
        else:
            program.send_signal(getattr(signal, name))
        assert all_end(tmp_path)
        _, errors = program.communicate(timeout=30)
    assert errors.count(b"KeyboardInterrupt") == (1 if name == "SIGINT" else 0)


def test_default_processes_are_the_cores_of_this_process() -> None:
    assert 1 <= default_processes() <= 4


def wait_until(condition: object, seconds: float = 60.0) -> bool:
    """Returns whether the condition is met in time."""
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def all_end(folder: Path) -> bool:
    """Returns whether all processes that wait for ever end within a minute."""
    processes = [int(file.name.split(".")[1]) for file in folder.iterdir() if "." in file.name]
    return wait_until(lambda: not any(is_alive(process) for process in processes))


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")
