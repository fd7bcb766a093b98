"""Runs the trials of a sweep in one process, which loads the base, the processor and the data once."""

from __future__ import annotations

import gc
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import torch
from filelock import FileLock

from vlm_unlearn.config import Recipe, Sweep
from vlm_unlearn.errors import UserError
from vlm_unlearn.modeling.loader import default_device, model_folder, resolve_precision
from vlm_unlearn.store import RunDirectory, digest_text, read_json, write_json
from vlm_unlearn.sweeps.launch import Launcher
from vlm_unlearn.sweeps.measurement import Measurement, evaluation_seconds, in_memory
from vlm_unlearn.sweeps.records import RESULT_FILE, ConfigurationResult, SeedResult
from vlm_unlearn.sweeps.space import Space, Values, configuration_digest
from vlm_unlearn.sweeps.study import HEARTBEAT
from vlm_unlearn.training.callbacks import Probe, was_aborted
from vlm_unlearn.training.inputs import SharedInputs
from vlm_unlearn.training.plan import Plan, plan
from vlm_unlearn.training.runner import build_probe, run_plan

TRIALS, BASE = "trials", "base"
OnProgress = Callable[[str, int, int, str], None]  # stage, done, total, detail
LOCK_SECONDS = 1.0  # between two attempts to lock a configuration that another worker trains


class PrunedTrialError(Exception):
    """The pruner of the study has stopped a trial."""


class TrialRunner:
    """Trains and measures the trials of one worker.

    Args:
        sweep: The sweep.
        space: The space of the sweep.
        out: The folder of the sweep.
        on_progress: Called with the stage, the number of finished and of all items, and details.
        launcher: Starts each training on several GPUs. None trains in this process.

    Raises:
        UserError: The suite or the recipe is invalid.
    """

    def __init__(
        self, sweep: Sweep, space: Space, out: Path, on_progress: OnProgress, launcher: Launcher | None = None
    ) -> None:
        self._sweep = sweep
        self._space = space
        self._out = out
        self._on_progress = on_progress
        self._launcher = launcher
        self._inputs = SharedInputs()
        self.measurement = Measurement(sweep)

    def digest(self, values: Values) -> str:
        """Returns the digest of a trial's configuration. Equal configurations are trained once.

        Raises:
            UserError: A key or a value is invalid.
        """
        return configuration_digest(self._space.recipe(values, Path("trial")), self._sweep.seeds)

    def run(self, values: Values, trial: optuna.Trial | None = None) -> tuple[ConfigurationResult, bool]:
        """Trains and measures a configuration, unless that has been done already.

        A training that was killed resumes from its last checkpoint.

        Args:
            values: The values of the trial.
            trial: The trial of the study, which gets the rates of the probe if trials are pruned.

        Returns:
            The result, and whether it existed already.

        Raises:
            UserError: The recipe does not fit the data or the model.
            RunError: The training has diverged.
            PrunedTrialError: The pruner has stopped the trial.
        """
        digest = self.digest(values)
        folder = self._out / TRIALS / digest
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", poll_interval=LOCK_SECONDS):
            existing = read_result(folder)
            if existing is not None:
                return existing, True
            started = time.monotonic()
            result = self._run_seeds(values, digest, folder, trial)
            result = result.model_copy(update={"seconds": round(time.monotonic() - started, 3)})
            write_json(folder / RESULT_FILE, result.model_dump(mode="json"))
        return result, False

    def _run_seeds(self, values: Values, digest: str, folder: Path, trial: optuna.Trial | None) -> ConfigurationResult:
        results: list[SeedResult] = []
        seeds: list[int] | list[None] = self._sweep.seeds or [None]
        for seed in seeds:
            recipe = self._space.recipe(values, folder, seed)
            seed_folder = folder / f"seed-{recipe.training.seed}"
            recipe = recipe.model_copy(update={"output": seed_folder / "run"})
            result = self._run_seed(recipe, seed_folder, trial)
            if isinstance(result, str):
                return ConfigurationResult(digest=digest, seeds=results, aborted=result)
            results.append(result)
        return ConfigurationResult(digest=digest, seeds=results)

    def _run_seed(self, recipe: Recipe, folder: Path, trial: optuna.Trial | None) -> SeedResult | str:
        """Trains and measures a model. Returns the reason if its probe has aborted the training."""
        measured: list[SeedResult] = []
        name = folder.parent.name

        def measure(loaded: Any) -> None:
            selection, reported = self.measurement.measure(
                str(recipe.output / "model"), folder / "evaluation", name, loaded, self._report("evaluate")
            )
            result = SeedResult(
                seed=recipe.training.seed,
                selection=selection,
                reported=reported,
                model=str((recipe.output / "model").relative_to(self._out)),
                training_seconds=RunDirectory(recipe.output).read_manifest()["wall_seconds"],
                generation_seconds=evaluation_seconds(folder / "evaluation"),
            )
            measured.append(result)

        self.evaluate_base(recipe)
        if self._launcher is not None:
            self._launcher.train(recipe, folder)
        else:
            self._train(recipe, trial, measure)
        stopped = RunDirectory(recipe.output).read_manifest().get("stopped")
        if was_aborted(stopped):
            return str(stopped)
        if not measured:  # the model was trained earlier, or by other processes, or cannot be measured in memory
            measure(None)
        (result,) = measured
        if self._sweep.robustness is not None:
            recovery = self.measurement.attack(recipe.output, recipe, folder / "robustness", self._report("attack"))
            result = result.model_copy(update={"recovery": recovery})
        gc.collect()
        return result

    def _train(self, recipe: Recipe, trial: optuna.Trial | None, measure: Callable[[Any], None]) -> None:
        """Trains in this process, and measures the model while it is in memory."""
        planned = plan(recipe, self._inputs)

        def on_trained(model: torch.nn.Module) -> None:
            if was_aborted(RunDirectory(recipe.output).read_manifest().get("stopped")):
                return
            loaded = in_memory(recipe, model, planned.processor, self.measurement.suite)
            if loaded is not None:
                measure(loaded)

        probe = self._probe(planned, trial)
        run_plan(planned, self._on_step, probe, inputs=self._inputs, on_trained=on_trained)

    def _on_step(self, step: int, steps: int, terms: Mapping[str, float]) -> None:
        self._on_progress("train", step, steps, f"loss {float(terms['loss']):.3f}" if "loss" in terms else "")

    def _report(self, stage: str) -> Callable[[str, int, int], None]:
        return lambda detail, done, total: self._on_progress(stage, done, total, detail)

    def _probe(self, planned: Plan, trial: optuna.Trial | None) -> Probe | None:
        """Returns the probe of a recipe. If trials are pruned, it passes its rates to the study."""
        if not self._sweep.prune or trial is None:
            return None  # the training builds the probe of the recipe itself
        probe, (objective,) = build_probe(planned), self._sweep.objectives
        if probe is None:
            raise UserError(
                "prune needs a probe. Add the key probe to the overrides of the sweep.",
                code="missing-setting",
                field="prune",
            )
        return _PruningProbe(probe, trial, objective)

    def evaluate_base(self, recipe: Recipe) -> None:
        """Measures the model before unlearning, once for all trials with the same model."""
        path = model_folder(recipe.model)
        folder = self._out / BASE / digest_text(str(path.absolute()))[:16]
        if (folder / RESULT_FILE).is_file():
            return
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", poll_interval=LOCK_SECONDS):
            if (folder / RESULT_FILE).is_file():
                return
            loaded = None
            if self.measurement.suite.generation.backend == "hf" and self._launcher is None:
                precision = resolve_precision(self.measurement.suite.generation.precision)
                model = self._inputs.model(path, precision, recipe.training.attn_implementation, False)
                loaded = model.to(default_device()).eval(), self._inputs.processor(path, recipe.image_aspect_ratio)
            selection, reported = self.measurement.measure(
                recipe.model, folder / "evaluation", "base", loaded, self._report("evaluate the base")
            )
            result = SeedResult(seed=0, selection=selection, reported=reported)
            write_json(folder / RESULT_FILE, result.model_dump(mode="json"))


