"""The search space of a sweep: which settings a trial has, and the recipe that they make."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from vlm_unlearn.config import ParameterConfig, Recipe, Sweep, apply_overrides, merge_keys, read_resolved, validate
from vlm_unlearn.errors import UserError
from vlm_unlearn.methods import build_method
from vlm_unlearn.methods.wrappers import build_defenses
from vlm_unlearn.store import digest_json

RECIPE = "recipe"  # the key of the space that varies the recipe itself
MAX_GRID = 100_000  # combinations
PLAIN = (str, int, float, bool, type(None))  # the types of values that Optuna stores
Values = dict[str, Any]  # by dotted key of the recipe, in the order of the space


class Space:
    """The settings that a sweep varies.

    Args:
        sweep: The sweep.
    """

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._recipes: dict[str, dict[str, Any]] = {}

    def draw(self, trial: optuna.Trial) -> Values:
        """Returns the values that the study's sampler chooses for a trial."""
        values: Values = {}
        for key, parameter in self._sweep.space.items():
            if not self._applies(parameter, values):
                continue
            if parameter.choices is not None:
                labels = _labels(parameter.choices)
                label = trial.suggest_categorical(key, list(labels))
                values[key] = labels[label]
            elif parameter.is_integer:
                step = int(parameter.step or 1)
                values[key] = trial.suggest_int(key, *_integer_ends(parameter), step=step, log=parameter.log)
            else:
                low, high = _ends(parameter)
                values[key] = trial.suggest_float(key, low, high, step=parameter.step, log=parameter.log)
        return values

    def values_of(self, params: Mapping[str, Any]) -> Values:
        """Returns the values of a trial from the parameters that Optuna stores."""
        values: Values = {}
        for key, parameter in self._sweep.space.items():
            if key in params:
                labels = _labels(parameter.choices) if parameter.choices is not None else {}
                values[key] = labels.get(params[key], params[key])
        return values

    def params_of(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns values in the form that Optuna stores."""
        return {
            key: _label(value) if self._sweep.space[key].choices is not None else value for key, value in values.items()
        }

    def distributions(self, params: Mapping[str, Any]) -> dict[str, BaseDistribution]:
        """Returns Optuna's distributions of the given parameters."""
        distributions: dict[str, BaseDistribution] = {}
        for key in params:
            parameter = self._sweep.space[key]
            if parameter.choices is not None:
                distributions[key] = CategoricalDistribution(list(_labels(parameter.choices)))
            elif parameter.is_integer:
                step = int(parameter.step or 1)
                distributions[key] = IntDistribution(*_integer_ends(parameter), log=parameter.log, step=step)
            else:
                distributions[key] = FloatDistribution(*_ends(parameter), log=parameter.log, step=parameter.step)
        return distributions

    def grid(self) -> list[Values]:
        """Returns all combinations, in the order of the space.

        Raises:
            UserError: A range has no step, or there are too many combinations.
        """
        combinations: list[Values] = []
        for values in self._combinations(list(self._sweep.space.items()), {}):
            combinations.append(values)
            if len(combinations) > MAX_GRID:
                raise UserError(
                    f"the grid has more than {MAX_GRID:,} combinations. Use the sampler tpe, nsga2 or random.",
                    code="out-of-range",
                    field="space",
                )
        return combinations

    def _combinations(self, remaining: Sequence[tuple[str, ParameterConfig]], values: Values) -> Iterator[Values]:
        if not remaining:
            yield values
            return
        (key, parameter), *others = remaining
        if not self._applies(parameter, values):
            yield from self._combinations(others, values)
            return
        for value in _grid_values(key, parameter):
            yield from self._combinations(others, {**values, key: value})

    def _applies(self, parameter: ParameterConfig, values: Values) -> bool:
        """Returns whether the conditions of a parameter hold, with the values of those before it."""
        if not parameter.when:
            return True
        recipe = self.recipe_values(values)
        for key, accepted in parameter.when.items():
            current = values.get(RECIPE, self._sweep.recipe) if key == RECIPE else _lookup(recipe, key)
            if isinstance(current, dict) and "name" in current:
                current = current["name"]
            if current not in (accepted if isinstance(accepted, list) else [accepted]):
                return False
        return True

    def recipe_values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the keys of the recipe with the overrides of the sweep and the values of a trial."""
        name = str(values.get(RECIPE, self._sweep.recipe))
        if name not in self._recipes:
            self._recipes[name] = read_resolved(Path(name))
        recipe = merge_keys(copy.deepcopy(self._recipes[name]), _with_names(copy.deepcopy(self._sweep.overrides)))
        texts = [f"{key}={json.dumps(value)}" for key, value in values.items() if key != RECIPE]
        return apply_overrides(recipe, texts, Recipe)

    def recipe(self, values: Mapping[str, Any], output: Path, seed: int | None = None) -> Recipe:
        """Returns the recipe of a trial.

        Args:
            values: The values of the trial.
            output: The run folder.
            seed: The training seed. None keeps that of the recipe.

        Raises:
            UserError: A key or a value is invalid.
        """
        keys = {**self.recipe_values(values), "output": str(output)}
        if seed is not None:
            keys["training"] = {**(keys.get("training") or {}), "seed": seed}
        settings = ", ".join(f"{key}={_label(value)}" for key, value in values.items())
        return validate(Recipe, keys, f"{values.get(RECIPE, self._sweep.recipe)} with {settings}")

    def check(self) -> None:
        """Checks each choice and both ends of each range, with the first values of the other settings.

        Raises:
            UserError: A key of the recipe or an option of a method is unknown, or a value is invalid.
        """
        for values in self._samples():
            recipe = self.recipe(values, Path("trial"))
            build_method(recipe.method, recipe.prompt_decouple_weight)
            build_defenses(recipe.defense)

    def first_recipe(self) -> Recipe:
        """Returns the recipe with the first value of each setting."""
        return self.recipe(self._complete({}), Path("trial"))

    def _samples(self) -> Iterator[Values]:
        """Yields combinations that contain each choice and both ends of each range at least once."""
        yield self._complete({})
        for key, parameter in self._sweep.space.items():
            for value in parameter.choices if parameter.choices is not None else _ends(parameter):
                for prefix in self._prefixes(key):
                    values = self._complete({**prefix, key: value})
                    if key in values:
                        yield values
                        break

    def _prefixes(self, key: str) -> Iterator[Values]:
        """Yields values of the settings that the conditions of a setting name."""
        yield {}
        for name in self._sweep.space[key].when:
            parameter = self._sweep.space.get(name) or self._sweep.space.get(RECIPE)
            source = name if name in self._sweep.space else RECIPE
            for value in parameter.choices or [] if parameter is not None else []:
                yield {source: value}

    def _complete(self, fixed: Mapping[str, Any]) -> Values:
        """Returns the first values of all settings that apply, except where `fixed` has another value."""
        values: Values = {}
        for key, parameter in self._sweep.space.items():
            if self._applies(parameter, values):
                first = parameter.choices[0] if parameter.choices is not None else _ends(parameter)[0]
                values[key] = fixed.get(key, first)
        return values


def configuration_digest(recipe: Recipe, seeds: Sequence[int]) -> str:
    """Returns a digest of everything that a trial depends on besides the files of its model, data and suite."""
    keys = recipe.model_dump(mode="json", exclude={"output": True, "name": True, "training": {"seed"}})
    return digest_json([keys, list(seeds) or [recipe.training.seed]])[:16]


def _grid_values(key: str, parameter: ParameterConfig) -> Sequence[Any]:
    if parameter.choices is not None:
        return parameter.choices
    low, high = _ends(parameter)
    if parameter.step is None and not (parameter.is_integer and not parameter.log):
        raise UserError("a grid needs choices, or a range with a `step`.", code="missing-setting", field=f"space.{key}")
    step = parameter.step or 1
    count = int((high - low) / step + 1e-9) + 1
    if count > MAX_GRID:
        raise UserError(f"has more than {MAX_GRID:,} values.", code="out-of-range", field=f"space.{key}")
    values = [low + number * step for number in range(count)]
    return [int(value) for value in values] if parameter.is_integer else [round(value, 12) for value in values]


def _ends(parameter: ParameterConfig) -> tuple[float, float]:
    assert parameter.low is not None
    assert parameter.high is not None
    return parameter.low, parameter.high


def _integer_ends(parameter: ParameterConfig) -> tuple[int, int]:
    low, high = _ends(parameter)
    return int(low), int(high)


def _labels(choices: Sequence[Any]) -> dict[Any, Any]:
    """Returns the choices by the values that Optuna stores for them."""
    return {_label(choice): choice for choice in choices}


def _label(value: Any) -> Any:
    """Returns a value that Optuna can store. Lists and mappings become JSON."""
    return value if isinstance(value, PLAIN) else json.dumps(value, ensure_ascii=False)


def _with_names(overrides: dict[str, Any]) -> dict[str, Any]:
    """Expands a method that is given by its name alone."""
    method = overrides.get("method")
    return {**overrides, "method": {"name": method}} if isinstance(method, str) else overrides


def _lookup(value: Any, key: str) -> Any:
    """Returns the value of a dotted key, None if it is missing."""
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value
