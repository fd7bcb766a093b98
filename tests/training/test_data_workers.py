"""A data worker that dies or fails is one error, which names the reason and the fix."""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from helpers import error_code, raises_code, recipe, run_in_process
from vlm_unlearn.errors import RunError
from vlm_unlearn.training.data_workers import data_worker_errors
from vlm_unlearn.training.runner import run_recipe
from vlm_unlearn.training.stream import UnlearningCollator

FULL = "No space left on device"

pytestmark = pytest.mark.multiprocess


def fail(error: Exception) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def send(number: int) -> Callable[[], None]:
    def act() -> None:
        faulthandler.disable()  # pytest would print the stack
        os.kill(os.getpid(), number)

    return act


class Failing(Dataset[torch.Tensor]):
    """A data set of four items, the third of which acts in its worker."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 2 and get_worker_info() is not None:
            self._act()
        return torch.zeros(8)


@pytest.mark.parametrize(
    ("act", "code", "words"),
    [
        (send(signal.SIGKILL), "data-worker-killed", "SIGKILL"),
        (send(signal.SIGTERM), "data-worker-killed", "SIGTERM"),
        (send(signal.SIGABRT), "data-worker-killed", "SIGABRT"),
        (send(signal.SIGSEGV), "data-worker-killed", "SIGSEGV"),
        (send(signal.SIGBUS), "out-of-shared-memory", "/dev/shm"),
        (lambda: os._exit(3), "data-worker-killed", "exit code 3"),
        (
            fail(RuntimeError("unable to write to file </torch_7_1>: No space left on device (28)")),
            "out-of-shared-memory",
            "docker",
        ),
        (fail(OSError(28, FULL)), "out-of-shared-memory", "--shm-size"),
        (fail(ValueError("a bug")), "data-worker-failed", "a bug"),
        (fail(KeyError("a bug")), "data-worker-failed", "a bug"),
    ],
    ids=["kill", "terminate", "abort", "crash", "bus", "exit", "write", "space", "value", "key"],
)
def test_reason_of_a_worker(act: Callable[[], None], code: str, words: str) -> None:
    with raises_code(code, kind=RunError) as caught, data_worker_errors():
        list(DataLoader(Failing(act), num_workers=1))
    message = str(caught.value)
    assert words in message
    assert "dataloader_num_workers" in message
    assert "\n" not in message
    assert len(message) < 600


def test_long_reason_is_cut() -> None:
    with raises_code("data-worker-failed", kind=RunError) as caught, data_worker_errors():
        list(DataLoader(Failing(fail(ValueError("x" * 10_000))), num_workers=1))
    assert len(str(caught.value)) < 600


def test_too_many_open_files() -> None:
    with raises_code("too-many-open-files", kind=RunError), data_worker_errors():
        raise RuntimeError("Too many open files. Communication with the workers is no longer possible. ...")


@pytest.mark.parametrize(
    ("message", "code", "words"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", "data-worker-killed", ["7", "SIGKILL"]),
        (
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ...",
            "out-of-shared-memory",
            [],
        ),
        (
            "DataLoader worker (pid 7) exited unexpectedly with exit code 2. Details ...",
            "data-worker-killed",
            ["code 2"],
        ),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", "data-worker-killed", ["7, 8"]),
    ],
)
def test_error_in_the_middle_of_a_step(message: str, code: str, words: list[str]) -> None:
    """PyTorch raises it wherever the main process is when the worker ends."""
    with raises_code(code, kind=RunError) as caught, data_worker_errors():
        raise RuntimeError(message)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), RunError("x", code="non-finite-loss"), OSError(28, "full")]
)
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, data_worker_errors():
        raise error
    assert caught.value is error


def test_training_names_the_reason_and_resumes(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"max_steps": 4, "per_device_train_batch_size": 2, "dataloader_num_workers": 1, "save_steps": 1}
    config = recipe(tiny_model, training_sets["harmful"], tmp_path / "run", "ga", training=training)
    batches = 0
    call = UnlearningCollator.__call__

    def dying(self: UnlearningCollator, items: Any) -> Any:
        nonlocal batches
        batches += 1  # in the worker
        if get_worker_info() is not None and batches > 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(self, items)

    with monkeypatch.context() as patch:
        patch.setattr(UnlearningCollator, "__call__", dying)
        with raises_code("data-worker-killed", kind=RunError):
            run_recipe(config)
    assert (run_recipe(config) / "config.json").is_file()


def test_command_prints_one_line(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UnlearningCollator, "__call__", lambda self, items: send(signal.SIGKILL)())
    keys = {"model": tiny_model, "data": training_sets["harmful"], "output": tmp_path / "run"}
    keys |= {"training.max_steps": 2, "training.dataloader_num_workers": 1}
    done = run_in_process("train", "tiny/ga", *(f"{key}={value}" for key, value in keys.items()))
    assert (done.returncode, error_code(done)) == (1, "data-worker-killed")
    assert "Traceback" not in done.stderr
