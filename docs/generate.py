"""MkDocs hook that generates the pages of docs/reference/ from the code (see mkdocs.yml).

Each line ``<!-- generated: NAME -->`` of a page is replaced by the output of the function NAME in `GENERATED`.
Commands, config fields, methods, rubrics and recipes are therefore documented in one place, their source.
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

from vlm_unlearn import plugins
from vlm_unlearn.benchmarks.base import BENCHMARKS
from vlm_unlearn.cli.main import app
from vlm_unlearn.cli.terminal import EXAMPLE
from vlm_unlearn.config import Recipe, RobustnessSuite, Suite, Sweep, load
from vlm_unlearn.config.base import nested_configs
from vlm_unlearn.evaluation.benchmarks import SPECIFICITY_BENCHMARKS
from vlm_unlearn.judging.rubric import load_rubric, shipped_rubrics
from vlm_unlearn.methods import METHODS, Method, ReferenceHidden, ReferenceLogits, ReferenceNLL
from vlm_unlearn.methods.wrappers import DEFENSES
from vlm_unlearn.records import (
    Batching,
    Comparison,
    Example,
    ImageEdit,
    Prompt,
    Rate,
    Response,
    Round,
    Row,
    Summary,
    Verdict,
)

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md")  # pages of the site outside docs/, where GitHub expects them


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages outside docs/ to the site."""
    for name in OUTSIDE:
        content = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name.lower(), content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fills in the generated sections of a page, and rewrites its links that lead out of docs/.

    Raises:
        KeyError: the page names a section that no function generates.
    """
    markdown = re.sub(
        r"^<!-- stub -->\n.*\n\n", "", markdown, flags=re.MULTILINE
    )  # a note for readers of the file itself
    filled = re.sub(r"^<!-- generated: (\w+) -->$", lambda match: GENERATED[match[1]](), markdown, flags=re.MULTILINE)
    return re.sub(r"\[([^\]]+)\]\(((?:\.\./)+)([^)#]+)(#[^)]*)?\)", lambda match: _link_out(match, page), filled)


def _link_out(match: re.Match[str], page: Page) -> str:
    """Rewrites a link that leaves docs/ to the site's page of that file, or to the file name if there is no page."""
    text, up, path, anchor = match.groups()
    depth = page.file.src_uri.count("/")
    if up.count("../") <= depth:
        return match[0]  # stays within docs/
    if not (ROOT / path).exists():
        raise FileNotFoundError(f"{page.file.src_uri}: links to {path}, which does not exist")
    if path in OUTSIDE:
        return f"[{text}]({'../' * depth}{path.lower()}{anchor or ''})"
    return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}`)"


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table. Cells are Markdown."""
    lines = [heads, ["---"] * len(heads), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def code(text: object) -> str:
    """Returns text as inline code."""
    return f"`{text}`"


# The command line


def commands() -> str:
    """Returns the help text of every command: description, examples, arguments and options."""
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
            yield table(["argument or option", "description"], rows)
        for name in getattr(command, "commands", {}):
            yield from _command(f"{path} {name}", command.commands[name], depth + 1)


def _help_text(text: str) -> Iterator[str]:
    """Yields the paragraphs of a docstring. Paragraphs of commands become code blocks."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text.replace("\b", ""))):
        lines = [line.strip() for line in paragraph.splitlines()]
        if lines[0].startswith(EXAMPLE):
            yield "```bash\n" + " ".join(lines) + "\n```\n"
        elif lines not in (["Example:"], ["Examples:"]):
            yield _prose(" ".join(lines)) + "\n"


def _prose(text: str) -> str:
    """Escapes terminal text for Markdown, so that placeholders and asterisks stay literal."""
    return re.sub(r"([*_])", r"\\\1", text.replace("<", "&lt;"))


# Config fields


def recipe_fields() -> str:
    """Returns a table of every key of a recipe."""
    return "\n".join(_config(Recipe, "", set()))


def suite_fields() -> str:
    """Returns a table of every key of a suite."""
    return "\n".join(_config(Suite, "", set()))


def robustness_fields() -> str:
    """Returns a table of every key of a robustness suite."""
    return "\n".join(_config(RobustnessSuite, "", set()))


def _config(config: type[BaseModel], path: str, documented: set[str]) -> Iterator[str]:
    """Yields the keys of a config, then those of its nested configs. Each config appears once."""
    if path:
        yield f"## {path} {{ #{config.__name__.lower()} }}\n"
    documented.add(config.__name__)
    yield _prose_of(config) + "\n"
    yield _fields(config)
    for name, field in config.model_fields.items():
        for inner in nested_configs(field.annotation):
            if inner.__name__ not in documented:
                yield from _config(inner, f"{path}.{name}".strip("."), documented)


def _prose_of(documented: object) -> str:
    return (inspect.getdoc(documented) or "").replace("``", "`")


