"""Runs a sweep: checks it, starts the workers, and reads the result."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from os import PathLike
from pathlib import Path
from typing import Any

import optuna

from vlm_unlearn.config import Sweep, load, validate
from vlm_unlearn.errors import RunError, UserError
from vlm_unlearn.modeling.loader import model_folder
from vlm_unlearn.store import RunDirectory, user_path
from vlm_unlearn.sweeps.launch import Launcher, claim_gpus, visible_gpus
from vlm_unlearn.sweeps.measurement import Measurement
from vlm_unlearn.sweeps.records import SweepResult
from vlm_unlearn.sweeps.results import read_result, write_result
from vlm_unlearn.sweeps.space import Space
from vlm_unlearn.sweeps.study import open_study, sweep_digest
from vlm_unlearn.sweeps.trials import OnProgress
from vlm_unlearn.sweeps.worker import run_worker
from vlm_unlearn.training.plan import check_recipe

WORKER_MODULES = ("vlm_unlearn.sweeps.worker",)  # which the processes of workers import
PROGRESS_SECONDS = 1.0


def run_sweep(
    sweep: Sweep | str | PathLike[str],
    out: str | PathLike[str],
    storage: str | None = None,
    workers: int = 1,
    gpus_per_trial: int = 1,
    engine: str | PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
    overrides: Sequence[str] = (),
) -> SweepResult:
    """Trains and measures the trials of a sweep, and returns all of them with the Pareto front.

    A second call with the same arguments resumes. Calls in other processes or on other machines join the same study, if
    they use the same folder, or the same storage.

    Args:
        sweep: The sweep, or the name of its file.
        out: The folder of the sweep. It gets ``study.journal``, ``trials/``, ``sweep.json`` and ``choices/``.
        storage: The URL of a database for the study, such as ``postgresql://user@host/db``. None uses the journal.
        workers: The number of processes that run trials on this machine. A script that passes more than 1 needs ``if
            __name__ == "__main__":`` around its code.
        gpus_per_trial: The number of GPUs of each worker, if the machine has any. With more than 1, each training runs
            as several processes.
        engine: A config file of accelerate for trainings on several GPUs. None uses DDP.
        on_progress: Called with the stage, the number of finished and of all items, and details.
        overrides: Dotted overrides of the sweep, such as ``trials=40``.

    Raises:
        UserError: The sweep is invalid, or `out` contains another run.
        RunError: All trials have failed, or a worker was killed and the others have ended.

    Example:
        ::

            result = run_sweep("sweeps/tiny", "sweeps/npo", overrides=["overrides.data=data/train"])
            best = result.trial(result.choices["knee"])
    """
    config = sweep if isinstance(sweep, Sweep) else load(Sweep, Path(sweep), overrides)
    if isinstance(sweep, Sweep) and overrides:
        raise UserError("pass overrides only with the name of a file.", code="conflicting-settings", field="overrides")
    folder = user_path(str(out)).absolute()
    progress = on_progress or (lambda *_: None)
    study, space = prepare(config, folder, storage)
    count = workers if not visible_gpus() else min(workers, max(1, len(visible_gpus()) // gpus_per_trial))
    launch = (gpus_per_trial, None if engine is None else str(engine))
    if count == 1:
        with claim_gpus(gpus_per_trial):
            run_worker(config, folder, storage, progress, build_launcher(*launch))
    else:
        _run_workers(config, folder, storage, count, launch, study, progress)
    return finish(config, folder, study, space)


def prepare(sweep: Sweep, out: Path, storage: str | None) -> tuple[optuna.Study, Space]:
    """Checks a sweep, and opens its folder and its study.

    Raises:
        UserError: As `run_sweep`.
    """
    space = Space(sweep)
    space.check()
    if sweep.sampler == "grid":
        space.grid()
    first = space.first_recipe()
    check_recipe(first)
    model_folder(first.model)
    if not Measurement(sweep).prompts:
        raise UserError("the suite has no questions.", code="no-records", file=sweep.suite)
    run = RunDirectory(out)
    run.validate_contents()
    out.mkdir(parents=True, exist_ok=True)
    run.open({"kind": "sweep", "sweep": sweep_digest(sweep)})
    return open_study(sweep, out, storage), space


def finish(sweep: Sweep, out: Path, study: optuna.Study, space: Space) -> SweepResult:
    """Writes and returns the result of a sweep.

    Raises:
        RunError: All trials have failed.
    """
    result = read_result(study, sweep, space, out)
    write_result(result, sweep, space, out)
    failed = [trial for trial in result.trials if trial.state == "failed"]
    if failed and len(failed) == len(result.trials):
        raise RunError(
            f"all {len(failed)} trials have failed. The first: {failed[0].error}", code="trials-failed", file=out
        )
    if all(trial.state not in ("running", "waiting") for trial in result.trials):
        RunDirectory(out).record_cost(0.0, finished=True)
    return result


def build_launcher(gpus_per_trial: int, engine: str | None) -> Launcher | None:
    """Returns the launcher of trainings on several GPUs, None for a single one."""
    return Launcher(gpus_per_trial, None if engine is None else Path(engine)) if gpus_per_trial > 1 else None


def _run_workers(
    sweep: Sweep,
    out: Path,
    storage: str | None,
    count: int,
    launch: tuple[int, str | None],
    study: optuna.Study,
    on_progress: OnProgress,
) -> None:
    """Runs several workers as processes. The others go on if one is killed."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(method)
    threads = max(1, len(os.sched_getaffinity(0)) // count) if hasattr(os, "sched_getaffinity") else 1
    arguments = (sweep.model_dump(mode="json"), str(out), storage, launch, threads)
    processes, errors = [], []
    for _ in range(count):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(*arguments, sender))
        process.start()
        sender.close()
        processes.append(process)
        errors.append(receiver)
    try:
        while any(process.is_alive() for process in processes):
            wait([process.sentinel for process in processes if process.is_alive()], timeout=PROGRESS_SECONDS)
            trials = study.get_trials(deepcopy=False)
            done = sum(trial.state.is_finished() for trial in trials)
            on_progress("trials", done, max(len(trials), sweep.trials or 0), "")
    except BaseException:
        for process in processes:
            process.join(timeout=30)  # Ctrl-C reaches them too, and they put their trials back into the queue
        raise
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    for receiver in errors:
        if receiver.poll():
            try:
                raise receiver.recv()
            except EOFError:
                continue
    if any(trial.state.is_finished() is False for trial in study.get_trials(deepcopy=False)):
        raise RunError("workers were killed. Run the same command again, which resumes.", code="worker-died", file=out)


def _work(
    sweep: dict[str, Any], out: str, storage: str | None, launch: tuple[int, str | None], threads: int, errors: Any
) -> None:
    """Runs a worker in a process, which ends with the process that started it."""
    import torch

    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(threads)
    _quiet()
    try:
        with claim_gpus(launch[0]):
            run_worker(validate(Sweep, sweep, "sweep"), Path(out), storage, lambda *_: None, build_launcher(*launch))
    except KeyboardInterrupt:
        return
    except Exception as error:
        errors.send(
            error if isinstance(error, UserError | RunError) else RuntimeError(f"{type(error).__name__}: {error}")
        )


def _end_with(sentinel: Any) -> None:
    wait([sentinel])
    time.sleep(0.1)
    os._exit(1)


def _quiet() -> None:
    """Turns off the messages of libraries in a worker."""
    import warnings

    from transformers.utils import logging

    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
