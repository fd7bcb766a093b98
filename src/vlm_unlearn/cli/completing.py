"""What the shell offers on Tab: names that are shipped, and a config's keys. Nothing heavy is loaded for it."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator

from pydantic import BaseModel


def recipe_names(incomplete: str) -> list[str]:
    """The shipped recipes; where none fits, the shell offers files."""
    return [name for name in _shipped(incomplete) if not name.startswith("suites/")]


def suite_names(incomplete: str) -> list[str]:
    """The shipped suites; where none fits, the shell offers files."""
    return [name for name in _shipped(incomplete) if name.startswith("suites/")]


def shipped_names(incomplete: str) -> list[str]:
    """Both."""
    return _shipped(incomplete)


def _shipped(incomplete: str) -> list[str]:
    from vlm_unlearn.config import shipped_names

    return [name for name in shipped_names() if name.startswith(incomplete)]


def benchmark_names(incomplete: str) -> list[str]:
    """The benchmarks."""
    from vlm_unlearn.benchmarks import BENCHMARKS

    return [name for name in sorted(BENCHMARKS) if name.startswith(incomplete)]


def overrides_of(config: typing.Literal["Recipe", "Suite", "JudgeConfig"]) -> Callable[[str], list[str]]:
    """Completes ``training.learning_rate=``, and behind ``trainable.mode=`` the values that a key may have."""

    def offered(incomplete: str) -> list[str]:
        from vlm_unlearn import config as configs

        keys = dict(_keys(getattr(configs, config)))
        key, equals, value = incomplete.partition("=")
        if not equals:
            return [f"{name}=" for name in keys if name.startswith(incomplete)]
        return [f"{key}={choice}" for choice in keys.get(key, ()) if choice.startswith(value)]

    return offered


def _keys(config: type[BaseModel], before: str = "") -> Iterator[tuple[str, list[str]]]:
    """Dotted keys, each with its choices where it has some."""
    for name, field in config.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            if inner.model_fields.keys() & {"name"}:  # method and judge may be a name alone
                yield f"{before}{name}", _choices(inner.model_fields["name"].annotation, f"{before}{name}")
            yield from _keys(inner, f"{before}{name}.")
        else:
            yield f"{before}{name}", _choices(inner, f"{before}{name}")


def _choices(annotation: object, key: str) -> list[str]:
    if key.rpartition(".")[2] == "rubric":
        from vlm_unlearn.judging.rubric import shipped_rubrics

        return list(shipped_rubrics())
    if annotation is bool:
        return ["true", "false"]
    if typing.get_origin(annotation) is typing.Literal:
        return [str(choice) for choice in typing.get_args(annotation)]
    return [choice for part in typing.get_args(annotation) for choice in _choices(part, key)]


recipe_keys, suite_keys, judge_keys = overrides_of("Recipe"), overrides_of("Suite"), overrides_of("JudgeConfig")