def _fields(config: type[BaseModel]) -> str:
    rows = [
        [code(field.alias or name), kind_of(field.annotation, field.metadata), _default(field), field.description or ""]
        for name, field in config.model_fields.items()
    ]
    return table(["key", "type", "default", "description"], rows)


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    if field.is_required():
        return "required"
    if isinstance(value, BaseModel):
        return (
            "see its keys"
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
    int: "integer",
}


def kind_of(annotation: Any, metadata: list[Any]) -> str:
    """Returns a field's type in words, with its bounds: ``integer above 0``."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kind_of(arguments[0], [item for extra in arguments[1:] for item in getattr(extra, "metadata", [extra])])
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
        for bound in (item for item in metadata if isinstance(item, kind)):
            value = getattr(bound, attribute)
            if not (isinstance(value, int) and value >= 10_000):  # such a bound only catches typing errors
                yield f"{word} {value:g}"


# What ships


def methods() -> str:
    """Returns the docstring, source, training sets and options of every method."""
    return "\n".join(section for name, method in sorted(METHODS.items()) for section in _method(name, method))


def sweep_fields() -> str:
    """Returns a table of every key of a sweep."""
    return "\n".join(_config(Sweep, "", set()))


def attacks() -> str:
    """Returns the docstring and the options of every attack on the input and on the model."""
    kinds = [("Attacks on the input", plugins.ATTACKS), ("Attacks on the model", plugins.MODEL_ATTACKS)]
    sections = []
    for title, registry in kinds:
        sections.append(f"## {title}\n")
        for name, attack in registry.built_in_items():
            sections += [f"### {name}\n", f"{_prose_of(attack)}\n"]
            if attack.options_type.model_fields:
                sections.append(_fields(attack.options_type))
    return "\n".join(sections)


NEEDS: dict[type, str] = {ReferenceNLL: "likelihoods", ReferenceLogits: "logits", ReferenceHidden: "hidden states"}


def _method(name: str, method: type[Method]) -> Iterator[str]:
    requirements = method(method.options_type()).requirements
    needs = ", ".join(f"{NEEDS[type(need)]} of {need.role}" for need in requirements.references) or "not needed"
    yield f"## {name}\n\n{_prose_of(method)}\n"
    yield f"- Source: {method.source}\n- Training sets: {', '.join(requirements.roles)}\n- Reference model: {needs}\n"
    yield _fields(method.options_type)


def defenses() -> str:
    """Returns the docstring, source and options of every defense."""
    sections = []
    for name, defense in sorted(DEFENSES.items()):
        sections += [f"## {name}\n\n{_prose_of(defense)}\n", f"- Source: {defense.source}\n"]
        sections.append(_fields(defense.options_type))
    return "\n".join(sections)


def benchmarks() -> str:
    """Returns a table of every benchmark and its official files."""
    heads = ["name", "`--annotations`", "`--questions`", "`--images`", "scoring"]
    return table(
        heads,
        [
            [
                code(name),
                benchmark.annotation_file,
                benchmark.question_file,
                benchmark.image_folder,
                _prose_of(type(benchmark)),
            ]
            for name, benchmark in BENCHMARKS.items()
        ],
    )


def rubrics() -> str:
    """Returns every shipped rubric with its full text."""
    sections = []
    for name in shipped_rubrics():
        rubric = load_rubric(name)
        file = (ROOT / "src" / "vlm_unlearn" / "judging" / "rubrics" / f"{name}.txt").read_text(encoding="utf-8")
        sections += [
            f"## {name}\n\nVersion {rubric.header.version}, {rubric.header.source}\n",
            _folded("Text of the rubric", file, "text"),
        ]
    return "\n".join(sections)


def recipes() -> str:
    """Returns the first comment and the text of every shipped recipe, suite and engine file."""
    sections = []
    for folder in ("safety_mirage", "safe_eraser", "tiny", "suites", "sweeps", "engines"):
        sections.append(f"## {folder}\n")
        for file in sorted((RECIPES / folder).glob("*.yaml")):
            name, text = f"{folder}/{file.stem}", file.read_text(encoding="utf-8")
            sections += [f"### {name}\n\n{_prose(_first_comment(text))}\n", _folded(f"{name}.yaml", text, "yaml")]
    return "\n".join(sections)


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
    """Returns the metrics of every shipped suite, and those that ``paper_compat: true`` adds."""
    scores = {"mean": "mean score", "one_minus_mean": "1 minus the mean score"}
    sections = []
    for file in sorted((RECIPES / "suites").glob("*.yaml")):
        if "robustness" in file.stem:
            continue  # has attacks instead of metrics
        suite = load(Suite, Path(f"suites/{file.stem}"), ["model=m"])
        rows = []
        corrected = [(code(name), metric) for name, metric in suite.metrics.items()]
        published = [(f"{code(name)}, published", metric) for name, metric in suite.paper_metrics.items()]
        for name, metric in (*corrected, *published):
            counts = scores[metric.score] if metric.score else ", ".join(map(code, metric.labels))
            of = "questions, any answer" if metric.aggregate == "any_per_question" else "answers"
            rows.append([name, counts, of, ", ".join(map(code, metric.splits)), _judge(suite, metric.judge)])
        sections += [
            f"## suites/{file.stem}\n",
            table(["metric", "counts", "of", "splits", "judge"], [*rows, *_benchmarks(suite)]),
        ]
    return "\n".join(sections)


def _judge(suite: Suite, name: str) -> str:
    """Returns the name of the judge and of its rubric."""
    judge = suite.judge_config(name)
    by = f" by {code(judge.rubric)}" if judge.rubric else ""
    return f"{code(judge.name)}{by}{', as published' if judge.paper_compat else ''}"


def _benchmarks(suite: Suite) -> list[list[str]]:
    rows = []
    for benchmark in suite.benchmarks:
        name = code(benchmark.name)
        judge = _judge(suite, benchmark.judge) if benchmark.judge else "the official answers"
        rows.append([name, "the benchmark's score", "questions", name, judge])
    if set(SPECIFICITY_BENCHMARKS) <= {benchmark.name for benchmark in suite.benchmarks}:
        names = ", ".join(map(code, SPECIFICITY_BENCHMARKS))
        rows.append([code("specificity"), "the mean of the scores", "questions", names, "those of the benchmarks"])
    return rows


def records() -> str:
    """Returns the fields of every record type that the output files contain."""
    sections = []
    edits = typing.get_args(typing.get_args(ImageEdit)[0])
    for record in (Example, Round, Prompt, *edits, Response, Verdict, Summary, Row, Rate, Batching, Comparison):
        sections += [f"## {record.__name__} {{ #{record.__name__.lower()} }}\n\n{_prose_of(record)}\n", _fields(record)]
    return "\n".join(sections)


GENERATED: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        *(
            commands,
            recipe_fields,
            suite_fields,
            robustness_fields,
            sweep_fields,
            attacks,
            methods,
            defenses,
            benchmarks,
            rubrics,
        ),
        *(recipes, metrics, records),
    )
}
