"""The Optuna study of a sweep: its storage, its sampler, and the trials that workers take from it."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import psutil
from filelock import FileLock
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from vlm_unlearn.config import Sweep
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.store import digest_json, drop_incomplete_line
from vlm_unlearn.sweeps.space import Space, Values

JOURNAL = "study.journal"
STUDY_LOCK = ".study.lock"
# Attributes of a trial
WORKER = "worker"  # the machine and the process that runs it
HEARTBEAT = "heartbeat"  # the time of the worker's last sign of life
OUTCOME = "outcome"  # how it ended: complete, failed, aborted, pruned, died or interrupted
ERROR = "error"
RETRY_OF, ATTEMPT, GRID = "retry_of", "attempt", "grid"
SWEEP_DIGEST = "sweep"  # of a study
EXECUTION_KEYS = {"name", "trials", "keep_models", "retries", "stale_after"}  # may change between two starts


class _SystemLock(JournalFileOpenLock):
    """Locks the journal by the operating system, which releases the lock of a killed process at once.

    A last line that a killed process has written incompletely is removed, because every reader would fail at it.
    """

    def __init__(self, journal: Path) -> None:
        super().__init__(str(journal))
        self._journal = journal
        self._lock = FileLock(f"{journal}.lock")

    def acquire(self) -> bool:
        self._lock.acquire()
        if self._journal.exists():
            drop_incomplete_line(self._journal)
        return True

    def release(self) -> None:
        self._lock.release()


def open_storage(out: Path, url: str | None) -> BaseStorage:
    """Returns the storage of a study.

    Args:
        out: The folder of the sweep, which contains the journal.
        url: The URL of a database, such as ``postgresql+psycopg://user@host/db``. None: the journal.

    Raises:
        UserError: The database is not available, or a driver is missing.
    """
    if url is None:
        journal = out / JOURNAL
        return JournalStorage(JournalFileBackend(str(journal), _SystemLock(journal)))
    if url.startswith("postgresql://"):  # SQLAlchemy's default driver is psycopg2
        url = f"postgresql+psycopg://{url.removeprefix('postgresql://')}"
    try:
        return optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
    except Exception as error:  # SQLAlchemy and its drivers raise many types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"the database cannot be opened: {quoted(reason, 200)}. Check the URL, and run pip install "
            "'vlm-unlearn[sweep]' for PostgreSQL.",
            code="storage-not-available",
            field="--storage",
        ) from None


def open_study(sweep: Sweep, out: Path, storage_url: str | None) -> optuna.Study:
    """Creates the study of a sweep, or opens it if it exists.

    Args:
        sweep: The sweep.
        out: The folder of the sweep.
        storage_url: As in `open_storage`.

    Raises:
        UserError: The study exists and belongs to another sweep, or its database is not available.
    """
    quiet_optuna()
    out.mkdir(parents=True, exist_ok=True)
    storage = open_storage(out, storage_url)
    name, digest = study_name(sweep, out), sweep_digest(sweep)
    directions = [
        StudyDirection.MINIMIZE if direction == "min" else StudyDirection.MAXIMIZE
        for direction in sweep.objectives.values()
    ]
    try:
        study = optuna.create_study(storage=storage, study_name=name, directions=directions)
        study.set_metric_names(list(sweep.objectives))
        study.set_user_attr(SWEEP_DIGEST, digest)
    except DuplicatedStudyError:
        study = optuna.load_study(storage=storage, study_name=name)
        existing = _wait_for_digest(study)
        if existing != digest:
            raise UserError(
                f"the study {quoted(name)} belongs to another sweep. Choose another output folder, or set `name`.",
                code="run-mismatch",
                file=out,
            ) from None
    return study


def _wait_for_digest(study: optuna.Study) -> object:
    """Returns the digest that the worker which has created the study sets next, or None if it was killed."""
    for _ in range(50):
        if SWEEP_DIGEST in study.user_attrs:
            return study.user_attrs[SWEEP_DIGEST]
        time.sleep(0.1)
    return None


def study_name(sweep: Sweep, out: Path) -> str:
    """Returns the name of a sweep's study."""
    return sweep.name or out.resolve().name


def sweep_digest(sweep: Sweep) -> str:
    """Returns the digest of all keys of a sweep that its results depend on."""
    return digest_json(sweep.model_dump(mode="json", exclude=EXECUTION_KEYS))


