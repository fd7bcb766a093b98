"""Entry point of the ``vlm-unlearn`` command: assembles the groups and turns errors into one line and an exit code."""

from __future__ import annotations

import errno
import sys

import typer

from vlm_unlearn.cli import attack, benchmark, compare, data, demo, doctor, evaluate, export, judge, report, table, train
from vlm_unlearn.cli.common import fail, keep_deepspeed_off_stdout
from vlm_unlearn.errors import RequestError, WorkError, shown

app = typer.Typer(
    help="Removes harmful knowledge from vision-language models and proves it is gone.\n\n"
    "Start with: vlm-unlearn demo --out demo   (both papers in miniature, on a CPU, in minutes)",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("methods")(train.methods)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("generate")(evaluate.generate)
app.command("score")(evaluate.score)
app.command("compare")(compare.compare)
app.command("report")(report.report)
app.command("table")(table.table)
app.command("export")(export.export)
app.command("doctor")(doctor.doctor)
app.add_typer(judge.judge_app, name="judge")
app.add_typer(attack.attack_app, name="attack")
app.add_typer(benchmark.benchmark_app, name="benchmark")
app.add_typer(data.app, name="data")


@app.callback()
def root(debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error.")) -> None:
    """Options that stand before the command."""


def main() -> None:
    """Runs the command. Exit codes: 0 done, 1 the work failed, 2 the request was wrong."""
    debug = "--debug" in sys.argv[1:2]
    keep_deepspeed_off_stdout()
    try:
        app()
    except RequestError as error:
        fail(error, 2, debug)
    except WorkError as error:
        fail(error, 1, debug)
    except (IsADirectoryError, NotADirectoryError, FileNotFoundError, FileExistsError, PermissionError) as error:
        fail(RequestError(f"{error.filename}: {error.strerror}"), 2, debug)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            fail(RequestError(f"{shown(error.filename)}: {error.strerror}"), 2, debug)
        fail(WorkError(": ".join(str(part) for part in (error.filename, error.strerror or error) if part)), 1, debug)
    except Exception as error:
        if isinstance(error, UnicodeEncodeError) and error.encoding not in ("utf-8", "utf8"):
            fail(WorkError(f"the terminal's encoding ({error.encoding}) can't show this text; set PYTHONIOENCODING=utf-8"), 1, debug)
        if "null byte" in str(error) or isinstance(error, UnicodeEncodeError):
            fail(RequestError(f"a path or name holds a character that no file name can have ({error})"), 2, debug)
        fail(WorkError(f"{type(error).__name__}: {error}; run with `vlm-unlearn --debug ...` for the traceback"), 1, debug)


if __name__ == "__main__":
    main()
