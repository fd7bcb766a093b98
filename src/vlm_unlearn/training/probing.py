"""Measures the model while it trains and stops when it has forgotten enough, or is broken: unlearning overshoots."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback

from vlm_unlearn.config import ProbeConfig
from vlm_unlearn.training.trainer import UnlearningTrainer


class Probe(Protocol):
    """Measures a model; `vlm_unlearn.evaluation.probe` has the one that asks and grades."""

    def __call__(self, model: Any) -> Mapping[str, float | None]:
        """Rates by metric name; None where nothing could be scored."""


class Prober(TrainerCallback):
    """Probes every few steps, logs the rates, and applies the recipe's stop and keep-best rules.

    What is decided depends on the log alone, which a checkpoint carries, and probing draws no random numbers: a resumed run decides as
    an uninterrupted one.
    """

    def __init__(self, config: ProbeConfig, probe: Probe, trainer: UnlearningTrainer, output: Path) -> None:
        self._config = config
        self._probe = probe
        self._trainer = trainer
        self._best = output / "best"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._config.every and state.global_step < state.max_steps:
            return
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        was_training = model.training
        model.eval()
        try:
            rates = dict(self._probe(model))
        finally:
            model.train(was_training)
        entry: dict[str, Any] = {"probe": rates, "step": state.global_step}
        if self._config.keep_best:
            entry["score"] = sum(weight * (rates.get(name) or 0.0) for name, weight in self._config.keep_best.items())
            if entry["score"] > self._best_score(state.log_history):
                self._keep()
        reached = [all(bound.holds(rates.get(name)) for name, bound in self._config.stop_when.items())] if self._config.stop_when else []
        broken = [name for name, bound in self._config.abort_when.items() if bound.holds(rates.get(name))]
        if any(reached) or broken:
            entry["stopped"] = f"broken: {', '.join(broken)}" if broken else "stop_when holds"
            control.should_training_stop = True
            control.should_save = False  # a run resumed from here would take one more step
        state.log_history.append(entry)

    def load_best(self) -> None:
        """Puts the kept weights into the model, if any rule asked for them."""
        if self._config.keep_best and self._best.is_dir():
            self._trainer.load_trained(self._best)

    def _best_score(self, history: list[dict[str, Any]]) -> float:
        return max((entry["score"] for entry in history if "score" in entry), default=float("-inf"))

    def _keep(self) -> None:
        if self._trainer.args.should_save:
            part = self._best.with_name("best.part")
            shutil.rmtree(part, ignore_errors=True)
            self._trainer.save_trained(part)
            shutil.rmtree(self._best, ignore_errors=True)
            part.rename(self._best)
