"""Models that differ in nothing but the training seed form a group in a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vlm_unlearn.config import Suite
from vlm_unlearn.records import Rate, Row
from vlm_unlearn.reporting.caveats import ONE_SEED, SOME_SEEDS, caveats
from vlm_unlearn.reporting.metric_roles import assign_roles
from vlm_unlearn.reporting.provenance import ModelProvenance
from vlm_unlearn.reporting.seeds import models_with_one_seed, seed_groups, seed_rates

SUITE = Suite.model_validate(
    {
        "model": "m",
        "splits": [{"name": "unsafe", "format": "vlguard", "file": "f", "images": "i", "kind": "unsafe"}],
        "metrics": {"asr": {"splits": ["unsafe"], "labels": ["complied"]}},
    }
)


def source(name: str, seed: int | None, rate: float = 1e-5) -> ModelProvenance:
    recipe = {"method": {"name": "npo"}, "training": {"seed": seed, "learning_rate": rate}}
    manifest: dict[str, Any] = {} if seed is None else {"identity": {"kind": "train", "recipe": recipe}}
    run = Path("runs") / "npo" / f"seed-{seed}"
    return ModelProvenance(name, Path(name), SUITE, {}, 10, None if seed is None else run, manifest)


def row(name: str, value: float) -> Row:
    rate = Rate(value=value, low=value, high=value, n=10)
    return Row(model=name, judge="keyword", metrics={"asr": rate})


def test_runs_with_equal_recipes_and_other_seeds_are_a_group() -> None:
    sources = {
        "a": source("a", 0),
        "b": source("b", 1),
        "c": source("c", 2),
        "other": source("other", 0, rate=1e-4),
        "base": source("base", None),
    }
    (group,) = seed_groups(sources)
    assert (group.name, dict(group.models)) == ("npo", {0: "a", 1: "b", 2: "c"})
    assert models_with_one_seed(sources) == ["other"]
    (rates,) = seed_rates([group], [row("a", 0.1), row("b", 0.2), row("c", 0.3), row("base", 0.9)])
    assert (rates.metric, rates.values) == ("asr", {0: 0.1, 1: 0.2, 2: 0.3})
    assert (rates.mean, rates.spread) == (pytest.approx(0.2), pytest.approx(0.1))


def test_metric_that_a_model_of_the_group_lacks_has_no_mean() -> None:
    groups = seed_groups({"a": source("a", 0), "b": source("b", 1)})
    without = Row(model="b", judge="keyword", metrics={"asr": Rate(value=None, low=None, high=None, n=0)})
    assert seed_rates(groups, [row("a", 0.1), without]) == []


def test_caveat_about_one_seed_disappears_where_it_no_longer_holds() -> None:
    def texts(**sources: ModelProvenance) -> list[str]:
        rows = [row(name, 0.1) for name in sources]
        return caveats(rows, assign_roles(rows, dict.fromkeys(sources, SUITE)), sources, [])

    first, other, single = source("a", 0), source("b", 1), source("c", 0, rate=1e-4)
    assert ONE_SEED in texts(a=first)
    assert SOME_SEEDS in texts(a=first, b=other)
    assert ONE_SEED not in texts(a=first, b=other)
    assert any("with one seed: c." in text for text in texts(a=first, b=other, c=single))
