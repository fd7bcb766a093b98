"""Measures the models of a sweep. Questions and judges are read once, and rates are divided by halves of questions."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from vlm_unlearn.config import (
    Recipe,
    RobustnessSuite,
    Suite,
    Sweep,
    merge_keys,
    read_resolved,
    shipped_path,
    validate,
)
from vlm_unlearn.data.processor_call import Processor
from vlm_unlearn.errors import UserError, nearest
from vlm_unlearn.evaluation.generate import generate_run
from vlm_unlearn.evaluation.prompts import suite_prompts
from vlm_unlearn.evaluation.scoring import GradedRun, build_row, read_graded_run, score_run
from vlm_unlearn.evaluation.verdicts import judge_run, splits_judged_by, suite_judges
from vlm_unlearn.generation.hf import HFBackend
from vlm_unlearn.judging.base import build_judge
from vlm_unlearn.modeling.loader import DTYPES, resolve_precision
from vlm_unlearn.records import Prompt, Rate
from vlm_unlearn.robustness.runner import run_robustness
from vlm_unlearn.store import EvaluationRun

WORST_RECOVERY = "worst_recovery"
RECOVERY = "recovery:"  # the beginning of the metrics of single attacks
OnDone = Callable[[str, int, int], None]
Rates = dict[str, Rate]


class Measurement:
    """Measures models with the suite of a sweep.

    Args:
        sweep: The sweep.

    Raises:
        UserError: The suite is invalid, or an objective or a constraint is no metric of it.
    """

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self.suite = read_suite(sweep)
        metrics = [*self.suite.metrics, *(benchmark.name for benchmark in self.suite.benchmarks)]
        for field in ("objectives", "constraints"):
            for name in getattr(sweep, field):
                self._check_metric(name, metrics, field)
        self.judges = {name: (config, build_judge(config)) for name, config in suite_judges(self.suite).items()}

    def _check_metric(self, name: str, metrics: Collection[str], field: str) -> None:
        is_recovery = name == WORST_RECOVERY or name.startswith(RECOVERY)
        if is_recovery and self._sweep.robustness is None:
            raise UserError(
                f"{name} needs attacks on the models. Add the key robustness to the sweep.",
                code="missing-setting",
                field=f"{field}.{name}",
            )
        if not is_recovery and name not in metrics:
            raise UserError(
                f"{self._sweep.suite} has no metric {name}{nearest(name, metrics) or '.'} "
                f"Its metrics are {', '.join(metrics)}.",
                code="unknown-name",
                field=f"{field}.{name}",
            )

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The questions of the suite."""
        return suite_prompts(self.suite)

    @cached_property
    def _first_half(self) -> frozenset[tuple[str, str]]:
        """The questions by which trials are compared, each as its split and its group.

        Splits with the same questions, such as those before and after an attack, are divided alike.
        """
        selected: set[tuple[str, str]] = set()
        for split in dict.fromkeys(prompt.set for prompt in self.prompts):
            groups = list(dict.fromkeys(prompt.group_id for prompt in self.prompts if prompt.set == split))
            rng = random.Random(f"halves-{self._sweep.half_seed}")
            selected |= {(split, group) for group in rng.sample(groups, (len(groups) + 1) // 2)}
        return frozenset(selected)

    def measure(
        self,
        model: str,
        folder: Path,
        name: str,
        loaded: tuple[nn.Module, Processor] | None = None,
        on_done: OnDone | None = None,
    ) -> tuple[Rates, Rates]:
        """Evaluates a model, and returns its rates on both halves of the questions.

        An interrupted evaluation resumes.

        Args:
            model: The model folder.
            folder: The evaluation folder.
            name: The model's name in the folder's summary.
            loaded: The model and its processor, if they are in memory.
            on_done: Called with the stage and the number of finished and of all items.

        Returns:
            The rates by which trials are compared, and the rates that are reported. Benchmarks are not divided.

        Raises:
            UserError: The data of the suite are broken, or a model cannot be loaded.
            RunError: A server does not respond.
        """
        suite = self.suite.model_copy(update={"model": model})
        backend = HFBackend(model, suite.generation, loaded) if suite.generation.backend == "hf" else None
        generate_run(suite, folder, on_done, 0, self.prompts, backend)
        for judge_name, (config, judge) in self.judges.items():
            judge_run(folder, config, on_done, splits_judged_by(suite, judge_name), judge)
        rates = score_run(folder, suite, name).metrics
        if self._sweep.select_on == "all":
            return rates, rates
        graded = read_graded_run(folder, suite)
        benchmarks = {benchmark.name: rates[benchmark.name] for benchmark in suite.benchmarks}
        return (
            build_row(self._half(graded, True), name).metrics | benchmarks,
            build_row(self._half(graded, False), name).metrics | benchmarks,
        )

    def _half(self, graded: GradedRun, first: bool) -> GradedRun:
        """Returns a run with the answers to one half of the questions, without benchmarks."""
        prompts = {
            key: prompt
            for key, prompt in graded.prompts.items()
            if ((prompt.set, prompt.group_id) in self._first_half) == first
        }
        return replace(
            graded,
            suite=graded.suite.model_copy(update={"benchmarks": []}),
            prompts=prompts,
            responses=[response for response in graded.responses if response.prompt_id in prompts],
            verdicts_by_judge={
                name: replace(judge, verdicts=[verdict for verdict in judge.verdicts if verdict.prompt_id in prompts])
                for name, judge in graded.verdicts_by_judge.items()
            },
        )

    def attack(self, model: Path, recipe: Recipe, folder: Path, on_done: OnDone | None) -> dict[str, float | None]:
        """Attacks a model, and returns the share of the knowledge that each attack brings back, and the largest.

        Args:
            model: The training run.
            recipe: Its recipe.
            folder: The folder of the results.
            on_done: Called before each measurement.
        """
        config = self._sweep.robustness
        if config is None:
            return {}
        keys = merge_keys(read_resolved(config.suite), dict(config.suite_overrides))
        suite = validate(RobustnessSuite, keys, str(shipped_path(config.suite)))
        report = run_robustness(
            suite,
            str(model),
            config.base or recipe.model,
            folder,
            config.never_knew,
            config.budget,
            on_done=None if on_done is None else lambda attack, done, total: on_done(f"attack: {attack}", done, total),
        )
        recovery = {f"{RECOVERY}{result.name}": result.recovered.value for result in report.attacks}
        values = [
            result.recovered.value
            for result in report.attacks
            if result.recovered.value is not None and not result.is_score and result.attack != "none"
        ]
        return {WORST_RECOVERY: max(values, default=None), **recovery}


def read_suite(sweep: Sweep) -> Suite:
    """Returns the suite of a sweep. Its model is a placeholder.

    Raises:
        UserError: The suite or one of its overrides is invalid.
    """
    keys = merge_keys(read_resolved(sweep.suite), dict(sweep.suite_overrides))
    return validate(Suite, {**keys, "model": "model"}, str(shipped_path(sweep.suite)))


def evaluation_seconds(folder: Path) -> float:
    """Returns the wall time of the generation of an evaluation."""
    run = EvaluationRun(folder)
    return float(run.read_manifest()["wall_seconds"]) if run.exists() else 0.0


def in_memory(recipe: Recipe, model: Any, processor: Processor, suite: Suite) -> tuple[nn.Module, Processor] | None:
    """Returns a trained model as the evaluation would load it, or None if it has to be loaded from its folder.

    Args:
        recipe: The recipe of the training.
        model: The trained model, which is changed in place: adapters are merged, and weights get the precision of the
            evaluation.
        processor: The processor.
        suite: The suite.
    """
    if recipe.trainable.mode == "qlora" or recipe.training.gradient_checkpointing or suite.generation.backend != "hf":
        return None
    if any(buffer.is_floating_point() for name, buffer in _saved_buffers(model).items() if buffer is not None):
        return None  # loading would convert them too
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    dtype = DTYPES[resolve_precision(suite.generation.precision)]
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.eval()
    return model, processor


def _saved_buffers(model: nn.Module) -> Mapping[str, Any]:
    saved = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}