def quiet_optuna() -> None:
    """Turns off Optuna's messages about each trial and about its experimental options."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=ExperimentalWarning)


def build_sampler(sweep: Sweep, seed: int) -> BaseSampler:
    """Returns the sampler of a sweep.

    Args:
        sweep: The sweep.
        seed: The seed.
    """
    if sweep.sampler == "tpe":
        return TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)
    if sweep.sampler == "nsga2":
        # Optuna's default of 50 would make a short sweep a random search.
        population = min(50, max(4, (sweep.trials or 0) // 4))
        return NSGAIISampler(seed=seed, population_size=population)
    return RandomSampler(seed=seed)


@contextmanager
def study_lock(out: Path) -> Iterator[None]:
    """Within the block, no other worker takes or recovers a trial."""
    with FileLock(out / STUDY_LOCK):
        yield


def enqueue_grid(study: optuna.Study, space: Space) -> None:
    """Adds the missing combinations of a grid to the queue of the study. Call it within `study_lock`."""
    queued = {trial.user_attrs.get(GRID) for trial in study.get_trials(deepcopy=False)}
    for number, values in enumerate(space.grid()):
        if number not in queued:
            study.enqueue_trial(space.params_of(values), user_attrs={GRID: number})


def take_trial(study: optuna.Study, sweep: Sweep, space: Space) -> tuple[optuna.Trial, Values] | None:
    """Returns the next trial and its values, or None if no trial is left. Call it within `study_lock`.

    The sampler's seed depends only on the number of trials, so that a sweep of one worker can be repeated exactly.
    """
    trials = study.get_trials(deepcopy=False)
    waiting = any(trial.state == TrialState.WAITING for trial in trials)
    originals = sum(RETRY_OF not in trial.user_attrs for trial in trials)
    may_sample = sweep.sampler != "grid" and originals < (sweep.trials or 0)  # a grid is in the queue as a whole
    if not waiting and not may_sample:
        return None
    study.sampler = build_sampler(sweep, (sweep.sampler_seed * 1_000_003 + len(trials)) % 2**32)
    trial = study.ask()
    trial.set_user_attr(WORKER, worker_identity())
    trial.set_user_attr(HEARTBEAT, time.time())
    return trial, space.draw(trial)


def unfinished(study: optuna.Study) -> int:
    """Returns the number of trials that run or wait."""
    states = (TrialState.RUNNING, TrialState.WAITING)
    return len(study.get_trials(deepcopy=False, states=states))


def recover_trials(study: optuna.Study, sweep: Sweep, space: Space) -> None:
    """Marks the trials of killed workers, and puts them into the queue again. Call it within `study_lock`.

    A worker that is killed in between leaves nothing behind that the next call would not complete.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if _is_dead(trial, sweep.stale_after):
            end_trial(study, trial, TrialState.FAIL, "died", "the worker was killed")
    trials = study.get_trials(deepcopy=False)
    retried = {trial.user_attrs.get(RETRY_OF) for trial in trials}
    for trial in trials:
        outcome = trial.user_attrs.get(OUTCOME, "died")
        if trial.state != TrialState.FAIL or outcome not in ("died", "interrupted") or trial.number in retried:
            continue
        attempt = trial.user_attrs.get(ATTEMPT, 0) + (outcome == "died")
        if attempt > sweep.retries:
            continue
        attributes = {RETRY_OF: trial.number, ATTEMPT: attempt}
        if GRID in trial.user_attrs:
            attributes[GRID] = trial.user_attrs[GRID]
        params = trial.system_attrs.get("fixed_params") or trial.params
        study.enqueue_trial(dict(params), user_attrs=attributes)


def end_trial(
    study: optuna.Study, trial: FrozenTrial | optuna.Trial, state: TrialState, outcome: str, error: str = ""
) -> None:
    """Ends a trial without values, unless it has ended already.

    Args:
        study: The study.
        trial: The trial.
        state: Optuna's state.
        outcome: The value of `OUTCOME`.
        error: The reason.
    """
    handle = trial if isinstance(trial, optuna.Trial) else optuna.Trial(study, trial._trial_id)
    try:
        handle.set_user_attr(OUTCOME, outcome)
        if error:
            handle.set_user_attr(ERROR, error)
        study.tell(trial.number, state=state)
    except (optuna.exceptions.UpdateFinishedTrialError, ValueError):
        return  # another worker has ended it


def worker_identity() -> dict[str, Any]:
    """Returns the machine and the process of this worker. The time of its start tells apart equal process numbers."""
    return {"machine": _machine(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def _machine() -> str:
    """Returns an identity of this machine within which process numbers are unique."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        import platform

        return platform.node()


def _is_dead(trial: FrozenTrial, stale_after: float) -> bool:
    """Returns whether the worker of a running trial was killed.

    On this machine the process is looked up. A worker on another machine is dead if its last sign of life is too old.
    """
    worker = trial.user_attrs.get(WORKER)
    if isinstance(worker, dict) and worker.get("machine") == _machine():
        try:
            process = psutil.Process(int(worker["pid"]))
            is_same = abs(process.create_time() - float(worker["started"])) < 1
            return not is_same or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
    started = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
    return time.time() - float(trial.user_attrs.get(HEARTBEAT, started)) > stale_after
