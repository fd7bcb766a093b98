"""The suite of an imported run: some splits of a suite, with the metrics that these splits and their answers allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vlm_unlearn.config import Suite, validate
from vlm_unlearn.data.answer_formats.base import AnswerFormat
from vlm_unlearn.errors import UserError, nearest, quoted
from vlm_unlearn.evaluation.prompts import image_roots


def split_names(
    suite: Suite, files: Mapping[Path, str | None], answer_format: AnswerFormat, requested: Sequence[str]
) -> list[str]:
    """Returns the names of the splits and benchmarks to import, in the order of the suite.

    Args:
        suite: The suite.
        files: The answer files, with the split that the user has named for each.
        answer_format: The format of the files.
        requested: The splits that the user has requested.

    Raises:
        UserError: There is no split of a name, or a file needs one.
    """
    available = list(image_roots(suite))
    named = {split for split in files.values() if split is not None}
    for name in (*requested, *named):
        if name not in available:
            raise UserError(
                f"the suite has no split {quoted(name)}{nearest(name, available) or '.'} "
                f"Available: {', '.join(available)}.",
                code="unknown-name",
                field="--split",
            )
    unnamed = [path for path, split in files.items() if split is None]
    if unnamed and answer_format.needs_split:
        raise UserError(
            "the answers do not say which questions they are for. Pass SPLIT=FILE with the split of the suite: "
            f"{', '.join(available)}.",
            code="missing-setting",
            file=unnamed[0],
        )
    chosen = {*requested, *named} if requested or not unnamed else set(available)
    return [name for name in available if name in chosen]


def select_splits(suite: Suite, names: Sequence[str]) -> tuple[Suite, list[str], list[str]]:
    """Returns a suite with some of its splits, the names of the others, and those of the metrics that need them."""
    left_out = [name for name in image_roots(suite) if name not in names]
    if not left_out:
        return suite, [], []
    value = suite.model_dump(mode="json", exclude_unset=True)
    metrics: list[str] = []
    for kind in ("splits", "benchmarks"):
        value[kind] = [item for item in value.get(kind, []) if item["name"] in names]
    for kind, configs in (("metrics", suite.metrics), ("paper_metrics", suite.paper_metrics)):
        complete = {name for name, metric in configs.items() if set(metric.splits) <= set(names)}
        metrics += [name for name in configs if name not in complete]
        value[kind] = {name: metric for name, metric in value.get(kind, {}).items() if name in complete}
    return validate(Suite, value, "the suite"), left_out, list(dict.fromkeys(metrics))


def exclude_missing(suite: Suite, splits: set[str]) -> tuple[Suite, list[str]]:
    """Returns a suite whose metrics over some splits exclude failed answers, and the names of the changed metrics.

    Args:
        suite: The suite.
        splits: The splits with missing answers. With ``on_error: count_as_miss``, a missing answer to an unsafe
            question would count as one without harm.
    """
    value = suite.model_dump(mode="json", exclude_unset=True)
    names = []
    for kind, configs in (("metrics", suite.metrics), ("paper_metrics", suite.paper_metrics)):
        for name, metric in configs.items():
            if metric.on_error == "count_as_miss" and set(metric.splits) & splits:
                value[kind][name]["on_error"] = "exclude"
                names.append(name)
    return (validate(Suite, value, "the suite") if names else suite), list(dict.fromkeys(names))
