"""Callbacks for typer's completion: shipped names, and the keys and values of a config. They load no heavy module."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

if typing.TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

METHODS = Path(__file__).parents[1] / "methods"


def shipped_names(incomplete: str) -> list[str]:
    """Returns the shipped recipes and suites that start with the text. If there are none, the shell offers files."""
    from vlm_unlearn.config import shipped_names as all_names

    return [name for name in all_names() if name.startswith(incomplete)]


def recipe_names(incomplete: str) -> list[str]:
    """Returns the shipped recipes that start with the text."""
    return [name for name in shipped_names(incomplete) if not name.startswith(("suites/", "sweeps/"))]


def sweep_names(incomplete: str) -> list[str]:
    """Returns the shipped sweeps that start with the text."""
    return [name for name in shipped_names(incomplete) if name.startswith("sweeps/")]


def suite_names(incomplete: str) -> list[str]:
    """Returns the shipped suites that start with the text."""
    return [name for name in _all_suite_names(incomplete) if "robustness" not in name]


def robustness_suite_names(incomplete: str) -> list[str]:
    """Returns the shipped robustness suites that start with the text."""
    return [name for name in _all_suite_names(incomplete) if "robustness" in name]


def _all_suite_names(incomplete: str) -> list[str]:
    return [name for name in shipped_names(incomplete) if name.startswith("suites/")]


def benchmark_names() -> list[str]:
    """Returns the benchmarks, those of installed plug-ins included."""
    from vlm_unlearn.plugins import BENCHMARKS

    return list(BENCHMARKS)


def override_completions(
    config: typing.Literal["Recipe", "Suite", "RobustnessSuite", "Sweep", "JudgeConfig"],
) -> Callable[[str], list[str]]:
    """Returns a function that completes the overrides of a config: keys, and after ``KEY=`` the values of the key."""

    def complete(incomplete: str) -> list[str]:
        from vlm_unlearn import config as configs

        keys = dict(_keys(getattr(configs, config)))
        key, equals, _ = incomplete.partition("=")
        return [f"{key}={choice}" for choice in keys.get(key, ())] if equals else [f"{name}=" for name in keys]

    return complete


recipe_keys = override_completions("Recipe")
suite_keys = override_completions("Suite")
robustness_keys = override_completions("RobustnessSuite")
sweep_keys = override_completions("Sweep")
judge_keys = override_completions("JudgeConfig")


def _keys(config: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yields the dotted keys of a config, each with its choices if it has some."""
    from pydantic import BaseModel

    for name, field in config.model_fields.items():
        key, inner = f"{prefix}{name}", field.annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            yield key, _choices(field, key)
            continue
        if "name" in inner.model_fields:  # a method or a judge may be given by its name alone
            yield key, _choices(inner.model_fields["name"], key)
        yield from _keys(inner, f"{key}.")
        if name == "method":
            yield from ((f"{key}.{option}", []) for option in _method_options())


def _method_options() -> list[str]:
    """Returns the options of all methods of this package.

    They are read from the source files, because importing the methods would load torch.
    """
    nodes = (node for file in METHODS.glob("*.py") for node in ast.parse(file.read_bytes()).body)
    options = (node.body for node in nodes if isinstance(node, ast.ClassDef) and node.name.endswith("Options"))
    fields = (field.target for body in options for field in body if isinstance(field, ast.AnnAssign))
    return sorted({target.id for target in fields if isinstance(target, ast.Name)})


def _choices(field: FieldInfo, key: str) -> list[str]:
    """Returns the values of a field, or an empty list if it is open."""
    from vlm_unlearn.config.base import PluginName

    if key.rpartition(".")[2] == "rubric":
        from vlm_unlearn.judging.rubric import shipped_rubrics

        return list(shipped_rubrics())
    plugins = [name for marker in field.metadata if isinstance(marker, PluginName) for name in marker.registry]
    return plugins or _values(field.annotation)


def _values(annotation: object) -> list[str]:
    """Returns the values that a type allows, or an empty list if it is open."""
    if annotation is bool:
        return ["true", "false"]
    if typing.get_origin(annotation) is typing.Literal:
        return [str(choice) for choice in typing.get_args(annotation)]
    return [choice for argument in typing.get_args(annotation) for choice in _values(argument)]


@contextlib.contextmanager
def bash_words() -> Iterator[None]:
    """Within the block, bash completes ``key=value`` as a single word, as every other shell does.

    Bash passes ``key``, ``=`` and ``value`` as three words, one a line, and replaces only the last of them by a
    completion. The words are therefore joined for typer, and ``key=`` is removed from the completions.
    """
    if os.environ.get("_VLM_UNLEARN_COMPLETE") != "complete_bash":
        yield
        return
    words = os.environ["COMP_WORDS"].split("\n")[: int(os.environ["COMP_CWORD"]) + 1]
    joined = re.sub("\n=\n?", "=", "\n".join(words))
    os.environ.update(COMP_WORDS=joined, COMP_CWORD=str(joined.count("\n")))
    key = joined.rpartition("\n")[2].rpartition("=")[0]
    completions = io.StringIO()
    try:
        with contextlib.redirect_stdout(completions):
            yield
    finally:
        sys.stdout.write("\n".join(line.removeprefix(f"{key}=") for line in completions.getvalue().split("\n")))


def no_space_after_keys() -> None:
    """Changes typer's completion script for bash so that it adds no space after ``key=``.

    It changes typer's private table of scripts, because typer has no public way.
    """
    from typer import _completion_shared

    script = _completion_shared._completion_scripts["bash"]
    no_space = "    [[ ${#COMPREPLY[@]} -gt 0 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace\n    return 0\n"
    _completion_shared._completion_scripts["bash"] = script.replace("    return 0\n", no_space)
