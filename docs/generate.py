"""Fills the pages of docs/reference/ from the code when the site is built (an MkDocs hook, see mkdocs.yml).

A line ``<!-- generated: NAME -->`` in a page is replaced by what the function NAME of `GENERATED` gives. So commands, config fields,
methods, rubrics and recipes are documented where they are written, and nowhere else.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
from annotated_types import Ge, Gt, Le, Lt
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from vlm_unlearn.benchmarks.base import BENCHMARKS
from vlm_unlearn.cli.main import app
from vlm_unlearn.config import Recipe, Suite, load
from vlm_unlearn.config.base import nested_configs
from vlm_unlearn.evaluation.benchmarks import SPECIFICITY
from vlm_unlearn.judging.rubric import load_rubric, shipped_rubrics
from vlm_unlearn.methods import METHODS, Method, ReferenceHidden, ReferenceLogits, ReferenceNLL
from vlm_unlearn.records import Batching, Comparison, Example, Prompt, Rate, Response, Round, Row, Summary, Verdict

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md")  # pages of the site that lie beside docs/, where GitHub looks for them


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie outside docs/."""
    for name in OUTSIDE:
        content = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name.lower(), content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fills a page's generated parts, and turns its links out of docs/ into what the site has of them.

    Raises:
        KeyError: a page asks for a part that nothing generates.
    """
    markdown = re.sub(
        r"^<!-- stub -->\n.*\n\n", "", markdown, flags=re.MULTILINE
    )  # it is said to those who read the file
    filled = re.sub(r"^<!-- generated: (\w+) -->$", lambda match: GENERATED[match[1]](), markdown, flags=re.MULTILINE)
    return re.sub(r"\[([^\]]+)\]\(((?:\.\./)+)([^)#]+)(#[^)]*)?\)", lambda match: _link_out(match, page), filled)


def _link_out(match: re.Match[str], page: Page) -> str:
    """A link that leaves docs/: to the page made of the file, or the file's name where the site has no such page."""
    text, up, path, anchor = match.groups()
    depth = page.file.src_uri.count("/")
    if up.count("../") <= depth:
        return match[0]  # stays within docs/
    if not (ROOT / path).exists():
        raise FileNotFoundError(f"{page.file.src_uri}: links to {path}, which is not there")
    if path in OUTSIDE:
        return f"[{text}]({'../' * depth}{path.lower()}{anchor or ''})"
    return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}`)"


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; cells are Markdown too."""
    lines = [heads, ["---"] * len(heads), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def code(text: object) -> str:
    """Text as it is, in a cell."""
    return f"`{text}`"


# The command line


def commands() -> str:
    """Every command: what it does, its examples, arguments and options, as ``--help`` has them."""
    root = typer.main.get_command(app)
    return "\n".join(_command("vlm-unlearn", root, 0))


def _command(path: str, command: Any, depth: int) -> Iterator[str]:
    yield f"{'#' * min(depth + 2, 4)} {path} {{ #{path.replace(' ', '-')} }}\n"
    with command.make_context(path, [], resilient_parsing=True) as context:
        usage = [
            piece.strip("{}").replace("[[", "[").replace("]]...", "]")
            for piece in command.collect_usage_pieces(context)
        ]
        records = [(parameter, parameter.get_help_record(context)) for parameter in command.get_params(context)]
        first, *others = _help_text(command.help or "")
        yield f"{first}\n```text\n{' '.join([path, *usage])}\n```\n"
        yield from others
        rows = [
            [code(record[0]), _prose(record[1])] for parameter, record in records if record and parameter.name != "help"
        ]
        if rows:
            yield table(["argument or option", "what it does"], rows)
        for name in getattr(command, "commands", {}):
            yield from _command(f"{path} {name}", command.commands[name], depth + 1)


def _help_text(text: str) -> Iterator[str]:
    """A docstring's paragraphs; those that hold commands are code."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text.replace("\b", ""))):
        lines = [line.strip() for line in paragraph.splitlines()]
        if all(line.startswith(("vlm-unlearn ", "accelerate ")) for line in lines):
            yield "```bash\n" + "\n".join(lines) + "\n```\n"
        elif lines not in (["Example:"], ["Examples:"]):
            yield _prose(" ".join(lines)) + "\n"


def _prose(text: str) -> str:
    """Text of a terminal as Markdown: placeholders and stars are themselves."""
    return re.sub(r"([*_])", r"\\\1", text.replace("<", "&lt;"))


# Config fields


def recipe_fields() -> str:
    """Every key of a recipe."""
    return "\n".join(_config(Recipe, "", set()))


def suite_fields() -> str:
    """Every key of a suite."""
    return "\n".join(_config(Suite, "", set()))


def _config(config: type[BaseModel], path: str, seen: set[str]) -> Iterator[str]:
    """A config's keys, then those of the configs within it, each once."""
    if path:
        yield f"## {path} {{ #{config.__name__.lower()} }}\n"
    seen.add(config.__name__)
    yield _prose_of(config) + "\n"
    yield _fields(config)
    for name, field in config.model_fields.items():
        for inner in nested_configs(field.annotation):
            if inner.__name__ not in seen:
                yield from _config(inner, f"{path}.{name}".strip("."), seen)


def _prose_of(documented: object) -> str:
    return (inspect.getdoc(documented) or "").replace("``", "`")


