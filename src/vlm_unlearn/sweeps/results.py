"""Reads the result of a sweep from its study, and writes the chosen recipes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.trial import FrozenTrial, TrialState

from vlm_unlearn.config import Sweep
from vlm_unlearn.store import write_json, write_text
from vlm_unlearn.sweeps.front import choose, hypervolumes, pareto_front
from vlm_unlearn.sweeps.records import SWEEP_FILE, ConfigurationResult, State, SweepResult, Trial
from vlm_unlearn.sweeps.space import Space
from vlm_unlearn.sweeps.study import ATTEMPT, ERROR, OUTCOME, RETRY_OF, study_name
from vlm_unlearn.sweeps.trials import read_base

RESULT, CONFIGURATION = "result", "configuration"  # attributes of a trial
CHOICES = "choices"
STATES: Mapping[TrialState, State] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


def read_trials(study: optuna.Study, sweep: Sweep, space: Space) -> list[Trial]:
    """Returns the trials of a study. A trial that was tried again occurs once, with its last attempt."""
    frozen = study.get_trials(deepcopy=False)
    retried = {trial.user_attrs[RETRY_OF] for trial in frozen if RETRY_OF in trial.user_attrs}
    return [_read_trial(trial, sweep, space) for trial in frozen if trial.number not in retried]


def _read_trial(trial: FrozenTrial, sweep: Sweep, space: Space) -> Trial:
    result = trial.user_attrs.get(RESULT)
    configuration = ConfigurationResult.model_validate(result) if result else None
    state = STATES[trial.state]
    if state == "pruned" and trial.user_attrs.get(OUTCOME) == "aborted":
        state = "aborted"
    seeds = configuration.seeds if configuration else []
    metrics = list(dict.fromkeys(name for seed in seeds for name in (*seed.reported, *seed.recovery)))
    means = {name: configuration.mean(name, reported=True) for name in metrics} if configuration else {}
    params = dict(trial.params) or trial.system_attrs.get("fixed_params", {})
    return Trial(
        number=trial.number,
        params=space.values_of(params),
        state=state,
        values=dict(zip(sweep.objectives, trial.values, strict=True)) if state == "complete" and trial.values else {},
        reported={name: value for name, value in means.items() if value is not None},
        feasible=all(violation <= 0 for violation in trial.constraints.values()),
        seeds=seeds,
        error=trial.user_attrs.get(ERROR) if state not in ("complete", "running", "waiting") else None,
        configuration=trial.user_attrs.get(CONFIGURATION),
        seconds=configuration.seconds if configuration else 0.0,
        attempts=1 + trial.user_attrs.get(ATTEMPT, 0),
    )


def read_result(study: optuna.Study, sweep: Sweep, space: Space, out: Path) -> SweepResult:
    """Returns the result of a sweep until now."""
    trials = read_trials(study, sweep, space)
    base = read_base(out)
    return SweepResult(
        name=study_name(sweep, out),
        objectives=sweep.objectives,
        trials=trials,
        front=[trial.number for trial in pareto_front(trials, sweep.objectives)],
        base={name: rate.value for name, rate in base.reported.items() if rate.value is not None} if base else {},
        hypervolume=hypervolumes(trials, sweep.objectives),
        importance=_importance(study, sweep),
        choices={name: trial.number for name, trial in choose(trials, sweep.objectives).items()},
    )


def _importance(study: optuna.Study, sweep: Sweep) -> dict[str, dict[str, float]]:
    """Returns the importance of each parameter for each objective (PED-ANOVA), empty with too few trials."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    importance: dict[str, dict[str, float]] = {}
    for index, name in enumerate(sweep.objectives):
        if len({trial.values[index] for trial in complete}) < 2:
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                values = optuna.importance.get_param_importances(study, target=_Target(index))
        except (ValueError, RuntimeError):
            continue
        importance[name] = {key: round(float(value), 4) for key, value in values.items()}
    return importance


class _Target:
    """Returns one objective of a trial."""

    def __init__(self, index: int) -> None:
        self._index = index

    def __call__(self, trial: FrozenTrial) -> float:
        return float(trial.values[self._index])


def write_result(result: SweepResult, sweep: Sweep, space: Space, out: Path) -> None:
    """Writes ``sweep.json``, and the chosen trials as recipe files into ``choices/``."""
    write_json(out / SWEEP_FILE, result.model_dump(mode="json"))
    for name, number in result.choices.items():
        trial = result.trial(number)
        seed = sweep.seeds[0] if sweep.seeds else None
        recipe = space.recipe(trial.params, Path("runs") / f"{result.name}-{name}", seed)
        keys: dict[str, Any] = recipe.model_dump(mode="json", exclude_unset=True)
        values = ", ".join(f"{metric} {value:.4g}" for metric, value in trial.values.items())
        text = yaml.safe_dump(keys, sort_keys=False, allow_unicode=True, width=110)
        comment = f"# Trial {number} of the sweep {result.name}: {values}".replace("\n", " ")
        write_text(out / CHOICES / f"{_file_name(name)}.yaml", f"{comment}\n{text}")


def _file_name(name: str) -> str:
    return "".join(char if char.isalnum() or char in "._-" else "_" for char in name)
