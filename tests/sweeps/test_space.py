"""The search space of a sweep: choices, ranges, conditions, grids, and errors that name the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest

from helpers import raises_code
from vlm_unlearn.config import Sweep, load, validate
from vlm_unlearn.sweeps.space import Space, configuration_digest
from vlm_unlearn.sweeps.study import quiet_optuna

OBJECTIVES = {"asr": "min", "utility": "max"}


def sweep(space: dict[str, Any], **changes: Any) -> Sweep:
    keys = {
        "recipe": "tiny/npo",
        "suite": "suites/tiny",
        "sampler": "random",
        "trials": 5,
        "space": space,
        "objectives": OBJECTIVES,
        "overrides": {"model": "m", "data": "d"},
    }
    return validate(Sweep, {**keys, **changes}, "sweep.yaml")


def test_grid_contains_every_combination_once_and_respects_conditions() -> None:
    space = Space(
        sweep(
            {
                "recipe": ["tiny/npo", "tiny/po"],
                "method.beta": {"low": 0.1, "high": 0.3, "step": 0.1, "when": {"method": "npo"}},
                "training.per_device_train_batch_size": {"low": 1, "high": 2},
            },
            sampler="grid",
        )
    )
    grid = space.grid()
    assert len(grid) == 3 * 2 + 2
    assert [values["method.beta"] for values in grid if "method.beta" in values] == [0.1, 0.1, 0.2, 0.2, 0.3, 0.3]
    assert all("method.beta" not in values for values in grid if values["recipe"] == "tiny/po")
    digests = {configuration_digest(space.recipe(values, Path("o")), []) for values in grid}
    assert len(digests) == len(grid)


def test_condition_may_name_an_earlier_setting_or_a_nested_key() -> None:
    space = Space(
        sweep(
            {
                "trainable.mode": ["full", "lora"],
                "trainable.lora.r": {"choices": [4, 8], "when": {"trainable.mode": "lora"}},
                "method.beta": {"choices": [0.1], "when": {"recipe": "tiny/npo"}},
            },
            sampler="grid",
        )
    )
    assert [values.get("trainable.lora.r") for values in space.grid()] == [None, 4, 8]
    assert all(values["method.beta"] == 0.1 for values in space.grid())


def test_sampled_values_lie_in_their_ranges_and_are_read_back_from_the_study() -> None:
    quiet_optuna()
    space = Space(
        sweep(
            {
                "training.learning_rate": {"low": "1e-5", "high": "1e-3", "log": True},
                "training.max_steps": {"low": 10, "high": 30, "step": 10},
                "trainable.layers": [None, [0], [0, 1]],
                "method": ["npo", {"name": "rmu", "layer": 0}],
            }
        )
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        trial = study.ask()
        values = space.draw(trial)
        assert 1e-5 <= values["training.learning_rate"] <= 1e-3
        assert values["training.max_steps"] in (10, 20, 30)
        assert values["trainable.layers"] in (None, [0], [0, 1])
        assert space.values_of(trial.params) == values
        assert space.params_of(values) == trial.params
        recipe = space.recipe(values, Path("o"), seed=3)
        assert (recipe.training.seed, recipe.training.learning_rate) == (3, values["training.learning_rate"])
        assert recipe.method.name == (values["method"] if isinstance(values["method"], str) else "rmu")


def test_seed_and_output_do_not_make_a_configuration_different_but_seeds_do() -> None:
    space = Space(sweep({"method.beta": [0.1, 0.2]}))
    first, second = (space.recipe({"method.beta": 0.1}, Path(name)) for name in "ab")
    assert configuration_digest(first, [0, 1]) == configuration_digest(second, [0, 1])
    assert configuration_digest(first, [0, 1]) != configuration_digest(first, [0])
    assert configuration_digest(first, []) != configuration_digest(space.recipe({"method.beta": 0.2}, Path("a")), [])


@pytest.mark.parametrize(
    ("space", "code"),
    [
        ({"training.lerning_rate": [1]}, "unknown-key"),
        ({"method.bta": [1]}, "unknown-key"),
        ({"method": ["npo", "nopo"]}, "unknown-name"),
        ({"training.learning_rate": {"low": -1.0, "high": 1.0}}, "invalid-field"),
        ({"recipe": ["tiny/npo", "tiny/nopo"]}, "file-not-found"),
        ({"method.beta": {"choices": [0.1], "when": {"method": "rmu"}}, "method": ["npo", "rmu"]}, None),
    ],
)
def test_errors_are_reported_before_a_trial_starts(space: dict[str, Any], code: str | None) -> None:
    if code is None:
        Space(sweep(space)).check()
        return
    with raises_code(code):
        Space(sweep(space)).check()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"space": {}}, "missing-setting"),
        ({"space": {"method.beta": []}}, "missing-setting"),
        ({"space": {"method.beta": {"low": 2, "high": 1}}}, "out-of-range"),
        ({"space": {"method.beta": {"low": 0, "high": 1, "log": True}}}, "out-of-range"),
        ({"space": {"method.beta": {"low": 1}}}, "missing-setting"),
        ({"space": {"method.beta": {"low": 1, "high": 2, "choices": [1]}}}, "conflicting-settings"),
        ({"space": {"output": ["a", "b"]}}, "conflicting-settings"),
        ({"space": {"training.seed": [1, 2]}, "seeds": [0, 1]}, "conflicting-settings"),
        ({"objectives": {}}, "missing-setting"),
        ({"objectives": {"asr": "less"}}, "invalid-field"),
        ({"trials": None}, "missing-setting"),
        ({"seeds": [1, 1]}, "duplicate-id"),
        ({"prune": True}, "conflicting-settings"),
        ({"sampler": "cma"}, "invalid-field"),
        ({"tirals": 3}, "unknown-key"),
    ],
)
def test_invalid_sweep_is_one_error(changes: dict[str, Any], code: str) -> None:
    with raises_code(code):
        sweep(**{"space": {"method.beta": [0.1]}, **changes})


def test_grid_over_a_continuous_range_is_an_error() -> None:
    with raises_code("missing-setting", field="space.method.beta"):
        Space(sweep({"method.beta": {"low": 0.1, "high": 0.2}}, sampler="grid")).grid()


def test_overrides_can_be_nested_dotted_or_texts(tmp_path: Path) -> None:
    nested = {"training": {"max_steps": 7}, "model": "m"}
    for overrides in (nested, {"training.max_steps": 7, "model": "m"}, ["training.max_steps=7", "model=m"]):
        assert sweep({"method.beta": [0.1]}, overrides=overrides).overrides == nested
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "recipe: tiny/npo\nsuite: suites/tiny\nspace: {method.beta: [1e-1, 1]}\nobjectives: {asr: min}\ntrials: 2\n"
        "overrides: {model: m}\n"
    )
    loaded = load(Sweep, file, ["overrides.data=d", "seeds=2", "space={method.beta: [2]}"])
    assert loaded.overrides == {"model": "m", "data": "d"}
    assert loaded.seeds == [0, 1]
    assert loaded.space["method.beta"].choices == [2]
    assert load(Sweep, file).space["method.beta"].choices == [0.1, 1]
