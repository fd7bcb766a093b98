"""The callbacks of a training run: the log and its cost on disk, and probes that stop the run or keep its best weights."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from vlm_unlearn.config import ProbeConfig
from vlm_unlearn.records import PROBE_PREFIX
from vlm_unlearn.store import record_cost, write_text
from vlm_unlearn.training.trainer import UnlearningTrainer

OnStep = Callable[[int, int, Mapping[str, float]], None]  # step, steps, loss parts


def tensorboard(output: Path) -> TrainerCallback:
    """Writes the log for TensorBoard into the run's folder; transformers would put it beside the checkpoints, which go in the end."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(log_dir=str(output / "tensorboard")))


class LogCallback(TrainerCallback):
    """Keeps log.jsonl and the manifest's cost beside the run, and tells progress; one process of several does."""

    def __init__(self, output: Path, on_step: OnStep | None, writes: bool) -> None:
        self._output = output
        self._on_step = on_step
        self._writes = writes
        self._since = time.monotonic()

    def seconds(self) -> float:
        """Wall time since the last call."""
        before, self._since = self._since, time.monotonic()
        return self._since - before

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs and self._on_step and self._writes:
            self._on_step(state.global_step, state.max_steps, logs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._writes:
            self.write_log(state)
            record_cost(self._output, self.seconds())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.write_log(state)

    def write_log(self, state: Any) -> None:
        """Rewrites the log from the trainer's history, which a checkpoint carries: no line is lost or doubled by a kill."""
        if not self._writes:
            return
        told = [
            entry
            for entry in state.log_history
            if "loss" in entry or any(name.startswith(PROBE_PREFIX) for name in entry)
        ]
        lines = [dict(sorted(entry.items())) for entry in told]
        for line in lines:
            line.pop("epoch", None)  # of the endless stream, not of the data
        write_text(self._output / "log.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


SCORE = f"{PROBE_PREFIX}score"


class Probe(Protocol):
    """Measures a model; `vlm_unlearn.evaluation.probe` has the one that asks and grades."""

    @property
    def digest(self) -> str:
        """Names what is asked and how it is graded: another probe makes another run."""

    def __call__(self, model: Any) -> Mapping[str, float | None]:
        """Rates by metric name; None where nothing could be scored."""


class ProbeCallback(TrainerCallback):
    """Probes every few steps, logs the rates, and applies the recipe's stop and keep-best rules.

    What is decided depends on the log alone, which a checkpoint carries, and probing draws no random numbers: a resumed run decides as
    an uninterrupted one. Of several processes the first one probes, and tells the others.
    """

    def __init__(self, config: ProbeConfig, probe: Probe, trainer: UnlearningTrainer, output: Path) -> None:
        self._config = config
        self._probe = probe
        self._trainer = trainer
        self._best = output / "best"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._config.eval_steps and state.global_step < state.max_steps:
            return
        rates = self._measure()
        logged = {f"{PROBE_PREFIX}{name}": value for name, value in rates.items() if value is not None}
        weighted = [(weight, rates.get(name)) for name, weight in self._config.keep_best.items()]
        reason, broken = self._reason(rates)
        if weighted and not broken and all(value is not None for _, value in weighted):
            logged[SCORE] = sum(weight * (value or 0.0) for weight, value in weighted)
            if logged[SCORE] > max(
                (entry[SCORE] for entry in state.log_history if SCORE in entry), default=float("-inf")
            ):
                self._keep()
        self._trainer.log(logged)
        if reason:
            state.log_history[-1]["stopped"] = reason
            control.should_training_stop = True
            control.should_save = False  # a run resumed from here would take one more step

    def load_best(self) -> None:
        """Puts the kept weights into the model of the process that saves it, if any rule asked for them."""
        if self._trainer.args.should_save and self._config.keep_best and self._best.is_dir():
            self._trainer.load_trained(self._best)

    def _measure(self) -> dict[str, float | None]:
        told: list[dict[str, float | None]] = [{}]
        if self._trainer.is_world_process_zero():
            model = self._trainer.accelerator.unwrap_model(self._trainer.model)
            was_training = model.training
            model.eval()
            try:
                with self._trainer.accelerator.autocast():
                    told = [dict(self._probe(model))]
            finally:
                model.train(was_training)
        return dict(broadcast_object_list(told)[0])

    def _reason(self, rates: Mapping[str, float | None]) -> tuple[str | None, bool]:
        """Why the run is to end, if it is, and whether the model is broken: such weights are never the best."""
        broken = [name for name, bound in self._config.abort_when.items() if bound.holds(rates.get(name))]
        if broken:
            return "abort_when holds: " + ", ".join(f"{name} {rates[name]:.3g}" for name in broken), True
        wanted = self._config.stop_when.items()
        reached = bool(wanted) and all(bound.holds(rates.get(name)) for name, bound in wanted)
        return ("stop_when holds" if reached else None), False

    def _keep(self) -> None:
        if self._trainer.args.should_save:
            part = self._best.with_name("best.part")
            shutil.rmtree(part, ignore_errors=True)
            self._trainer.save_trained(part)
            shutil.rmtree(self._best, ignore_errors=True)
            part.rename(self._best)


def stopped(history: Sequence[Mapping[str, Any]]) -> str | None:
    """Why a probe ended the run, out of the trainer's log; None where it ran to its last step."""
    return next((str(entry["stopped"]) for entry in history if "stopped" in entry), None)
