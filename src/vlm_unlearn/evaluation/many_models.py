"""Evaluates several models with one suite: the same questions and judges for all."""

from __future__ import annotations

import glob
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from vlm_unlearn.config import Suite
from vlm_unlearn.errors import RunError, UserError, quoted
from vlm_unlearn.evaluation.generate import OnDone, generate_run
from vlm_unlearn.evaluation.prompts import suite_prompts
from vlm_unlearn.evaluation.scoring import score_run
from vlm_unlearn.evaluation.verdicts import judge_run, splits_judged_by, suite_judges
from vlm_unlearn.judging.base import build_judge
from vlm_unlearn.store import EvaluationRun, RunDirectory, user_path

EVALUATIONS = "evaluations"
_MODEL_FILES = ("config.json", "adapter_config.json")


@dataclass(frozen=True)
class EvaluatedModels:
    """The result of an evaluation of several models.

    Attributes:
        runs: The evaluation folder of each model that was evaluated, by name, in the requested order.
        errors: The errors of the other models, by name.
    """

    runs: Mapping[str, Path]
    errors: Mapping[str, UserError | RunError]


def find_models(value: object) -> dict[str, str] | None:
    """Returns the models of the key ``model`` by their names, or None if the value is a single model.

    Args:
        value: A list of models, or a pattern of folders such as ``runs/*``. A folder that matches a pattern without
            being a training run or a model is left out.

    Raises:
        UserError: A pattern matches no model, a model occurs twice, or an entry is not text.
    """
    entries = value if isinstance(value, list) else [value]
    is_pattern = [isinstance(entry, str) and glob.has_magic(entry) for entry in entries]
    if not isinstance(value, list) and not any(is_pattern):
        return None
    models: list[str] = []
    for entry, expand in zip(entries, is_pattern, strict=True):
        if not isinstance(entry, str) or not entry:
            raise UserError(
                f"{quoted(entry)} is not the name of a model. Use model=[runs/npo,runs/rmu] or model='runs/*'.",
                code="invalid-value",
                field="model",
            )
        models += _matches(entry) if expand else [entry]
    if not models:
        raise UserError("the list of models is empty.", code="missing-setting", field="model")
    names = _unique_names(models)
    return dict(zip(names, models, strict=True))


def _matches(pattern: str) -> list[str]:
    folders = [Path(match) for match in sorted(glob.glob(str(user_path(pattern))))]
    models = [str(folder) for folder in folders if _is_model(folder) or _is_model(RunDirectory(folder).model)]
    if not models:
        raise UserError(
            f"no folder that matches {quoted(pattern)} contains a model or a finished training run.",
            code="model-not-found",
            field="model",
        )
    return models


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _MODEL_FILES)


def _unique_names(models: Sequence[str]) -> list[str]:
    """Returns a folder name for each model: the last part of its path, or the last two if that is not unique."""
    for model in models:
        if models.count(model) > 1:
            raise UserError(f"{quoted(model)} occurs twice.", code="duplicate-id", field="model")
    parts = [[part for part in Path(user_path(model)).absolute().parts if part != "/"] for model in models]
    names = [part[-2] if part[-1] == "model" and len(part) > 1 else part[-1] for part in parts]
    if len(set(names)) < len(names):
        names = ["_".join(part[-2:]) for part in parts]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise UserError(
                f"two models have the name {quoted(name)}. Evaluate one of them separately with --out.",
                code="duplicate-id",
                field="model",
            )
    return names


def evaluate_models(
    suite: Suite,
    models: Mapping[str, str],
    out: str | PathLike[str],
    on_done: OnDone | None = None,
    verify_batching: int = 0,
    processes: int | None = None,
) -> EvaluatedModels:
    """Evaluates several models by a suite, each into ``evaluations/NAME``. It resumes after an interruption.

    First all models generate, one after the other with one reading of the prompts, or several at the same time with one
    GPU each. Then the judges, which are built once, grade all answers. A model that fails does not stop the others.

    Args:
        suite: The suite. Its `model` is not used.
        models: The models by name.
        out: The folder of the evaluations.
        on_done: Called with the stage and the number of finished and of all items.
        verify_batching: As in `generate_run`.
        processes: The number of models that generate at the same time. None: the number of GPUs, or 1 without one.

    Raises:
        UserError: The suite or its data are broken, or `out` contains another run.
        RunError: A judge's server does not respond.
    """
    folder = RunDirectory(out)
    judges = {name: (config, build_judge(config)) for name, config in suite_judges(suite).items()}
    with folder.lock():
        folder.open({"kind": "evaluate_models"})
        suites = {name: suite.model_copy(update={"model": model}) for name, model in models.items()}
        runs = {name: folder.path / EVALUATIONS / name for name in models}
        if not all(EvaluationRun(run).is_finished for run in runs.values()):
            for _, judge in judges.values():
                judge.check_available()
        count = min(len(models), processes or _num_gpus() or 1)
        generate = _generate_in_processes if count > 1 else _generate_one_by_one
        errors = dict(generate(suites, runs, on_done, verify_batching, count))
        done = {name: run for name, run in runs.items() if name not in errors}
        for judge_name, (config, judge) in judges.items():
            for name, run in done.items():
                judge_run(run, config, _named(on_done, name), splits_judged_by(suite, judge_name), judge)
        for name, run in done.items():
            score_run(run, suites[name], name)
    return EvaluatedModels(done, errors)


def _named(on_done: OnDone | None, name: str) -> OnDone | None:
    return None if on_done is None else lambda stage, done, total: on_done(f"{name}: {stage}", done, total)


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _generate_one_by_one(
    suites: Mapping[str, Suite], runs: Mapping[str, Path], on_done: OnDone | None, verify_batching: int, _processes: int
) -> Iterator[tuple[str, UserError | RunError]]:
    """Generates the answers of all models, and yields the errors by the names of the models."""
    prompts = suite_prompts(next(iter(suites.values())))
    for name, suite in suites.items():
        try:
            generate_run(suite, runs[name], _named(on_done, name), verify_batching, prompts)
        except (UserError, RunError) as error:
            yield name, error


def _generate_in_processes(
    suites: Mapping[str, Suite], runs: Mapping[str, Path], on_done: OnDone | None, verify_batching: int, processes: int
) -> Iterator[tuple[str, UserError | RunError]]:
    """Does the same in several processes, each of which has one GPU if there are any."""
    context = multiprocessing.get_context("spawn")
    devices = context.SimpleQueue()
    for index in range(processes):
        devices.put(index % max(1, _num_gpus()))
    with ProcessPoolExecutor(processes, context, _take_device, (devices,)) as pool:
        try:
            names = {pool.submit(_generate, suite, runs[name], verify_batching): name for name, suite in suites.items()}
            for done, future in enumerate(as_completed(names), start=1):
                name = names[future]
                try:
                    error = future.result()
                except BrokenExecutor:
                    error = RunError("a process that generates answers has ended.", code="worker-died", file=runs[name])
                if error is not None:
                    yield name, error
                if on_done:
                    on_done("generate: models", done, len(names))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _take_device(devices: Any) -> None:
    """Gives a new process one of the GPUs, before it initializes CUDA."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    index = devices.get()
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[index] if index < len(visible) else str(index)


def _generate(suite: Suite, run: Path, verify_batching: int) -> UserError | RunError | None:
    try:
        generate_run(suite, run, None, verify_batching)
    except (UserError, RunError) as error:
        return error
    return None
