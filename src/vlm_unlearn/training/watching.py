"""Keeps a run's log and cost on disk while it trains, draws the loss curves, and tells progress."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from vlm_unlearn.records import PROBE
from vlm_unlearn.store import note_cost, write_text

OnStep = Callable[[int, int, Mapping[str, float]], None]  # step, steps, loss parts


def tensorboard(output: Path) -> TrainerCallback:
    """Writes the log for TensorBoard into the run's folder; transformers would put it beside the checkpoints, which go in the end."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(log_dir=str(output / "tensorboard")))


class Watch(TrainerCallback):
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
            note_cost(self._output, self.seconds())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.write_log(state)

    def write_log(self, state: Any) -> None:
        """Rewrites the log from the trainer's history, which a checkpoint carries: no line is lost or doubled by a kill."""
        if not self._writes:
            return
        told = [entry for entry in state.log_history if "loss" in entry or any(name.startswith(PROBE) for name in entry)]
        lines = [dict(sorted(entry.items())) for entry in told]
        for line in lines:
            line.pop("epoch", None)  # of the endless stream, not of the data
        write_text(self._output / "log.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
