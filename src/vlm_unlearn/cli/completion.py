"""Shell completion: shipped names, and the keys and values of a config. Completing loads no heavy module."""

from __future__ import annotations

import ast
import contextlib
import io
import itertools
import os
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

if typing.TYPE_CHECKING:
    from pydantic import BaseModel


def recipe_names(incomplete: str) -> list[str]:
    """Returns the shipped recipes that start with the text. If there are none, the shell offers files."""
    return [name for name in shipped_names(incomplete) if not name.startswith("suites/")]


def suite_names(incomplete: str) -> list[str]:
    """Returns the shipped suites that start with the text. If there are none, the shell offers files."""
    return [name for name in shipped_names(incomplete) if name.startswith("suites/")]


def shipped_names(incomplete: str) -> list[str]:
    """Returns the shipped recipes and suites that start with the text."""
    from vlm_unlearn.config import shipped_names as all_names

    return [name for name in all_names() if name.startswith(incomplete)]


def benchmark_names(incomplete: str) -> list[str]:
    """Returns the benchmarks that start with the text."""
    from vlm_unlearn.benchmarks import BENCHMARKS

    return [name for name in sorted(BENCHMARKS) if name.startswith(incomplete)]


def table_names(incomplete: str) -> list[str]:
    """Returns the tables of `vlm-unlearn table` that start with the text."""
    from vlm_unlearn.reporting.tables.names import PRINTABLE_TABLES

    return [name for name in PRINTABLE_TABLES if name.startswith(incomplete)]


def override_completions(config: typing.Literal["Recipe", "Suite", "JudgeConfig"]) -> Callable[[str], list[str]]:
    """Returns a function that completes the overrides of a config: keys, and after ``KEY=`` the values of the key."""

    def complete(incomplete: str) -> list[str]:
        from vlm_unlearn import config as configs

        keys = dict(_keys(getattr(configs, config)))
        key, equals, value = incomplete.partition("=")
        if not equals:
            return [f"{name}=" for name in keys if name.startswith(incomplete)]
        return [f"{key}={choice}" for choice in keys.get(key, ()) if choice.startswith(value)]

    return complete


def _keys(config: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yields the dotted keys of a config, each with its choices if it has some."""
    from pydantic import BaseModel

    for name, field in config.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            if name == "method":
                names, options = _methods()
                yield from ((key, names) for key in (f"{prefix}{name}", f"{prefix}{name}.name"))
                yield from ((f"{prefix}{name}.{option}", []) for option in options)
                continue
            if inner.model_fields.keys() & {"name"}:  # a judge may be given by its name alone
                yield f"{prefix}{name}", _choices(inner.model_fields["name"].annotation, f"{prefix}{name}")
            yield from _keys(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _choices(inner, f"{prefix}{name}")


def _methods() -> tuple[list[str], list[str]]:
    """Returns the names of the shipped methods, and all their options.

    They are parsed from the source files, because importing the methods would load torch.
    """
    folder = Path(__file__).parents[1] / "methods"
    classes = [
        node
        for file in sorted(folder.glob("*.py"))
        for node in ast.parse(file.read_bytes()).body
        if isinstance(node, ast.ClassDef)
    ]
    calls = [call for node in classes for call in node.decorator_list if isinstance(call, ast.Call)]
    arguments = [call.args[0] for call in calls if isinstance(call.func, ast.Name) and call.func.id == "register"]
    names = [name.value for name in arguments if isinstance(name, ast.Constant) and isinstance(name.value, str)]
    fields = [
        field
        for node in classes
        if node.name.endswith("Options")
        for field in node.body
        if isinstance(field, ast.AnnAssign)
    ]
    return sorted(names), sorted({field.target.id for field in fields if isinstance(field.target, ast.Name)})


def _choices(annotation: object, key: str) -> list[str]:
    """Returns the values that a type allows, or an empty list if it is open."""
    if key.rpartition(".")[2] == "rubric":
        from vlm_unlearn.judging.rubric import shipped_rubrics

        return list(shipped_rubrics())
    if annotation is bool:
        return ["true", "false"]
    if typing.get_origin(annotation) is typing.Literal:
        return [str(choice) for choice in typing.get_args(annotation)]
    return [choice for argument in typing.get_args(annotation) for choice in _choices(argument, key)]


recipe_keys = override_completions("Recipe")
suite_keys = override_completions("Suite")
judge_keys = override_completions("JudgeConfig")


@contextlib.contextmanager
def bash_words() -> Iterator[None]:
    """Within the block, bash completes ``key=value`` as a single word, as every other shell does.

    Bash passes ``key``, ``=`` and ``value`` as three words, one a line, and replaces only the last of them by a
    completion. The words are therefore joined for typer, and ``key=`` is removed from the completions.
    """
    words = os.environ.get("COMP_WORDS", "").split("\n")
    position = os.environ.get("COMP_CWORD", "")
    if os.environ.get("_VLM_UNLEARN_COMPLETE") != "complete_bash" or not position.isdecimal() or len(words) < 2:
        yield
        return
    joined = [words[0]]
    for previous, word in itertools.pairwise(words[: int(position) + 1]):
        if len(joined) > 1 and (word == "=" or (previous == "=" and word)):
            joined[-1] += word
        else:
            joined.append(word)
    os.environ.update(COMP_WORDS="\n".join(joined), COMP_CWORD=str(len(joined) - 1))
    key = joined[-1].rpartition("=")[0]
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
