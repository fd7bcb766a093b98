"""How the command reads at a terminal: help by sections, examples that can be copied, wrong usage told in one line."""

from __future__ import annotations

import inspect
import io
import sys
from collections.abc import Callable, Iterator
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from vlm_unlearn.cli.deprecation import current_command, current_options
from vlm_unlearn.errors import UserError, nearest, quoted

# Typer's own types of contexts, formatters and parameters are private, so they are Any here.
EXAMPLE = ("vlm-unlearn ", "accelerate ")  # how a paragraph begins that is a command to copy


class Command(TyperCommand):
    """A command whose help shows its arguments by the names of its usage line, and its examples unwrapped."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses the arguments. Options of the previous version count as the current ones."""
        return super().parse_args(ctx, current_options(ctx.command_path, args, warn=not ctx.resilient_parsing))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """``RECIPE.yaml [key=value ...] [OPTIONS]``."""
        return [*(_usage_name(param) for param in _arguments(self)), "[OPTIONS]"]

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """The help's paragraphs; a terminal wraps a command's line by itself, and copies it whole."""
        formatter.write_paragraph()
        with formatter.indentation():
            for number, paragraph in enumerate(inspect.cleandoc(self.help or "").split("\n\n")):
                if number:
                    formatter.write_paragraph()
                if paragraph.strip().startswith(EXAMPLE):
                    formatter.write(f"{'':>{formatter.current_indent}}  {' '.join(paragraph.split())}\n")
                else:
                    formatter.write_text(paragraph)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, then options."""
        arguments = [(_usage_name(param).strip("[]"), param.help or "") for param in _arguments(self)]
        options = [
            record
            for param in self.get_params(ctx)
            if param not in _arguments(self)
            if (record := param.get_help_record(ctx))
        ]
        for heading, rows in (("Arguments", arguments), ("Options", options)):
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows)


class Group(TyperGroup):
    """Commands under the headings of their help panels; alone it shows its help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typed; nothing at all asks for help."""
        return super().parse_args(ctx, args if args or ctx.resilient_parsing else ["--help"])

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Commands first: they are what somebody looks for. Numbered headings come last, in their order."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            if not command.hidden:
                summary = (
                    inspect.cleandoc(command.help or "")
                    .split("\n\n")[0]
                    .replace("\n", " ")
                    .partition(". ")[0]
                    .rstrip(".")
                )
                sections.setdefault(getattr(command, "rich_help_panel", None) or "Commands", []).append((name, summary))
        width = max(len(name) for name in self.commands)
        for heading, rows in sorted(sections.items(), key=lambda section: (section[0][0].isdigit(), section[0])):
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(width), summary) for name, summary in rows])
        options = [record for param in self.get_params(ctx) if (record := param.get_help_record(ctx))]
        with formatter.section("Options"):
            formatter.write_dl(options)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that is named first.

        Raises:
            UserError: there is none of that name; the nearest one is named, also one of a group within.
        """
        name = current_command(ctx.command_path, args[0], warn=not ctx.resilient_parsing)
        if name not in self.commands and not ctx.resilient_parsing and not name.startswith("-"):
            path = ctx.command_path
            within = [
                f"{group} {name}" for group, found in self.commands.items() if name in getattr(found, "commands", {})
            ]
            near = f"; did you mean {quoted(within[0])}?" if within else nearest(name, self.commands)
            raise UserError(f"{_place(path)}no command {quoted(name)}" + (near or f"; `{path} --help` lists them"))
        return super().resolve_command(ctx, [name, *args[1:]])


class Commands(typer.Typer):
    """Commands, or a group of them, that read as above; rich would make every help text 0.1 s slower."""

    def __init__(self, help: str, **settings: Any) -> None:
        context = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
        super().__init__(
            help=help,
            cls=Group,
            rich_markup_mode=None,
            context_settings=context,
            pretty_exceptions_enable=False,
            **settings,
        )

    def command(
        self, name: str | None = None, *, cls: type[TyperCommand] | None = Command, **settings: Any
    ) -> Callable[[Any], Any]:
        """As typer's."""
        return super().command(name, cls=cls, **settings)


def wrong_usage(error: typer.TyperException) -> str:
    """What typer says of a command line that it can't read, as one line with the mend."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "vlm-unlearn"
    message = " ".join(error.format_message().split()).rstrip(".")
    if hasattr(error, "possibilities"):  # an option that isn't there
        instead = _instead(error, context) or f"; `{path} --help` lists them"
        return f"{_place(path)}no option {quoted(getattr(error, 'option_name', ''))}{instead}"
    message = message[:1].lower() + message[1:]
    example = next(iter(examples(context.command.help or "")), "") if context and message.startswith("missing") else ""
    return f"{_place(path)}{message}; " + (f"for example: {example}" if example else f"`{path} --help` tells more")


def _place(path: str) -> str:
    """The command as a message begins with it; the program's own name is told already."""
    return "".join(f"{name}: " for name in [path.partition(" ")[2]] if name)


def _instead(error: typer.TyperException, context: Any) -> str:
    """What may be meant by an option that isn't there."""
    option = str(getattr(error, "option_name", ""))
    params = context.command.params if context else []
    known = [name for param in params for name in (*param.opts, *param.secondary_opts) if name.startswith("--")]
    if option in ("--debug", "--version"):
        return f"; it goes before the command: vlm-unlearn {option}"
    key = option.lstrip("-").replace("-", "_")
    if any(param.name == "overrides" for param in params) and key.partition(".")[0] in _config_keys():
        return f"; a key of the config has no dashes: {key}=..."
    return nearest(option, known)


def _config_keys() -> set[str]:
    from vlm_unlearn.config import JudgeConfig, Recipe, Suite

    return {key for config in (Recipe, Suite, JudgeConfig) for key in config.model_fields}


def examples(help: str) -> Iterator[str]:
    """The commands that a help text shows, each on one line."""
    for paragraph in inspect.cleandoc(help).split("\n\n"):
        if paragraph.strip().startswith(EXAMPLE):
            yield " ".join(paragraph.split())


def _arguments(command: Any) -> list[Any]:
    return [param for param in command.params if param.param_type_name == "argument"]


def _usage_name(param: Any) -> str:
    name = str(param.metavar or param.name.upper())
    if param.nargs != 1 and "..." not in name:
        name += "..."
    return name if param.required or name.startswith("[") else f"[{name}]"


def show_any_text() -> None:
    """Characters that the terminal's encoding doesn't have, and lone surrogates, are shown as escapes instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
