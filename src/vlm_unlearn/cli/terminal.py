"""Help texts and usage errors of the command line.

The help lists commands by section, shows examples that can be copied, and a usage error is one line with its fix.
"""

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
EXAMPLE = ("vlm-unlearn ", "accelerate ")  # a help paragraph that starts with one of these is a command to copy


class Command(TyperCommand):
    """A command whose help names its arguments as in the usage line and does not wrap its examples."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses the arguments. Options of the previous version count as the current ones."""
        return super().parse_args(ctx, current_options(ctx.command_path, args, warn=not ctx.resilient_parsing))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Returns the words after the command in the usage line: ``RECIPE.yaml [key=value ...] [OPTIONS]``."""
        return [*(_usage_name(param) for param in _arguments(self)), "[OPTIONS]"]

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Writes the paragraphs of the help. An example stays on one line, so that copying it copies the command."""
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
        """Writes the arguments, then the options."""
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
    """A group whose help lists its commands under the headings of their help panels. Run alone, it prints its help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses the arguments. No arguments mean ``--help``."""
        return super().parse_args(ctx, args if args or ctx.resilient_parsing else ["--help"])

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the commands by section, then the options. Numbered sections come last, in their order."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            if not command.hidden:
                first_paragraph = inspect.cleandoc(command.help or "").split("\n\n")[0].replace("\n", " ")
                summary = first_paragraph.partition(". ")[0].rstrip(".")
                sections.setdefault(getattr(command, "rich_help_panel", None) or "Commands", []).append((name, summary))
        width = max(len(name) for name in self.commands)
        for heading, rows in sorted(sections.items(), key=lambda section: (section[0][0].isdigit(), section[0])):
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(width), summary) for name, summary in rows])
        options = [record for param in self.get_params(ctx) if (record := param.get_help_record(ctx))]
        with formatter.section("Options"):
            formatter.write_dl(options)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Returns the command that the first argument names. A name of the previous version counts as the current one.

        Raises:
            UserError: There is no such command. The message suggests the nearest one of this group or of its groups.
        """
        name = current_command(ctx.command_path, args[0], warn=not ctx.resilient_parsing)
        if name not in self.commands and not ctx.resilient_parsing and not name.startswith("-"):
            path = ctx.command_path
            in_groups = [
                f"{group} {name}"
                for group, command in self.commands.items()
                if name in getattr(command, "commands", {})
            ]
            suggestion = f"; did you mean {quoted(in_groups[0])}?" if in_groups else nearest(name, self.commands)
            raise UserError(
                f"no command {quoted(name)}" + (suggestion or f"; `{path} --help` lists them"),
                code="unknown-command",
                field=_without_program_name(path),
            )
        return super().resolve_command(ctx, [name, *args[1:]])


class Commands(typer.Typer):
    """A group of commands with the help above. It does without rich, which would slow each help by 0.1 s."""

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
        """Registers a command, as in typer."""
        return super().command(name, cls=cls, **settings)


def usage_error(error: typer.TyperException) -> UserError:
    """Returns the error for a command line that typer rejects: one line with the fix."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "vlm-unlearn"
    command = _without_program_name(path)
    if hasattr(error, "possibilities"):  # an unknown option
        suggestion = _suggested_option(error, context) or f"; `{path} --help` lists them"
        option = quoted(getattr(error, "option_name", ""))
        return UserError(f"no option {option}{suggestion}", code="unknown-option", field=command)
    message = " ".join(error.format_message().split()).rstrip(".")
    message = message[:1].lower() + message[1:]
    example = next(iter(examples(context.command.help or "")), "") if context and message.startswith("missing") else ""
    hint = f"for example: {example}" if example else f"see `{path} --help`"
    return UserError(f"{message}; {hint}", code="invalid-usage", field=command)


def _without_program_name(path: str) -> str | None:
    """Returns a command's path without ``vlm-unlearn``, which every message starts with."""
    return path.partition(" ")[2] or None


def _suggested_option(error: typer.TyperException, context: Any) -> str:
    """Returns a suggestion for an unknown option, or ``''``."""
    option = str(getattr(error, "option_name", ""))
    params = context.command.params if context else []
    options = [name for param in params for name in (*param.opts, *param.secondary_opts) if name.startswith("--")]
    if option in ("--debug", "--version"):
        return f"; it goes before the command: vlm-unlearn {option}"
    key = option.lstrip("-").replace("-", "_")
    if any(param.name == "overrides" for param in params) and key.partition(".")[0] in _config_keys():
        return f"; a key of the config has no dashes: {key}=..."
    return nearest(option, options)


def _config_keys() -> set[str]:
    from vlm_unlearn.config import JudgeConfig, Recipe, Suite

    return {key for config in (Recipe, Suite, JudgeConfig) for key in config.model_fields}


def examples(help: str) -> Iterator[str]:
    """Yields the example commands of a help text, each on one line."""
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


def escape_unencodable_text() -> None:
    """Prints characters that the terminal's encoding lacks, and lone surrogates, as escapes instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