class _PruningProbe:
    """Passes the rates of a probe to the study, and stops the trial if the pruner says so."""

    def __init__(self, probe: Probe, trial: optuna.Trial, objective: str) -> None:
        self._probe = probe
        self._trial = trial
        self._objective = objective
        self._count = 0

    @property
    def digest(self) -> str:
        """The digest of the probe."""
        return self._probe.digest

    def __call__(self, model: Any) -> Mapping[str, float | None]:
        """Returns the rates of a model.

        Raises:
            PrunedTrialError: The pruner has stopped the trial.
        """
        rates = self._probe(model)
        value = rates.get(self._objective)
        self._count += 1
        if value is not None:
            self._trial.report(value, self._count)
            if self._trial.should_prune():
                raise PrunedTrialError(f"{self._objective} {value:.3g} at probe {self._count}")
        return rates


def read_result(folder: Path) -> ConfigurationResult | None:
    """Returns the result of a configuration, or None if it is not finished."""
    file = folder / RESULT_FILE
    return ConfigurationResult.model_validate(read_json(file)) if file.is_file() else None


def read_base(out: Path) -> SeedResult | None:
    """Returns the rates of the model before unlearning. None if there are none, or several models."""
    files = sorted((out / BASE).glob(f"*/{RESULT_FILE}"))
    return SeedResult.model_validate(read_json(files[0])) if len(files) == 1 else None


def delete_model(out: Path, digest: str) -> None:
    """Deletes the trained models of a configuration. Its rates, its answers and its recipe stay."""
    for run in (out / TRIALS / digest).glob("seed-*/run"):
        shutil.rmtree(RunDirectory(run).model, ignore_errors=True)


@contextmanager
def heartbeat(trial: optuna.Trial, seconds: float) -> Iterator[None]:
    """Within the block, a thread sets the trial's time of the last sign of life.

    Args:
        trial: The trial.
        seconds: Seconds between two signs.
    """
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(seconds):
            try:
                trial.set_user_attr(HEARTBEAT, time.time())
            except Exception:  # the storage is away for a moment, or another worker has ended the trial
                continue

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
