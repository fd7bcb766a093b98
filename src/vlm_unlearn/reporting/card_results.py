"""Reads the evaluations of a model card: whose they are, what changed, and the results in the hub's format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlm_unlearn.config import Suite
from vlm_unlearn.errors import UserError
from vlm_unlearn.evaluation.comparison import compare_runs
from vlm_unlearn.evaluation.generate import saved_suite
from vlm_unlearn.records import Row, Summary
from vlm_unlearn.reporting.columns import heading, split_title
from vlm_unlearn.reporting.provenance import same_weights, trained_digest
from vlm_unlearn.reporting.summaries import read_summary
from vlm_unlearn.store import EvaluationRun, RunDirectory, user_path

if TYPE_CHECKING:
    from huggingface_hub.repocard_data import EvalResult

Subject = Literal["base", "this", "other"]  # the base model, the model of the card, or another model


@dataclass(frozen=True)
class CardEvaluation:
    """One evaluation of a model card."""

    path: Path
    subject: Subject
    suite: Suite | None  # None if the folder contains only a summary
    prompts: str  # the SHA-256 of the prompts, or empty if it is unknown
    summary: Summary

    @property
    def models(self) -> list[str]:
        """The names of the evaluated models."""
        return [row.model for row in self.summary.rows]


def read_evaluations(run: Path, base_digest: object, base: str, folders: Sequence[Path]) -> list[CardEvaluation]:
    """Reads evaluations and determines which model each of them is about.

    The digest of the weights decides. If there is none, as for a model on a server, the suite's `model` decides.

    Args:
        run: The training run of the card's model.
        base_digest: The digest of the weights from which the run started.
        base: The recipe's model.
        folders: The evaluation folders.

    Raises:
        UserError: An evaluation has no summary.
    """
    digest = trained_digest(run, base_digest)
    return [_read_evaluation(path, RunDirectory(run), digest, base_digest, base) for path in folders]


def _read_evaluation(
    path: Path, training: RunDirectory, digest: str | None, base_digest: object, base: str
) -> CardEvaluation:
    summary, run = read_summary(path), EvaluationRun(path)
    if not run.suite_file.is_file() or not run.exists():
        return CardEvaluation(path, "other", None, "", summary)
    suite, identity = saved_suite(run), run.read_manifest()["identity"]
    subject: Subject = "other"
    is_this, is_base = same_weights(identity.get("model"), digest), same_weights(identity.get("model"), base_digest)
    training_paths = (training.path.resolve(), training.model.resolve())
    if is_this or (is_this is None and user_path(suite.model).resolve() in training_paths):
        subject = "this"
    elif is_base or (is_base is None and suite.model == base):
        subject = "base"
    return CardEvaluation(path, subject, suite, str(identity.get("prompts", "")), summary)


def compare_with_base(evaluations: Sequence[CardEvaluation]) -> list[Summary | str]:
    """Compares the card's model with its base, once for each set of prompts that both answered.

    Returns:
        The comparisons. A string takes the place of a comparison that failed.
    """
    base = {evaluation.prompts: evaluation for evaluation in evaluations if evaluation.subject == "base"}
    return [
        _compare(base[evaluation.prompts], evaluation)
        for evaluation in evaluations
        if evaluation.subject == "this" and evaluation.prompts and evaluation.prompts in base
    ]


def _compare(base: CardEvaluation, evaluation: CardEvaluation) -> Summary | str:
    name = evaluation.models[0]
    base_name = base.models[0] if base.models[0] != name else f"{name}, base"
    try:
        summary, _ = compare_runs({base_name: base.path, name: evaluation.path})
    except UserError:  # its message contains paths, which do not belong into a published card
        return "The model and its base could not be compared prompt by prompt. `vlm-unlearn compare` prints the reason."
    return summary


def model_index(name: str, evaluations: Sequence[CardEvaluation]) -> list[dict[str, Any]]:
    """Returns the results of the card's model as the hub's ``model-index``.

    There is one entry for each set of splits, with the metrics over them. Values are from 0 to 1. The interval, the
    counts and the judge are in each metric's ``args``.

    Args:
        name: The model's name on the hub.
        evaluations: All evaluations of the card. Those of other models are ignored.
    """
    from huggingface_hub.repocard_data import eval_results_to_model_index

    results = [
        _eval_result(row, metric, evaluation.suite, evaluation.prompts)
        for evaluation in evaluations
        if evaluation.subject == "this" and evaluation.suite is not None
        for row in evaluation.summary.rows
        for metric, rate in row.metrics.items()
        if rate.value is not None
    ]
    return eval_results_to_model_index(name, results) if results else []


def _eval_result(row: Row, metric: str, suite: Suite, prompts: str) -> EvalResult:
    """Returns a rate with its splits and their formats, or its benchmark."""
    from huggingface_hub.repocard_data import EvalResult

    values = {key: round(value, 4) for key, value in row.metrics[metric].model_dump().items() if value is not None}
    config = suite.metrics.get(metric)
    formats, titles, splits = metric, heading(metric), None  # of a benchmark
    if config is not None:
        formats = "+".join(dict.fromkeys(split.format for split in suite.splits if split.name in config.splits))
        titles, splits = "; ".join(map(split_title, config.splits)), ",".join(config.splits)
    judge = {"judge": row.judge_of(metric)} if row.judge_of(metric) else {}
    return EvalResult(
        task_type="image-text-to-text",
        metric_value=values.pop("value"),
        metric_type=metric,
        metric_name=heading(metric),
        metric_args={**values, **judge},
        dataset_type=formats,
        dataset_name=titles,
        dataset_config=splits,
        dataset_args={"prompts_sha256": prompts},
    )
