"""Every old config key and value still works, with one warning, wherever a config can come from."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from helpers import raises_code
from vlm_unlearn.config import Recipe, Suite, load
from vlm_unlearn.config.base import Strict, nested_configs
from vlm_unlearn.config.recipe import MethodConfig
from vlm_unlearn.errors import DeprecatedNameWarning
from vlm_unlearn.evaluation.generate import saved_suite

RECIPE = {"model": "m", "data": "d", "output": "o", "method": "npo", "probe": {"suite": "suites/tiny"}}
SPLIT = {"name": "unsafe", "format": "vlguard", "file": "f", "images": "i", "kind": "unsafe"}
SUITE = {
    "model": "m",
    "splits": [{**SPLIT, "rewrite": {"trigger": "what"}}],
    "judge": {"name": "keyword"},
    "judges": {"strict": {"name": "keyword"}},
    "metrics": {"asr": {"splits": ["unsafe"], "labels": ["complied"]}},
}
# config, dotted old key, dotted new key, a value, and the current value if it has another name
KEYS: list[tuple[type[Recipe] | type[Suite], str, str, Any]] = [
    (Recipe, "training.epochs", "training.num_train_epochs", 3.0),
    (Recipe, "training.batch_size", "training.per_device_train_batch_size", 4),
    (Recipe, "training.scheduler", "training.lr_scheduler_type", "linear"),
    (Recipe, "training.by_image", "training.group_by_image", True),
    (Recipe, "trainable.parameters", "trainable.parameter_patterns", ["mlp"]),
    (Recipe, "trainable.lora.alpha", "trainable.lora.lora_alpha", 8),
    (Recipe, "trainable.lora.dropout", "trainable.lora.lora_dropout", 0.5),
    (Recipe, "probe.every", "probe.eval_steps", 7),
    (Recipe, "probe.groups", "probe.num_questions", 5),
    (Recipe, "method.paper", "method.paper_compat", True),
    (Suite, "cases", "splits", [SPLIT]),
    (Suite, "paper", "paper_compat", True),
    (Suite, "judge.paper", "judge.paper_compat", True),
    (Suite, "judges.strict.paper", "judges.strict.paper_compat", True),
    (Suite, "metrics.asr.cases", "metrics.asr.splits", ["unsafe"]),
    (Suite, "metrics.asr.group", "metrics.asr.aggregate", "per_response"),
    (Suite, "metrics.asr.failures", "metrics.asr.on_error", "exclude"),
    (Suite, "splits.unsafe.rewrite.shots", "splits.unsafe.rewrite.num_rewrites", 2),
    (Suite, "sample.groups", "sample.num_questions", 4),
    (Suite, "sample.rows", "sample.num_rows", 4),
]
VALUES: list[tuple[type[Recipe] | type[Suite], str, str, str]] = [
    (Suite, "metrics.asr.aggregate", "any", "any_per_question"),
    (Suite, "metrics.asr.aggregate", "each", "per_response"),
    (Suite, "metrics.asr.on_error", "left_out", "exclude"),
    (Suite, "metrics.asr.on_error", "not_counted_as_hits", "count_as_miss"),
]


@contextmanager
def warns_once() -> Iterator[None]:
    """Expects exactly one deprecation warning, a FutureWarning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    messages = [warning.message for warning in caught if issubclass(warning.category, DeprecatedNameWarning)]
    assert len(messages) == 1, messages
    assert isinstance(messages[0], FutureWarning)


def base_of(config: type[Recipe] | type[Suite], *keys: str) -> dict[str, Any]:
    """A minimal config as plain values, without the keys."""
    value = json.loads(json.dumps(RECIPE if config is Recipe else SUITE))
    if config is Recipe:
        value["method"] = {"name": "npo"}
    for dotted in keys:
        target = value
        *parents, last = dotted.split(".")
        for parent in parents:
            target = child(target, parent)
        target.pop(last, None)
    return value


def child(target: Any, key: str) -> Any:
    if isinstance(target, list):
        return next(item for item in target if item["name"] == key)
    return target.setdefault(key, {})


def with_key(value: dict[str, Any], dotted: str, item: object) -> dict[str, Any]:
    *parents, last = dotted.split(".")
    target: Any = value
    for parent in parents:
        target = child(target, parent)
    target[last] = item
    return value


def at(config: Recipe | Suite, dotted: str) -> Any:
    """The value of a dotted key."""
    current: Any = config.model_dump(mode="json")
    for key in dotted.split("."):
        current = child(current, key)
    return current


def write(folder: Path, value: object) -> Path:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(value))
    return file


