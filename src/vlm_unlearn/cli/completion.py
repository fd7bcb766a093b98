"""What the shell offers on Tab: names that are shipped, and a config's keys. Nothing heavy is loaded for it."""

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


def table_names(incomplete: str) -> list[str]:
    """The tables that `vlm-unlearn table` prints."""
    from vlm_unlearn.reporting.tables.names import PRINTABLE_TABLES

    return [name for name in PRINTABLE_TABLES if name.startswith(incomplete)]


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
    from pydantic import BaseModel

    for name, field in config.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            if name == "method":
                names, options = _methods()
                yield from ((key, names) for key in (f"{before}{name}", f"{before}{name}.name"))
                yield from ((f"{before}{name}.{option}", []) for option in options)
                continue
            if inner.model_fields.keys() & {"name"}:  # a judge may be a name alone
                yield f"{before}{name}", _choices(inner.model_fields["name"].annotation, f"{before}{name}")
            yield from _keys(inner, f"{before}{name}.")
        else:
            yield f"{before}{name}", _choices(inner, f"{before}{name}")


def _methods() -> tuple[list[str], list[str]]:
    """The shipped methods, and the options that any of them has, read from their files: importing those would load torch."""
    folder = Path(__file__).parents[1] / "methods"
    classes = [
        node
        for file in sorted(folder.glob("*.py"))
        for node in ast.parse(file.read_bytes()).body
        if isinstance(node, ast.ClassDef)
    ]
    marks = [mark for one in classes for mark in one.decorator_list if isinstance(mark, ast.Call)]
    registered = [mark.args[0] for mark in marks if isinstance(mark.func, ast.Name) and mark.func.id == "register"]
    names = [name.value for name in registered if isinstance(name, ast.Constant) and isinstance(name.value, str)]
    fields = [
        field
        for one in classes
        if one.name.endswith("Options")
        for field in one.body
        if isinstance(field, ast.AnnAssign)
    ]
    return sorted(names), sorted({field.target.id for field in fields if isinstance(field.target, ast.Name)})


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


@contextlib.contextmanager
def bash_words() -> Iterator[None]:
    """Within the block, ``key=value`` is one word, as it is to every other shell.

    Bash hands over ``key``, ``=`` and ``value`` as three words, each on a line, and puts what it is told in place of the last alone.
    """
    words = os.environ.get("COMP_WORDS", "").split("\n")
    at = os.environ.get("COMP_CWORD", "")
    if os.environ.get("_VLM_UNLEARN_COMPLETE") != "complete_bash" or not at.isdecimal() or len(words) < 2:
        yield
        return
    joined = [words[0]]
    for before, word in itertools.pairwise(words[: int(at) + 1]):
        if len(joined) > 1 and (word == "=" or (before == "=" and word)):
            joined[-1] += word
        else:
            joined.append(word)
    os.environ.update(COMP_WORDS="\n".join(joined), COMP_CWORD=str(len(joined) - 1))
    there = joined[-1].rpartition("=")[0]
    told = io.StringIO()
    try:
        with contextlib.redirect_stdout(told):
            yield
    finally:
        sys.stdout.write("\n".join(line.removeprefix(f"{there}=") for line in told.getvalue().split("\n")))


def no_blank_after_keys() -> None:
    """Makes the script that typer writes for bash set no blank behind ``key=``; typer has no public way to say so."""
    from typer import _completion_shared as typers

    script = typers._completion_scripts["bash"]
    mend = "    [[ ${#COMPREPLY[@]} -gt 0 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace\n    return 0\n"
    typers._completion_scripts["bash"] = script.replace("    return 0\n", mend)
