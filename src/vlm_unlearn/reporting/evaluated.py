"""Which evaluations are of a trained model and which of its base, and the results in the form that the hub reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlm_unlearn.config import Suite
from vlm_unlearn.errors import UserError
from vlm_unlearn.evaluation.comparison import compare_runs
from vlm_unlearn.evaluation.generate import saved_suite
from vlm_unlearn.records import Row, Summary
from vlm_unlearn.reporting.columns import heading, split_title
from vlm_unlearn.reporting.provenance import own_digest, same_weights
from vlm_unlearn.reporting.summaries import read_summary
from vlm_unlearn.store import read_manifest, user_path

Role = Literal["base", "this", "other"]


@dataclass(frozen=True)
class Evaluated:
    """One evaluation folder, and whose it is."""

    folder: Path
    role: Role
    suite: Suite | None  # None where the folder holds a summary alone
    prompts: str  # SHA-256 of what was asked; "" where that isn't known
    summary: Summary

    @property
    def models(self) -> list[str]:
        return [row.model for row in self.summary.rows]


def read_evaluated(run: Path, base_digest: object, base: str, evaluations: Sequence[Path]) -> list[Evaluated]:
    """Reads evaluations and tells by the digests of the weights, or where there are none by the suite's `model`, whose each is.

    Args:
        run: the training run.
        base_digest: of the weights that it started from.
        base: the recipe's model.

    Raises:
        UserError: an evaluation has no summary.
    """
    own = own_digest(run, base_digest)
    return [_read(folder, run, own, base_digest, base) for folder in evaluations]


def _read(folder: Path, run: Path, own: str | None, base_digest: object, base: str) -> Evaluated:
    summary = read_summary(folder)
    if not (folder / "suite.json").is_file() or not (folder / "manifest.json").is_file():
        return Evaluated(folder, "other", None, "", summary)
    suite, identity = saved_suite(folder), read_manifest(folder)["identity"]
    role: Role = "other"
    is_own, is_base = same_weights(identity.get("model"), own), same_weights(identity.get("model"), base_digest)
    if is_own or (is_own is None and user_path(suite.model).resolve() in (run.resolve(), (run / "model").resolve())):
        role = "this"
    elif is_base or (is_base is None and suite.model == base):
        role = "base"
    return Evaluated(folder, role, suite, str(identity.get("prompts", "")), summary)


def changes(found: Sequence[Evaluated]) -> list[Summary | str]:
    """This model against its base, once for each set of prompts that both were asked; where it can't be done, that it can't."""
    before = {one.prompts: one for one in found if one.role == "base" and one.prompts}
    return [_change(before[one.prompts], one) for one in found if one.role == "this" and one.prompts in before]


def _change(old: Evaluated, new: Evaluated) -> Summary | str:
    name = new.models[0]
    try:
        summary, _ = compare_runs(
            {old.models[0] if old.models[0] != name else f"{name}, base": old.folder, name: new.folder}
        )
    except UserError:  # its message names folders that are no business of the card's readers
        return "Base and model were not compared prompt by prompt; `vlm-unlearn compare` says why."
    return summary


def model_index(name: str, found: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """This model's results as the hub's ``model-index``: one entry for each set of cases, with the metrics over them.

    Values are from 0 to 1; interval, counts and judge stand in a metric's ``args``.
    """
    from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

    results = [
        EvalResult(
            task_type="image-text-to-text",
            metric_value=values.pop("value"),
            metric_type=metric,
            metric_name=heading(metric),
            **data,
        )
        for one in found
        if one.role == "this" and one.suite is not None
        for row in one.summary.rows
        for metric, values, data in _results(row, one.suite, one.prompts)
    ]
    return eval_results_to_model_index(name, results) if results else []


def _results(row: Row, suite: Suite, prompts: str) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Metric, its rate's values and what else the hub is told of it."""
    found = []
    for metric, rate in row.metrics.items():
        if rate.value is not None:
            values = {key: round(value, 4) for key, value in rate.model_dump().items() if value is not None}
            judge = row.judge_of(metric)
            rest = {key: value for key, value in values.items() if key != "value"} | ({"judge": judge} if judge else {})
            found.append(
                (
                    metric,
                    values,
                    {**_dataset(metric, suite), "dataset_args": {"prompts_sha256": prompts}, "metric_args": rest},
                )
            )
    return found


def _dataset(metric: str, suite: Suite) -> Mapping[str, str]:
    """What was asked: a metric's cases and their formats, or the benchmark."""
    config = suite.metrics.get(metric)
    if config is None:
        return {"dataset_type": metric, "dataset_name": heading(metric)}
    formats = dict.fromkeys(case.format for case in suite.splits if case.name in config.splits)
    names = "; ".join(split_title(case) for case in config.splits)
    return {"dataset_type": "+".join(formats), "dataset_name": names, "dataset_config": ",".join(config.splits)}
