"""GPUs of a worker, and trainings that run as several processes on them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from vlm_unlearn.config import Recipe
from vlm_unlearn.errors import RunError, UserError
from vlm_unlearn.store import RunDirectory, cache_folder, write_json

TAIL = 2000  # characters of the output of a failed process in the error message
INTERRUPTED = (-2, 130)  # exit codes after Ctrl-C


@contextmanager
def claim_gpus(count: int) -> Iterator[Sequence[str]]:
    """Gives this process GPUs that no other worker on this machine uses, before it initializes CUDA.

    The operating system frees the GPUs of a killed worker. Without GPUs on this machine, it yields nothing.

    Args:
        count: The number of GPUs.

    Yields:
        The names of the GPUs for ``CUDA_VISIBLE_DEVICES``.

    Raises:
        UserError: Other workers use the GPUs, or there are fewer.
    """
    available = visible_gpus()
    if not available:
        yield ()
        return
    folder = cache_folder() / "gpus"
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        claimed: list[str] = []
        for name in available:
            lock = FileLock(folder / f"{_machine_name()}-{name.replace('/', '_')}.lock")
            try:
                stack.enter_context(lock.acquire(timeout=0))
            except Timeout:
                continue
            claimed.append(name)
            if len(claimed) == count:
                break
        if len(claimed) < count:
            raise UserError(
                f"{len(claimed)} of {len(available)} GPUs are free on this machine, and a trial needs {count}. Start "
                "fewer workers, or set CUDA_VISIBLE_DEVICES.",
                code="missing-gpu",
                field="--gpus-per-trial",
            )
        previous = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(claimed)
        try:
            yield claimed
        finally:
            if previous is None:
                os.environ.pop("CUDA_VISIBLE_DEVICES", None)
            else:
                os.environ["CUDA_VISIBLE_DEVICES"] = previous


def visible_gpus() -> list[str]:
    """Returns the GPUs of this machine as ``CUDA_VISIBLE_DEVICES`` names them, without initializing CUDA."""
    configured = os.environ.get("CUDA_VISIBLE_DEVICES")
    if configured is not None:
        return [name.strip() for name in configured.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _machine_name() -> str:
    import platform

    return platform.node() or "machine"


@dataclass(frozen=True)
class Launcher:
    """Starts each training of a sweep as several processes, one per GPU.

    Attributes:
        processes: The number of processes.
        engine: A config file of accelerate, such as ``recipes/engines/fsdp2.yaml``. None uses DDP.
    """

    processes: int
    engine: Path | None = None

    def train(self, recipe: Recipe, folder: Path) -> None:
        """Trains a recipe.

        Args:
            recipe: The recipe.
            folder: The folder for a file with the recipe.

        Raises:
            RunError: A process has failed. The message contains the end of its output.
            KeyboardInterrupt: The processes were stopped by Ctrl-C.
        """
        file = folder / "recipe.yaml"
        write_json(file, recipe.model_dump(mode="json"))  # JSON is YAML
        count = str(self.processes)
        if self.engine is None:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count]
        else:
            launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(self.engine)]
            launch += ["--num_processes", count, "--main_process_port", "0"]
        launch += ["-m", "vlm_unlearn.cli.main", "train", str(file), "--json"]
        if recipe.output.is_dir():  # the processes of a worker that was killed may still train
            with FileLock(recipe.output / ".lock", poll_interval=1):
                pass
        process = subprocess.run(launch, capture_output=True, text=True, check=False)
        if process.returncode in INTERRUPTED:
            raise KeyboardInterrupt
        if process.returncode and not RunDirectory(recipe.output).is_finished:
            output = process.stderr.strip()[-TAIL:]
            raise RunError(f"the training has failed: {output}", code="training-failed", file=recipe.output)
