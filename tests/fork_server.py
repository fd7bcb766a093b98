"""Starts the command in processes that are forked from a server with all imports done.

A new process spends 5 to 10 seconds on its imports. A forked one starts at once, and is a process of its own that can
be killed. ``tests/cli/test_startup.py`` and a few other tests start real commands.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

PRELOADED = [
    "vlm_unlearn.cli.main",
    "vlm_unlearn.evaluation.runner",
    "vlm_unlearn.generation.local_chat",
    "vlm_unlearn.worlds.tiny.llava",
    "vlm_unlearn.reporting.report",
    "vlm_unlearn.training.runner",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava.modeling_llava",
    "transformers.models.llava.processing_llava",
    "transformers.models.clip.image_processing_pil_clip",
    "peft",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


class ForkedProcess:
    """A running command. Its methods are those of ``subprocess.Popen``."""

    def __init__(
        self,
        arguments: Sequence[object],
        environment: Mapping[str, str] | None = None,
        program: Path | None = None,
    ) -> None:
        self.args = ["vlm-unlearn", *map(str, arguments)]
        self._folder = tempfile.TemporaryDirectory(prefix="vlm-unlearn-test-")
        self._out, self._err = (Path(self._folder.name) / name for name in ("out", "err"))
        environment = os.environ if environment is None else environment
        self._process = _context.Process(
            target=_run_command,
            args=(self.args, dict(environment), os.getcwd(), self._out, self._err, program),
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self._process.exitcode

    def kill(self) -> None:
        """Sends SIGKILL and waits for the end."""
        os.kill(self.pid, signal.SIGKILL)
        self._process.join()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Returns the complete standard output and standard error after the end."""
        self.wait(timeout)
        return self._out.read_text(), self._err.read_text()


def start_processes(
    count: int, arguments: Sequence[object], program: Path | None = None, **environment: str
) -> list[ForkedProcess]:
    """Starts a group of processes with the environment that torchrun gives them."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    group |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [
        ForkedProcess(
            arguments,
            {**os.environ, "OMP_NUM_THREADS": "1", **group, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment},
            program,
        )
        for rank in range(count)
    ]


def _run_command(
    argv: list[str], environment: dict[str, str], folder: str, out: Path, err: Path, program: Path | None
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for descriptor, file in ((1, out), (2, err)):
        target = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(target, descriptor)
        os.close(target)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = argv
    if program is not None:
        runpy.run_path(str(program), run_name="__main__")
        return
    from vlm_unlearn.cli.main import main

    main()
