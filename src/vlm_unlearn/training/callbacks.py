"""Callbacks of a training run: the log and its cost on disk, and probes that stop the run or keep its best weights."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import TrainerCallback

from vlm_unlearn.config import ProbeConfig
from vlm_unlearn.methods.wrappers import Defense
from vlm_unlearn.records import PROBE_PREFIX
from vlm_unlearn.store import RunDirectory, write_text
from vlm_unlearn.training.checkpoints import load_trained, save_trained

OnStep = Callable[[int, int, Mapping[str, float]], None]  # step, number of steps, loss terms
ABORTED = "abort_when holds"  # the beginning of the reason for which a run was aborted
SCORE = "score"  # the name of the weighted sum of the `keep_best` metrics


def tensorboard_callback(run: RunDirectory) -> TrainerCallback:
    """Returns a callback that logs to the run's folder ``tensorboard``.

    The default of transformers is a folder next to the checkpoints, which are deleted at the end of the run.
    """
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(log_dir=str(run.tensorboard)))


class LogCallback(TrainerCallback):
    """Writes log.jsonl and the manifest's cost into the run folder, and reports progress.

    Args:
        run: The run.
        on_step: Called with the step, the number of steps and the loss terms of each optimizer step.
        is_main_process: The other processes of a distributed run do nothing.
        started: The value of `time.monotonic` from which the cost counts.
    """

    def __init__(self, run: RunDirectory, on_step: OnStep | None, is_main_process: bool, started: float) -> None:
        self._run = run
        self._on_step = on_step
        self._is_main_process = is_main_process
        self._last_time = started

    def elapsed_seconds(self) -> float:
        """Returns the wall time since the last call, or since `started`."""
        previous_time, self._last_time = self._last_time, time.monotonic()
        return self._last_time - previous_time

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs and self._on_step and self._is_main_process:
            self._on_step(state.global_step, state.max_steps, logs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._is_main_process:
            self.write_log(state)
            self._run.record_cost(self.elapsed_seconds())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.write_log(state)

    def write_log(self, state: Any) -> None:
        """Rewrites log.jsonl from the Trainer's history.

        Checkpoints contain this history, so that a kill neither loses nor duplicates a line.
        """
        if not self._is_main_process:
            return
        lines = []
        for entry in state.log_history:
            if "loss" in entry or any(name.startswith(PROBE_PREFIX) for name in entry):
                # The epoch counts passes over the concatenated stream, not over the data.
                line = {name: value for name, value in sorted(entry.items()) if name != "epoch"}
                lines.append(json.dumps(line) + "\n")
        write_text(self._run.log_file, "".join(lines))


class DefenseCallback(TrainerCallback):
    """Passes the weights to the defenses after each step, before the step is logged, evaluated or saved.

    Args:
        defenses: The defenses of the run.
        weights: Returns the trainable parameters by name.
    """

    def __init__(self, defenses: Sequence[Defense], weights: Callable[[], Mapping[str, Tensor]]) -> None:
        self._defenses = defenses
        self._weights = weights

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for defense in self._defenses:
            defense.after_step(self._weights(), state.global_step)


class Probe(Protocol):
    """Measures a model during training, for example by evaluating a suite (`vlm_unlearn.evaluation.probe`)."""

    @property
    def digest(self) -> str:
        """A digest of the probe's questions and judges. A run resumes only with the same digest."""

    def __call__(self, model: Any) -> Mapping[str, float | None]:
        """Returns rates by metric name, None for a metric that no answer could be scored for."""


class ProbeCallback(TrainerCallback):
    """Applies a recipe's rules for stopping and for the best weights to the rates of its probe.

    The trainer measures the rates: its `eval_fn` is `measure`. The decisions depend only on the log, which checkpoints
    contain, and probing uses no random numbers. A resumed run therefore decides like an uninterrupted one.

    Args:
        config: The recipe's ``probe``.
        probe: Measures the model.
        run: The run. The best weights are stored in its folder ``best``.
    """

    def __init__(self, config: ProbeConfig, probe: Probe, run: RunDirectory) -> None:
        self._config = config
        self._probe = probe
        self._best_weights = run.best_weights

    def measure(self, model: Any) -> dict[str, float | None]:
        """Returns the rates of a model, and its score if the recipe keeps the best weights."""
        rates = dict(self._probe(model))
        score = self._score(rates)
        return rates if score is None else {**rates, SCORE: score}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True  # whatever `eval_steps` is

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rates = {name.removeprefix(PROBE_PREFIX): value for name, value in kwargs["metrics"].items()}
        if args.should_save and self._is_best(state.log_history):
            self._save_best(kwargs["model"])
        aborted, stop_rules = self._aborted(rates), self._config.stop_when
        reason = None
        if aborted:
            reason = f"{ABORTED}: " + ", ".join(f"{name} {rates[name]:.3g}" for name in aborted)
        elif stop_rules and all(bound.holds(rates.get(name)) for name, bound in stop_rules.items()):
            reason = "stop_when holds"
        if reason:
            state.log_history[-1]["stopped"] = reason
            control.should_training_stop = True
            control.should_save = False  # a run that resumes from a checkpoint of this step would run one more step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save and self._config.keep_best and self._best_weights.is_dir():
            load_trained(kwargs["model"], self._best_weights)

    def _aborted(self, rates: Mapping[str, float | None]) -> list[str]:
        """Returns the metrics that meet an abort rule."""
        return [name for name, bound in self._config.abort_when.items() if bound.holds(rates.get(name))]

    def _score(self, rates: Mapping[str, float | None]) -> float | None:
        """Returns the weighted sum of the ``keep_best`` metrics.

        None if there are none, if one was not measured, or if an abort rule holds: such weights are never the best.
        """
        weighted = [(weight, rates.get(name)) for name, weight in self._config.keep_best.items()]
        if not weighted or any(rate is None for _, rate in weighted) or self._aborted(rates):
            return None
        return sum(weight * (rate or 0.0) for weight, rate in weighted)

    def _is_best(self, history: Sequence[Mapping[str, Any]]) -> bool:
        """Returns whether the last entry of the log has the highest score."""
        name = f"{PROBE_PREFIX}{SCORE}"
        *previous, last = history
        return name in last and last[name] > max((entry.get(name, -math.inf) for entry in previous), default=-math.inf)

    def _save_best(self, model: nn.Module) -> None:
        scratch = self._best_weights.with_name(f"{self._best_weights.name}.part")
        shutil.rmtree(scratch, ignore_errors=True)
        save_trained(model, scratch)
        shutil.rmtree(self._best_weights, ignore_errors=True)
        scratch.rename(self._best_weights)


def stop_reason(history: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns why a probe stopped the run, from the Trainer's log history. None if the run reached its last step."""
    return next((str(entry["stopped"]) for entry in history if "stopped" in entry), None)


def was_aborted(reason: object) -> bool:
    """Returns whether the reason of `stop_reason`, as a manifest contains it, is a rule of ``abort_when``."""
    return isinstance(reason, str) and reason.startswith(ABORTED)
