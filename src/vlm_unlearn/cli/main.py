"""Entry point of the ``vlm-unlearn`` command: its subcommands, and errors as one line with an exit code."""

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
    chat,
    compare,
    convert,
    data,
    demo,
    doctor,
    evaluate,
    export,
    import_answers,
    judge,
    recipes,
    report,
    robustness,
    sweep,
    table,
    train,
)
from vlm_unlearn.cli.common import fail, keep_deepspeed_off_stdout
from vlm_unlearn.cli.completion import bash_words, no_space_after_keys
from vlm_unlearn.cli.deprecation import plain_deprecation_warnings
from vlm_unlearn.cli.terminal import Commands, escape_unencodable_text, usage_error
from vlm_unlearn.errors import RunError, UserError, quoted

START, PREPARE, UNLEARN = "Start here", "1. Prepare data", "2. Unlearn"
MEASURE, COMPARE, SHIP = "3. Measure: generate, judge, score", "4. Compare", "5. Ship"
STOPPED = (
    "stopped. All files are complete. Run the same command again to resume: saved answers and checkpoints are reused"
)

app = Commands(
    "Unlearns harmful knowledge in vision-language models and measures harmful answers, over-refusal and utility.\n\n"
    "Both papers in miniature, on a CPU, in minutes: vlm-unlearn demo --out demo\n\n"
    "The help of every command has examples: vlm-unlearn train --help"
)
app.command("demo", rich_help_panel=START)(demo.demo)
app.command("doctor", rich_help_panel=START)(doctor.doctor)
app.command("recipes", rich_help_panel=START)(recipes.recipes)
app.add_typer(data.app, name="data", rich_help_panel=PREPARE)
app.command("convert", rich_help_panel=PREPARE)(convert.convert)
app.command("train", rich_help_panel=UNLEARN)(train.train)
app.command("sweep", rich_help_panel=UNLEARN)(sweep.sweep)
app.command("methods", rich_help_panel=UNLEARN)(train.methods)
app.command("evaluate", rich_help_panel=MEASURE)(evaluate.evaluate)
app.command("generate", rich_help_panel=MEASURE)(evaluate.generate)
app.command("import-answers", rich_help_panel=MEASURE)(import_answers.import_answers)
app.add_typer(judge.judge_app, name="judge", rich_help_panel=MEASURE)
app.command("score", rich_help_panel=MEASURE)(evaluate.score)
app.command("chat", rich_help_panel=MEASURE)(chat.chat)
app.command("robustness", rich_help_panel=MEASURE)(robustness.robustness)
app.add_typer(attack.attack_app, name="attack", rich_help_panel=MEASURE)
app.add_typer(benchmark.benchmark_app, name="benchmark", rich_help_panel=MEASURE)
app.command("compare", rich_help_panel=COMPARE)(compare.compare)
app.command("report", rich_help_panel=COMPARE)(report.report)
app.command("table", rich_help_panel=COMPARE)(table.table)
app.command("export", rich_help_panel=SHIP)(export.export)


def _print_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        typer.echo(f"vlm-unlearn {version('vlm-unlearn')}")
        raise typer.Exit


@app.callback()
def root(
    debug: bool = typer.Option(False, "--debug", help="Print the traceback of an error. Goes before the command."),
    version: bool = typer.Option(
        False, "--version", is_eager=True, callback=_print_version, help="Print the version and exit."
    ),
) -> None:
    """Defines the options that go before the command."""


def main() -> None:
    """Runs the command line.

    Exit codes: 0 success, 1 the work failed, 2 the request was invalid, 3 a rule of abort_when stopped the training,
    130 stopped by Ctrl-C.
    """
    arguments = sys.argv[1:]
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    debug = arguments[:1] == ["--debug"]
    _replace_closed_streams()
    escape_unencodable_text()
    keep_deepspeed_off_stdout()
    if not _is_valid_completion_request():
        raise SystemExit(0)
    if arguments[:1] in (["--show-completion"], ["--install-completion"]):
        no_space_after_keys()
    try:
        with bash_words(), plain_deprecation_warnings():
            code = app(arguments, prog_name="vlm-unlearn", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        _fail(error, debug)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of a Rust library, such as tokenizers
            raise
        _fail(RuntimeError(f"a library crashed: {error}"), debug)
    if code == 130:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"\nvlm-unlearn: {STOPPED}\n")
        raise SystemExit(130)
    raise SystemExit(code if isinstance(code, int) else 0)


def _is_valid_completion_request() -> bool:
    """Returns False for a request for bash completions that lacks the position of the cursor.

    A completion script of another version sends such requests, or a person does by hand.
    """
    if not os.environ.get("_VLM_UNLEARN_COMPLETE", "").startswith("complete_bash"):
        return True
    return "COMP_WORDS" in os.environ and os.environ.get("COMP_CWORD", "").isdecimal()


def _replace_closed_streams() -> None:
    """Replaces a standard stream that the caller has closed (``>&-``), which is None, by the null device."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (open until the process ends)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _fail(error: Exception, debug: bool) -> NoReturn:
    """Prints any error in one line and exits with its exit code."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, typer.TyperException):
        fail(usage_error(error), 2)
    if isinstance(error, UserError):
        fail(error, 2)
    if isinstance(error, RunError):
        fail(error, 1)
    if isinstance(
        error, IsADirectoryError | NotADirectoryError | FileNotFoundError | FileExistsError | PermissionError
    ):
        fail(UserError(f"{error.strerror}", code=_FILE_CODES[_kind(error)], file=error.filename), 2)
    if isinstance(error, OSError):
        if error.errno == errno.ENAMETOOLONG:
            fail(UserError(f"{quoted(error.filename)}: {error.strerror}", code="file-unreadable"), 2)
        full_disk = "the disk of the output or of the temporary folder" if error.errno == errno.ENOSPC else None
        message = str(error.strerror or error)
        fail(RunError(message, code="system-error", file=error.filename or full_disk), 1)
    if "null byte" in str(error) or isinstance(error, UnicodeEncodeError):
        fail(
            UserError(f"a path or name contains a character that no file name can have ({error})", code="invalid-path"),
            2,
        )
    message = f"{type(error).__name__}: {error}; run with `vlm-unlearn --debug ...` for the traceback"
    fail(RunError(message, code="unexpected-error"), 1)


_FILE_CODES: dict[type[OSError], str] = {
    IsADirectoryError: "not-a-file",
    NotADirectoryError: "not-a-folder",
    FileNotFoundError: "file-not-found",
    FileExistsError: "output-exists",
    PermissionError: "file-unreadable",
}


def _kind(error: OSError) -> type[OSError]:
    return next(kind for kind in _FILE_CODES if isinstance(error, kind))


if __name__ == "__main__":
    main()
