"""Old names of commands and options. They still work, hidden from the help, and print a warning."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from vlm_unlearn.errors import DeprecatedNameWarning, printable

# Keyed by the command's path without the program's name.
COMMANDS: Mapping[str, str] = {"data rmu": "data to-rmu", "judge sheet": "judge export-for-labeling"}
OPTIONS: Mapping[str, Mapping[str, str]] = {
    "attack rewrite": {"--shots": "--num-rewrites"},
    "data select-harmful": {"--paper": "--paper-compat"},
    "judge keyword": {"--paper": "--paper-compat"},
    "judge run": {"--case": "--split"},
}


def current_command(group_path: str, name: str, warn: bool = True) -> str:
    """Returns the current name of a command of a group.

    Args:
        group_path: The path of the group, such as ``vlm-unlearn data``.
        warn: False during shell completion.

    Warns:
        DeprecatedNameWarning: `name` is the command's old name.
    """
    old = f"{group_path.split()[-1]} {name}"
    new = COMMANDS.get(old)
    if new is None:
        return name
    if warn:
        _warn(f"the command `{old}`", f"`{new}`")
    return new.rpartition(" ")[2]


def current_options(command_path: str, arguments: Sequence[str], warn: bool = True) -> list[str]:
    """Returns the arguments of a command with the current names of its options.

    Args:
        command_path: The path of the command, such as ``vlm-unlearn judge run``.
        warn: False during shell completion.

    Warns:
        DeprecatedNameWarning: for each option that has its old name.
    """
    path = " ".join(command_path.split()[-2:])
    renamed = OPTIONS.get(path, {})
    current: list[str] = []
    for number, argument in enumerate(arguments):
        if argument == "--":  # the end of the options
            return [*current, *arguments[number:]]
        option, equals, value = argument.partition("=")
        if option in renamed:
            if warn:
                _warn(f"the option `{option}` of `{path}`", f"`{renamed[option]}`")
            argument = f"{renamed[option]}{equals}{value}"
        current.append(argument)
    return current


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is deprecated; use {new}", DeprecatedNameWarning, stacklevel=3)


@contextmanager
def plain_deprecation_warnings() -> Iterator[None]:
    """Within the block, each distinct deprecation warning is one line on standard error, ``warning: MESSAGE``.

    Python would print two lines for each, and repeat a warning whenever a library changes the warning filters. Of the
    processes of a distributed run only the first one prints.
    """
    default_show = warnings.showwarning
    printed: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *location: Any, **stream: Any) -> None:
        if not issubclass(category, DeprecatedNameWarning):
            default_show(message, category, *location, **stream)
            return
        line = printable(" ".join(str(message).split()))
        if line not in printed and os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"warning: {line}\n")
        printed.add(line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = default_show
