"""Helpers of several tests: recipes on tiny models, running the command, killing it."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest

from fork_server import ForkedProcess
from vlm_unlearn.config import Recipe
from vlm_unlearn.errors import RunError, UserError


@contextmanager
def raises_code(
    code: str, kind: type[UserError] | type[RunError] = UserError, **attributes: object
) -> Iterator[pytest.ExceptionInfo[UserError | RunError]]:
    """Expects an error with a code and, where they are passed, the attributes `file`, `record` and `field`."""
    with pytest.raises(kind) as caught:
        yield caught
    error = caught.value
    assert error.code == code, f"[{error.code}] {error}"
    for name, value in attributes.items():
        actual = getattr(error, name)
        assert (str(actual) if isinstance(value, Path) else actual) == (
            str(value) if isinstance(value, Path) else value
        ), f"{name}: {actual!r} [{error.code}] {error}"


def error_code(done: subprocess.CompletedProcess[str]) -> str | None:
    """The code of the error that a finished command printed on its last line of standard error."""
    lines = done.stderr.strip().splitlines()
    match = re.search(r"\[([a-z0-9-]+)\]$", lines[-1]) if lines else None
    return match[1] if match else None


def recipe(model: Path, data: Path, output: Path, method: object, **changes: object) -> Recipe:
    """A recipe for a tiny model: four steps of four samples."""
    training = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "precision": "fp32",
        "save_steps": 100,
    }
    training |= dict(changes.pop("training", {}))  # type: ignore[call-overload]
    fields = {"model": str(model), "data": data, "output": output, "method": method, "training": training, **changes}
    return Recipe.model_validate(fields)


def command(*arguments: object) -> list[str]:
    """The command line of ``vlm-unlearn``."""
    return [sys.executable, "-m", "vlm_unlearn.cli.main", *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the command in a forked process to its end."""
    # Removed by name: readline, which pytest loads, sets COLUMNS where os.environ doesn't see it.
    process = ForkedProcess(arguments, {name: value for name, value in os.environ.items() if name != "COLUMNS"})
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.wait(), out, err)


def run_in_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the command in this process."""
    from vlm_unlearn.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    argv, code = sys.argv, 0
    sys.argv = ["vlm-unlearn", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    try:
        with redirect_stdout(out), redirect_stderr(err), patch.dict(os.environ, environment, clear=True):
            main()
    except SystemExit as exit_request:
        code = exit_request.code if isinstance(exit_request.code, int) else int(exit_request.code is not None)
    finally:
        sys.argv = argv
    return subprocess.CompletedProcess(["vlm-unlearn", *map(str, arguments)], code, out.getvalue(), err.getvalue())


def run_killing(arguments: Sequence[object], points: Sequence[Callable[[], bool]]) -> None:
    """Runs the command repeatedly, killed with SIGKILL at each point in turn, then to its end.

    Raises:
        AssertionError: The command ended before a point was reached, or its last run failed.
    """
    for number, reached in enumerate(points):
        process = ForkedProcess(arguments)
        while not reached():
            assert process.poll() is None, f"ended before kill point {number}: {process.communicate()}"
            time.sleep(0.002)
        process.kill()
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
