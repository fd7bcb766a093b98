"""Names, errors and documentation follow the project's language rules (CONTRIBUTING.md)."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "vlm_unlearn"
MODULES = sorted(SOURCE.rglob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]

# Participles and ranks: they name the act that produced a value, not the value.
BANNED = {
    *("found", "told", "asked", "said", "known", "whole", "own", "one", "wanted"),
    *("kept", "seen", "given", "made", "there", "before", "shown"),
}
CODED_ERRORS = {"UserError", "RunError"}
KEBAB_CASE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def parsed(module: Path) -> ast.Module:
    return ast.parse(module.read_text(encoding="utf-8"))


def defined_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """The names that a module defines: variables, attributes, parameters, functions and classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno


@pytest.mark.parametrize("module", MODULES, ids=relative)
def test_names_describe_the_values_that_they_hold(module: Path) -> None:
    names = defined_names(parsed(module))
    banned = [f"line {line}: {name}" for name, line in names if name.strip("_") in BANNED]
    assert not banned, f"{relative(module)}: name these after their values: {', '.join(banned)}"


def error_calls(tree: ast.AST) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CODED_ERRORS:
            yield node


def codes_of(node: ast.expr | None) -> list[str] | None:
    """The codes that a `code` argument can have if they are literals, or None."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.IfExp):
        body, alternative = codes_of(node.body), codes_of(node.orelse)
        return None if body is None or alternative is None else body + alternative
    return None


@pytest.mark.parametrize("module", MODULES, ids=relative)
def test_every_error_has_a_code_in_kebab_case(module: Path) -> None:
    problems = []
    for call in error_calls(parsed(module)):
        code = next((keyword.value for keyword in call.keywords if keyword.arg == "code"), None)
        if code is None:
            problems.append(f"line {call.lineno}: no code")
        codes = codes_of(code) or []  # a variable or an attribute has the code of another error or of a table
        problems += [f"line {call.lineno}: {text!r}" for text in codes if not KEBAB_CASE.fullmatch(text)]
    assert not problems, f"{relative(module)}: {', '.join(problems)}"


@dataclass(frozen=True)
class Prose:
    """Counts in the prose of a Markdown page, without code, tables, headings and HTML."""

    words: int
    sentences: int
    semicolons: int
    whats: int


def prose_of(text: str) -> Prose:
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^[ \t]*[|<!:].*$|^#+.*$|^---.*?^---$", "", text, flags=re.MULTILINE)
    text = re.sub(r"`[^`\n]*`", "X", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    paragraphs = re.split(r"\n\s*\n|\n\s*(?:[-*]|\d+\.)\s+", text)
    sentences = [
        sentence
        for paragraph in paragraphs
        for sentence in re.split(r"(?<=[.!?:])[\"')\]*]*\s+", " ".join(paragraph.split()))
        if re.search(r"[A-Za-z]", sentence)
    ]
    words = re.findall(r"[A-Za-z0-9'’-]+", text)
    whats = re.findall(r"(?<!\")\bwhat\b(?!\")", text, re.IGNORECASE)  # "what" in quotes is a trigger word
    return Prose(len(words), len(sentences), text.count(";"), len(whats))


def test_documentation_has_short_sentences_and_few_semicolons() -> None:
    pages = {page: prose_of(page.read_text(encoding="utf-8")) for page in PAGES}
    words = sum(prose.words for prose in pages.values())
    assert 1000 * sum(prose.semicolons for prose in pages.values()) / words <= 3
    assert 1000 * sum(prose.whats for prose in pages.values()) / words <= 2
    assert words / sum(prose.sentences for prose in pages.values()) <= 17
    long = {
        relative(page): round(prose.words / prose.sentences, 1)
        for page, prose in pages.items()
        if prose.words > 17 * prose.sentences
    }
    assert not long
    chains = {relative(page): prose.semicolons for page, prose in pages.items() if prose.semicolons > 5}
    assert not chains


def long_lines(text: str) -> list[int]:
    """The lines over 100 columns that can be wrapped: no table, code, HTML, and no single long word such as a link."""
    lines, in_code = [], False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith(("```", "~~~")):
            in_code = not in_code
        elif not in_code and len(line) > 100 and not re.match(r"\s*[|<\[!]|    ", line):
            breakable = re.sub(r"\[[^\]]*\]\([^)]*\)|`[^`]*`|https?://\S+", "X", line)
            if len(breakable) > 60:
                lines.append(number)
    return lines


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_documentation_lines_have_at_most_100_columns(page: Path) -> None:
    assert long_lines(page.read_text(encoding="utf-8")) == []


def test_language_checks_find_violations() -> None:
    tree = ast.parse("def f(told):\n    self._found = 1\n    raise UserError('no')\n")
    assert [name for name, _ in defined_names(tree) if name.strip("_") in BANNED] == ["told", "_found"]
    assert len(list(error_calls(tree))) == 1
    assert codes_of(ast.parse("'A' if x else 'b-c'", mode="eval").body) == ["A", "b-c"]
    assert prose_of('# What; what\n\nIt is what; it is "what". `what;`\n\n| what; |\n') == Prose(7, 2, 1, 1)
    assert long_lines("word " * 25 + "\n```\n" + "x " * 60 + "\n```\n| " + "x " * 60) == [1]
