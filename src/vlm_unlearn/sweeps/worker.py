"""A worker of a sweep: takes trials from the study until none is left."""

from __future__ import annotations

import time
from pathlib import Path

import optuna
from optuna.trial import TrialState

from vlm_unlearn.config import Bound, Sweep
from vlm_unlearn.errors import RunError, UserError, shortened
from vlm_unlearn.sweeps.front import pareto_front
from vlm_unlearn.sweeps.launch import Launcher
from vlm_unlearn.sweeps.records import ConfigurationResult
from vlm_unlearn.sweeps.results import CONFIGURATION, RESULT, read_trials
from vlm_unlearn.sweeps.space import Space, Values
from vlm_unlearn.sweeps.study import (
    OUTCOME,
    end_trial,
    enqueue_grid,
    open_study,
    recover_trials,
    study_lock,
    take_trial,
    unfinished,
)
from vlm_unlearn.sweeps.trials import OnProgress, PrunedTrialError, TrialRunner, delete_model, heartbeat

POLL_SECONDS = 1.0  # between two looks at the study while other workers run the last trials
BEATS = 4  # signs of life within `stale_after`


def run_worker(
    sweep: Sweep, out: Path, storage_url: str | None, on_progress: OnProgress, launcher: Launcher | None = None
) -> None:
    """Runs trials until none is left, those of killed workers included.

    Args:
        sweep: The sweep.
        out: The folder of the sweep.
        storage_url: As in `open_storage`.
        on_progress: Called with the stage, the number of finished and of all items, and details.
        launcher: Starts each training on several GPUs. None trains in this process.

    Raises:
        UserError: The sweep is invalid.
    """
    study = open_study(sweep, out, storage_url)
    space = Space(sweep)
    runner = TrialRunner(sweep, space, out, on_progress, launcher)
    if sweep.sampler == "grid":
        with study_lock(out):
            enqueue_grid(study, space)
    while True:
        with study_lock(out):
            recover_trials(study, sweep, space)
            taken = take_trial(study, sweep, space)
        if taken is None:
            if not unfinished(study):
                return
            time.sleep(POLL_SECONDS)  # a worker that runs one of the last trials may be killed
            continue
        run_trial(study, sweep, runner, *taken)
        if sweep.keep_models != "all":
            delete_models(study, sweep, space, out)


def run_trial(study: optuna.Study, sweep: Sweep, runner: TrialRunner, trial: optuna.Trial, values: Values) -> None:
    """Runs a trial and passes its result to the study, whatever happens."""
    try:
        with heartbeat(trial, sweep.stale_after / BEATS):
            digest = runner.digest(values)
            trial.set_user_attr(CONFIGURATION, digest)
            result = _earlier_result(study, digest)
            if result is None:
                result, _ = runner.run(values, trial)
    except PrunedTrialError as error:
        end_trial(study, trial, TrialState.PRUNED, "pruned", str(error))
    except (KeyboardInterrupt, SystemExit):
        end_trial(study, trial, TrialState.FAIL, "interrupted", "the worker was stopped")
        raise
    except (UserError, RunError) as error:
        end_trial(study, trial, TrialState.FAIL, "failed", str(error))
    except Exception as error:  # such as a lack of memory, which another configuration may not have
        end_trial(study, trial, TrialState.FAIL, "failed", shortened(f"{type(error).__name__}: {error}"))
    else:
        tell_result(study, sweep, trial, result)


def _earlier_result(study: optuna.Study, digest: str) -> ConfigurationResult | None:
    """Returns the result of an earlier trial with the same configuration, perhaps of a machine with other folders."""
    for trial in study.get_trials(deepcopy=False):
        if trial.state.is_finished() and trial.user_attrs.get(CONFIGURATION) == digest and RESULT in trial.user_attrs:
            return ConfigurationResult.model_validate(trial.user_attrs[RESULT])
    return None


def tell_result(study: optuna.Study, sweep: Sweep, trial: optuna.Trial, result: ConfigurationResult) -> None:
    """Ends a trial with its rates."""
    trial.set_user_attr(RESULT, result.model_dump(mode="json"))
    if result.aborted is not None:
        end_trial(study, trial, TrialState.PRUNED, "aborted", result.aborted)
        return
    values = [result.mean(name) for name in sweep.objectives]
    missing = [name for name, value in zip(sweep.objectives, values, strict=True) if value is None]
    if missing:
        end_trial(study, trial, TrialState.FAIL, "failed", f"not measured: {', '.join(missing)}")
        return
    try:
        for name, bound in sweep.constraints.items():
            trial.set_constraint(name, _violation(result.mean(name), bound))
        trial.set_user_attr(OUTCOME, "complete")
        study.tell(trial, [value for value in values if value is not None])
    except (optuna.exceptions.UpdateFinishedTrialError, ValueError) as error:
        # Either this worker counted as killed and another one has the trial, or Optuna rejects the values.
        end_trial(study, trial, TrialState.FAIL, "failed", str(error))


def _violation(value: float | None, bound: Bound) -> float:
    """Returns by how much a metric violates its bound, at most 0 if it meets it. A missing value violates it."""
    if value is None:
        return 1.0
    return value - bound.at_most if bound.at_most is not None else (bound.at_least or 0.0) - value


def delete_models(study: optuna.Study, sweep: Sweep, space: Space, out: Path) -> None:
    """Deletes the models of trials that are not on the front. A trial that leaves the front never comes back to it."""
    trials = read_trials(study, sweep, space)
    front = pareto_front(trials, sweep.objectives) if sweep.keep_models == "front" else []
    remaining = {trial.configuration for trial in front}
    unfinished_digests = {trial.configuration for trial in trials if trial.state in ("running", "waiting")}
    for trial in trials:
        digest = trial.configuration
        if trial.state in ("complete", "aborted") and digest and digest not in remaining | unfinished_digests:
            delete_model(out, digest)