def _fields(config: type[BaseModel]) -> str:
    rows = [
        [code(field.alias or name), kind_of(field.annotation, field.metadata), _default(field), field.description or ""]
        for name, field in config.model_fields.items()
    ]
    return table(["key", "is", "default", "what it is for"], rows)


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    if field.is_required():
        return "needed"
    if isinstance(value, BaseModel):
        return (
            "its own"
            if not value.model_fields_set
            else code(next(iter(value.model_dump(include=value.model_fields_set).values())))
        )
    if isinstance(value, bool) or value is None:
        return code(str(value).lower().replace("none", "null"))
    return "none" if value in ("", [], {}, ()) else code(list(value) if isinstance(value, tuple) else value)


PLAIN = {
    str: "text",
    bool: "true or false",
    Path: "path",
    Any: "anything",
    type(None): "null",
    float: "number",
    int: "whole number",
}


def kind_of(annotation: Any, metadata: list[Any]) -> str:
    """A field's type in words, with its bounds: ``whole number above 0``."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kind_of(arguments[0], [part for extra in arguments[1:] for part in getattr(extra, "metadata", [extra])])
    if origin is typing.Literal:
        return " or ".join(code(value) for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(kind_of(argument, metadata if argument is not type(None) else []) for argument in arguments)
    if origin in (list, tuple):
        return "list of " + kind_of(arguments[0], [])
    if origin is dict:
        return f"name: {kind_of(arguments[1], [])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    return " ".join([PLAIN[annotation], *_bounds(metadata)])


def _bounds(metadata: list[Any]) -> Iterator[str]:
    words = {Gt: ("gt", "above"), Ge: ("ge", "from"), Lt: ("lt", "below"), Le: ("le", "to")}
    for kind, (attribute, word) in words.items():
        for bound in (part for part in metadata if isinstance(part, kind)):
            value = getattr(bound, attribute)
            if not (isinstance(value, int) and value >= 10_000):  # that one is against typing errors only
                yield f"{word} {value:g}"


# What ships


def methods() -> str:
    """Every method: its docstring, source, the sets it draws from and its options."""
    return "\n".join(part for name, method in sorted(METHODS.items()) for part in _method(name, method))


NEEDS: dict[type, str] = {ReferenceNLL: "likelihoods", ReferenceLogits: "logits", ReferenceHidden: "hidden states"}


def _method(name: str, method: type[Method]) -> Iterator[str]:
    built = method(method.options_type())
    needs = ", ".join(f"{NEEDS[type(need)]} of {need.role}" for need in built.needs) or "nothing"
    yield f"## {name}\n\n{_prose_of(method)}\n"
    yield f"- From: {method.source}\n- Draws from: {', '.join(built.roles)}\n- Must know of the reference model: {needs}\n"
    yield _fields(method.options_type)


def benchmarks() -> str:
    """Every benchmark and its official files."""
    heads = ["name", "`--annotations`", "`--questions`", "`--images`", "scores"]
    return table(
        heads, [[code(name), it.source, it.second, it.images, _prose_of(type(it))] for name, it in BENCHMARKS.items()]
    )


def rubrics() -> str:
    """Every shipped rubric, whole."""
    parts = []
    for name in shipped_rubrics():
        rubric = load_rubric(name)
        file = (ROOT / "src" / "vlm_unlearn" / "judging" / "rubrics" / f"{name}.txt").read_text(encoding="utf-8")
        parts += [
            f"## {name}\n\nVersion {rubric.head.version}, {rubric.head.source}\n",
            _folded("The rubric", file, "text"),
        ]
    return "\n".join(parts)


def recipes() -> str:
    """Every shipped recipe, suite and engine file: its first comment and its text."""
    parts = []
    for folder in ("safety_mirage", "safe_eraser", "tiny", "suites", "engines"):
        parts.append(f"## {folder}\n")
        for file in sorted((RECIPES / folder).glob("*.yaml")):
            name, text = f"{folder}/{file.stem}", file.read_text(encoding="utf-8")
            parts += [f"### {name}\n\n{_prose(_first_comment(text))}\n", _folded(f"{name}.yaml", text, "yaml")]
    return "\n".join(parts)


def _first_comment(text: str) -> str:
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines)


def _folded(title: str, text: str, language: str) -> str:
    inner = "\n".join(f"    {line}" for line in text.rstrip().splitlines())
    return f'??? note "{title}"\n\n    ```{language}\n{inner}\n    ```\n'


def metrics() -> str:
    """The metrics of every shipped suite, and with `paper: true` those of the published counting."""
    scores = {"mean": "mean score", "one_minus_mean": "1 less the mean score"}
    parts = []
    for file in sorted((RECIPES / "suites").glob("*.yaml")):
        suite = load(Suite, Path(f"suites/{file.stem}"), ["model=m"])
        rows = []
        corrected = [(code(name), metric) for name, metric in suite.metrics.items()]
        published = [(f"{code(name)}, published", metric) for name, metric in suite.paper_metrics.items()]
        for name, metric in (*corrected, *published):
            counts = scores[metric.score] if metric.score else ", ".join(map(code, metric.labels))
            of = "questions, any answer" if metric.aggregate == "any_per_question" else "answers"
            rows.append([name, counts, of, ", ".join(map(code, metric.splits)), _judge(suite, metric.judge)])
        parts += [
            f"## suites/{file.stem}\n",
            table(["metric", "counts", "of", "splits", "judge"], [*rows, *_benchmarks(suite)]),
        ]
    return "\n".join(parts)


def _judge(suite: Suite, called: str) -> str:
    """Who judges, and by what."""
    judge = suite.judge_config(called)
    by = f" by {code(judge.rubric)}" if judge.rubric else ""
    return f"{code(judge.name)}{by}{', as published' if judge.paper_compat else ''}"


def _benchmarks(suite: Suite) -> list[list[str]]:
    rows = []
    for one in suite.benchmarks:
        name = code(one.name)
        rows.append(
            [
                name,
                "the benchmark's score",
                "questions",
                name,
                _judge(suite, one.judge) if one.judge else "the official answers",
            ]
        )
    if set(SPECIFICITY) <= {one.name for one in suite.benchmarks}:
        rows.append(
            [
                code("specificity"),
                "the mean of their scores",
                "questions",
                ", ".join(map(code, SPECIFICITY)),
                "as theirs",
            ]
        )
    return rows


def records() -> str:
    """Every record that a file of ours holds."""
    parts = []
    for record in (Example, Round, Prompt, Response, Verdict, Summary, Row, Rate, Batching, Comparison):
        parts += [f"## {record.__name__} {{ #{record.__name__.lower()} }}\n\n{_prose_of(record)}\n", _fields(record)]
    return "\n".join(parts)


GENERATED: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (commands, recipe_fields, suite_fields, methods, benchmarks, rubrics, recipes, metrics, records)
}
