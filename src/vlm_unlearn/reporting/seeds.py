"""Groups of models that differ in nothing but the training seed, with the mean and the spread of their rates."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_unlearn.records import Row
from vlm_unlearn.reporting.columns import columns
from vlm_unlearn.reporting.provenance import ModelProvenance, training_seed
from vlm_unlearn.store import digest_json


@dataclass(frozen=True)
class SeedGroup:
    """Models of one configuration.

    Attributes:
        name: The folder of their training runs, or the method.
        models: The models by seed.
    """

    name: str
    models: Mapping[int, str]


@dataclass(frozen=True)
class SeedRates:
    """A metric of a group: its mean and standard deviation over the models, and the value of each."""

    group: str
    metric: str
    heading: str
    mean: float
    spread: float
    values: Mapping[int, float]


def seed_groups(sources: Mapping[str, ModelProvenance]) -> list[SeedGroup]:
    """Returns the groups of two models or more whose training runs differ in nothing but the seed."""
    by_configuration: dict[str, dict[int, str]] = {}
    for model, source in sources.items():
        seed = training_seed(source)
        if seed is not None:
            key = digest_json(_without_seed(source.training_manifest["identity"]))
            by_configuration.setdefault(key, {}).setdefault(seed, model)
    groups = []
    for models in by_configuration.values():
        if len(models) > 1:
            first = sources[next(iter(models.values()))]
            groups.append(SeedGroup(_group_name(first), dict(sorted(models.items()))))
    return groups


def seed_rates(groups: Sequence[SeedGroup], rows: Sequence[Row]) -> list[SeedRates]:
    """Returns the mean, the spread and the single values of each metric that all models of a group have."""
    by_model = {row.model: row for row in rows}
    results = []
    for group in groups:
        members = {seed: by_model[model] for seed, model in group.models.items() if model in by_model}
        for metric, heading, _ in columns(rows):
            values = {seed: rate.value for seed, row in members.items() if (rate := row.metrics.get(metric))}
            measured = {seed: value for seed, value in values.items() if value is not None}
            if len(measured) < 2 or len(measured) < len(members):
                continue
            mean, spread = statistics.fmean(measured.values()), statistics.stdev(measured.values())
            results.append(SeedRates(group.name, metric, heading, mean, spread, measured))
    return results


def models_with_one_seed(sources: Mapping[str, ModelProvenance]) -> list[str]:
    """Returns the trained models that no other seed of the same configuration accompanies."""
    grouped = {model for group in seed_groups(sources) for model in group.models.values()}
    return [model for model, source in sources.items() if training_seed(source) is not None and model not in grouped]


def _without_seed(identity: Mapping[str, Any]) -> dict[str, Any]:
    recipe = dict(identity["recipe"])
    recipe["training"] = {key: value for key, value in recipe["training"].items() if key != "seed"}
    return {**identity, "recipe": recipe}


def _group_name(source: ModelProvenance) -> str:
    run = source.training
    if run is not None and run.name.startswith("seed-"):
        return run.resolve().parent.name
    method = source.training_manifest["identity"]["recipe"].get("method")
    return str(method.get("name", "model")) if isinstance(method, dict) else "model"
