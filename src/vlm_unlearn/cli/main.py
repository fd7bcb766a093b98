"""Entry point of the ``vlm-unlearn`` command: assembles the groups and turns errors into one line and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from typing import NoReturn

import typer

from vlm_unlearn.cli import (
    attack,
    benchmark,
    compare,
    data,
    demo,
    doctor,
    evaluate,
    export,
    judge,
    recipes,
    report,
    table,
    train,
)
from vlm_unlearn.cli.common import fail, keep_deepspeed_off_stdout
from vlm_unlearn.cli.completion import bash_words, no_blank_after_keys
from vlm_unlearn.cli.deprecation import plain_deprecation_warnings
from vlm_unlearn.cli.terminal import Commands, show_any_text, wrong_usage
from vlm_unlearn.errors import RunError, UserError, quoted

START, PREPARE, UNLEARN = "Start here", "1. Prepare data", "2. Unlearn"
MEASURE, COMPARE, SHIP = "3. Measure: generate, judge, score", "4. Compare", "5. Ship"
STOPPED = "stopped; no file is half-written. Run the same command again: answers and checkpoints are kept, the rest is made anew"

app = Commands(
    "Removes harmful knowledge from vision-language models and proves it is gone.\n\n"
    "Both papers in miniature, on a CPU, in minutes: vlm-unlearn demo --out demo\n\n"
    "Every command has examples: vlm-unlearn train --help"
)
app.command("demo", rich_help_panel=START)(demo.demo)
app.command("doctor", rich_help_panel=START)(doctor.doctor)
app.command("recipes", rich_help_panel=START)(recipes.recipes)
app.add_typer(data.app, name="data", rich_help_panel=PREPARE)
app.command("train", rich_help_panel=UNLEARN)(train.train)
app.command("methods", rich_help_panel=UNLEARN)(train.methods)
app.command("evaluate", rich_help_panel=MEASURE)(evaluate.evaluate)
app.command("generate", rich_help_panel=MEASURE)(evaluate.generate)
app.add_typer(judge.judge_app, name="judge", rich_help_panel=MEASURE)
app.command("score", rich_help_panel=MEASURE)(evaluate.score)
app.add_typer(attack.attack_app, name="attack", rich_help_panel=MEASURE)
app.add_typer(benchmark.benchmark_app, name="benchmark", rich_help_panel=MEASURE)
app.command("compare", rich_help_panel=COMPARE)(compare.compare)
app.command("report", rich_help_panel=COMPARE)(report.report)
app.command("table", rich_help_panel=COMPARE)(table.table)
app.command("export", rich_help_panel=SHIP)(export.export)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"vlm-unlearn {version('vlm-unlearn')}")
        raise typer.Exit


@app.callback()
def root(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error; goes before the command."),
    version: bool = typer.Option(
        False, "--version", is_eager=True, callback=_version, help="Show the version and exit."
    ),
) -> None:
    """Options that stand before the command."""


def main() -> None:
    """Runs the command. Exit codes: 0 done, 1 the work failed, 2 the request was wrong, 130 stopped by Ctrl-C."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    debug = arguments[:1] == ["--debug"]
    _open_closed_streams()
    show_any_text()
    keep_deepspeed_off_stdout()
    if not _completable():
        raise SystemExit(0)
    if arguments[:1] in (["--show-completion"], ["--install-completion"]):
        no_blank_after_keys()
    try:
        with bash_words(), plain_deprecation_warnings():
            code = app(arguments, prog_name="vlm-unlearn", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        _fail(error, debug)
    if code == 130:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"\nvlm-unlearn: {STOPPED}\n")
        raise SystemExit(130)
    raise SystemExit(code if isinstance(code, int) else 0)


def _completable() -> bool:
    """Whether a shell that asks for what Tab offers has said where; a script of another version, or a person, may not have."""
    if not os.environ.get("_VLM_UNLEARN_COMPLETE", "").startswith("complete_bash"):
        return True
    return "COMP_WORDS" in os.environ and os.environ.get("COMP_CWORD", "").isdecimal()


def _open_closed_streams() -> None:
    """A stream that the caller has closed (``>&-``) is None; then what would be written there goes nowhere."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (open until the process ends)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _fail(error: Exception, debug: bool) -> NoReturn:
    """One line and an exit code for whatever went wrong."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, typer.TyperException):
        fail(UserError(wrong_usage(error)), 2)
    if isinstance(error, UserError):
        fail(error, 2)
    if isinstance(error, RunError):
        fail(error, 1)
    if isinstance(
        error, IsADirectoryError | NotADirectoryError | FileNotFoundError | FileExistsError | PermissionError
    ):
        fail(UserError(f"{error.filename}: {error.strerror}"), 2)
    if isinstance(error, OSError):
        if error.errno == errno.ENAMETOOLONG:
            fail(UserError(f"{quoted(error.filename)}: {error.strerror}"), 2)
        where = error.filename or (
            "" if error.errno != errno.ENOSPC else "the disk of the output or of the temporary folder"
        )
        fail(RunError(": ".join(str(part) for part in (where, error.strerror or error) if part)), 1)
    if "null byte" in str(error) or isinstance(error, UnicodeEncodeError):
        fail(UserError(f"a path or name holds a character that no file name can have ({error})"), 2)
    fail(RunError(f"{type(error).__name__}: {error}; run with `vlm-unlearn --debug ...` for the traceback"), 1)


if __name__ == "__main__":
    main()
