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

PACKAGE = Path(__file__).parents[1]


def names_of(kind: str) -> list[str]:
    """Returns the sorted names that the modules of a package register, such as those of "methods" or "benchmarks".

    The names are read from the source files, because importing the modules would load torch.
    """
    sources = (file.read_text("utf-8") for file in (PACKAGE / kind).glob("*.py"))
    return sorted(name for source in sources for name in re.findall(r'^@register\(\s*"([^"]+)"', source, re.MULTILINE))


def shipped_names(incomplete: str) -> list[str]:
    """Returns the shipped recipes and suites that start with the text. If there are none, the shell offers files."""
    from vlm_unlearn.config import shipped_names as all_names

    return [name for name in all_names() if name.startswith(incomplete)]


def recipe_names(incomplete: str) -> list[str]:
    """Returns the shipped recipes that start with the text."""
    return [name for name in shipped_names(incomplete) if not name.startswith("suites/")]


def suite_names(incomplete: str) -> list[str]:
    """Returns the shipped suites that start with the text."""
    return [name for name in shipped_names(incomplete) if name.startswith("suites/")]


def override_completions(config: typing.Literal["Recipe", "Suite", "JudgeConfig"]) -> Callable[[str], list[str]]:
    """Returns a function that completes the overrides of a config: keys, and after ``KEY=`` the values of the key."""

    def complete(incomplete: str) -> list[str]:
        from vlm_unlearn import config as configs

        keys = dict(_keys(getattr(configs, config)))
        key, equals, _ = incomplete.partition("=")
        return [f"{key}={choice}" for choice in keys.get(key, ())] if equals else [f"{name}=" for name in keys]

    return complete


recipe_keys = override_completions("Recipe")
suite_keys = override_completions("Suite")
judge_keys = override_completions("JudgeConfig")


def _keys(config: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yields the dotted keys of a config, each with its choices if it has some."""
    from pydantic import BaseModel

    for name, field in config.model_fields.items():
        key, inner = f"{prefix}{name}", field.annotation
        if name == "method":
            yield from dict.fromkeys((key, f"{key}.name"), names_of("methods")).items()
            yield from ((f"{key}.{option}", []) for option in _method_options())
        elif isinstance(inner, type) and issubclass(inner, BaseModel):
            if "name" in inner.model_fields:  # a judge may be given by its name alone
                yield key, _choices(inner.model_fields["name"].annotation, key)
            yield from _keys(inner, f"{key}.")
        else:
            yield key, _choices(inner, key)


def _method_options() -> list[str]:
    """Returns the options of all methods, read from their source files."""
    return sorted(
        {
            field.target.id
            for file in (PACKAGE / "methods").glob("*.py")
            for node in ast.parse(file.read_bytes()).body
            if isinstance(node, ast.ClassDef) and node.name.endswith("Options")
            for field in node.body
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        }
    )


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
