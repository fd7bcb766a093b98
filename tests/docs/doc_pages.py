"""Parses the documentation: the code blocks of a page, their languages, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULE = "vlm_unlearn.cli.main"
SHELL = ("bash", "sh", "shell", "console")

_FENCE = re.compile(r"^(?P<indent>\s*)(?P<marks>`{3,}|~{3,})\s*\{?\s*\.?(?P<kind>[\w-]*)(?P<rest>[^`]*)$")
_NOT_RUN = re.compile(r"<!--\s*not run:\s*(.+?)\s*-->")
_TITLE = re.compile(r'title="([^"]+)"')
_NAMED = re.compile(r"`([\w./-]+\.\w+)`[^`]*:$")  # "`pairs.csv`:" before a block names its file
_STARTS_WITH_A_COMMAND = re.compile(
    r"(vlm-unlearn|make|pip|python3?|accelerate|torchrun|transformers|vllm|git|source|export|srun|\S+/bin/\w+)(\s|$)"
)


@dataclass(frozen=True)
class Block:
    """A code block of a page."""

    page: str
    line: int  # where its text starts in the file
    kind: str  # its language, or "" without one; indented commands are "bash"
    text: str
    not_run: str | None = None  # the reason why it is not executed
    file: str | None = None  # the file name that the page gives it

    @property
    def script(self) -> str:
        """The script for a shell, with as many lines as the block. A `console` block gives its typed lines."""
        if self.kind != "console":
            return self.text
        lines, continued = [], False
        for line in self.text.splitlines():
            typed = line[2:] if line.startswith("$ ") else line if continued else ""
            continued = typed.endswith("\\")
            lines.append(typed)
        return "\n".join(lines)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks_of(page: Path) -> list[Block]:
    """Returns the code blocks of a page in their order."""
    return read_blocks(name_of(page), page.read_text(encoding="utf-8"))


def read_blocks(name: str, text: str) -> list[Block]:
    """Returns the code blocks of a text in their order."""
    lines = text.splitlines()
    blocks, number = [], 0
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        if fence:
            end = _closing(lines, number + 1, fence["marks"])
            code = dedent("\n".join(lines[number + 1 : end]))
            not_run, file = _notes_before(lines, number)
            title = _TITLE.search(fence["rest"])
            blocks.append(Block(name, number + 2, fence["kind"], code, not_run, title[1] if title else file))
            number = end + 1
        elif lines[number].startswith("    ") and not "".join(lines[max(number - 1, 0) : number]).strip():
            end = next(
                (at for at in range(number, len(lines)) if lines[at].strip() and not lines[at].startswith("    ")),
                len(lines),
            )
            end = next((at for at in range(number, end) if _FENCE.match(lines[at])), end)
            code = _commands_alone(lines[number:end])
            if code.strip():
                blocks.append(Block(name, number + 1, "bash", code, _notes_before(lines, number)[0]))
            number = end
        else:
            number += 1
    return blocks


def _closing(lines: Sequence[str], start: int, marks: str) -> int:
    end = re.compile(rf"\s*{marks[0]}{{{len(marks)},}}\s*$")
    return next((at for at in range(start, len(lines)) if end.match(lines[at])), len(lines))


def _notes_before(lines: Sequence[str], number: int) -> tuple[str | None, str | None]:
    """Returns the reason not to run a block and its file name, from the line before the block."""
    line = next((text.strip() for text in reversed(lines[max(number - 2, 0) : number]) if text.strip()), "")
    not_run, file = _NOT_RUN.search(line), _NAMED.search(line)
    return not_run[1] if not_run else None, file[1] if file else None


def _commands_alone(lines: Sequence[str]) -> str:
    """Returns the commands of an indented block, which can contain output too, each on its line."""
    commands, continued = [], False
    for line in lines:
        command = continued or _STARTS_WITH_A_COMMAND.match(line[4:]) is not None
        commands.append(line[4:] if command else "")
        continued = command and line.endswith("\\")
    return "\n".join(commands)


def our_commands(script: str) -> Iterator[tuple[list[str], list[str]]]:
    """Yields each ``vlm-unlearn`` command of a script: the words of its launcher, and its arguments."""
    for line in script.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*_words(line), ";"]:
            if word and not word.strip("|&;<>()"):
                yield from _ours(words)
                words = []
            else:
                words.append(word)


def _words(line: str) -> list[str]:
    reader = shlex.shlex(line, posix=True, punctuation_chars=True)
    reader.whitespace_split = True
    try:
        return list(reader)
    except ValueError as error:
        raise AssertionError(f"no shell reads this ({error}): {line}") from None


def _ours(words: Sequence[str]) -> Iterator[tuple[list[str], list[str]]]:
    for word in words:
        if " " in word and re.search(r"vlm[-_]unlearn", word):
            yield from our_commands(word)
    if "vlm-unlearn" in words:
        yield [], list(words[words.index("vlm-unlearn") + 1 :])
    elif MODULE in words:
        yield list(words[: words.index(MODULE) + 1]), list(words[words.index(MODULE) + 1 :])