def test_all_renamed_keys_and_values_are_tested() -> None:
    def renamed(config: type[Strict] | type[MethodConfig], path: tuple[type, ...] = ()) -> Iterator[tuple[type, str]]:
        yield from ((config, old) for old in config.renamed_keys)
        for values in config.renamed_values.values():
            yield from ((config, old) for old in values)
        for field in config.model_fields.values():
            for inner in nested_configs(field.annotation):
                if inner not in path:
                    yield from renamed(inner, (*path, config))

    expected = {old for _, old in {*renamed(Recipe), *renamed(Suite)}}
    assert expected == {old.rpartition(".")[2] for _, old, _, _ in KEYS} | {old for _, _, old, _ in VALUES}


@pytest.mark.parametrize(("config", "old", "new", "item"), KEYS, ids=[old for _, old, _, _ in KEYS])
def test_old_key_works_in_yaml_overrides_and_python(
    config: type[Recipe] | type[Suite], old: str, new: str, item: Any, tmp_path: Path
) -> None:
    base = base_of(config, new)
    expected = at(load(config, write(tmp_path, with_key(base_of(config, new), new, item))), new)
    other = {True: False, "linear": "constant", "per_response": "any_per_question", "exclude": "count_as_miss"}
    different = other.get(item, item) if isinstance(item, bool | str) else item
    old_file, new_file = with_key(base_of(config, new), old, item), with_key(base_of(config, new), new, different)
    override = json.dumps(item)
    with warns_once():
        assert at(load(config, write(tmp_path, old_file)), new) == expected
    if config is Recipe or "." in old:  # a suite without splits is invalid
        with warns_once():
            assert at(load(config, write(tmp_path, base), [f"{old}={override}"]), new) == expected
    with warns_once():
        assert at(load(config, write(tmp_path, new_file), [f"{old}={override}"]), new) == expected
    with warns_once():
        assert at(load(config, write(tmp_path, old_file), [f"{new}={override}"]), new) == expected
    with warns_once():
        assert at(config.model_validate(with_key(base_of(config, new), old, item)), new) == expected


@pytest.mark.parametrize(("config", "old", "new", "item"), KEYS, ids=[old for _, old, _, _ in KEYS])
@pytest.mark.filterwarnings("ignore:.*is deprecated; use:FutureWarning")
def test_old_and_new_key_together_are_an_error(
    config: type[Recipe] | type[Suite], old: str, new: str, item: Any, tmp_path: Path
) -> None:
    both = with_key(with_key(base_of(config, new), old, item), new, item)
    file = write(tmp_path, both)
    with raises_code("duplicate-key", file=file) as caught:
        load(config, file)
    assert f'"{old.rpartition(".")[2]}"' in str(caught.value)
    with pytest.raises(ValidationError):
        config.model_validate(both)


@pytest.mark.parametrize(("config", "key", "old", "new"), VALUES, ids=[old for _, _, old, _ in VALUES])
def test_old_value_works_in_yaml_overrides_and_python(
    config: type[Recipe] | type[Suite], key: str, old: str, new: str, tmp_path: Path
) -> None:
    value = with_key(base_of(config, key), key, old)
    with warns_once():
        assert at(load(config, write(tmp_path, value)), key) == new
    with warns_once():
        assert at(load(config, write(tmp_path, base_of(config, key)), [f"{key}={old}"]), key) == new
    with warns_once():
        assert at(config.model_validate(value), key) == new


@pytest.mark.parametrize("base", ["old", "new"])
def test_old_and_new_keys_merge_when_a_file_extends_another(base: str, tmp_path: Path) -> None:
    texts = {"old": "training: {epochs: 2, seed: 5}\n", "new": "training: {num_train_epochs: 3}\n"}
    top = "new" if base == "old" else "old"
    (tmp_path / "base.yaml").write_text(f"model: m\ndata: d\noutput: o\nmethod: npo\n{texts[base]}")
    (tmp_path / "top.yaml").write_text(f"extends: base\n{texts[top]}")
    with warns_once():
        recipe = load(Recipe, tmp_path / "top.yaml")
    assert recipe.training.num_train_epochs == {"old": 2, "new": 3}[top]


SAVED = [key for key in KEYS if key[0] is Suite and key[1] != "sample.rows"]


@pytest.mark.parametrize(("config", "old", "new", "item"), SAVED, ids=[old for _, old, _, _ in SAVED])
def test_old_key_of_a_saved_suite_is_read(config: type[Suite], old: str, new: str, item: Any, tmp_path: Path) -> None:
    expected = at(Suite.model_validate(with_key(base_of(config, new), new, item)), new)
    (tmp_path / "suite.json").write_text(json.dumps(with_key(base_of(config, new), old, item)))
    with warns_once():
        assert at(saved_suite(tmp_path), new) == expected


@pytest.mark.parametrize("override", ["paper=true", "judge.paper=true", "metrics.asr.cases=[unsafe]"])
def test_old_key_in_an_override_of_a_saved_suite_works(override: str, tmp_path: Path) -> None:
    (tmp_path / "suite.json").write_text(json.dumps(SUITE))
    with warns_once():
        assert saved_suite(tmp_path, [override])
