"""Output, progress and error reporting that the commands share."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

import typer

from vlm_unlearn.errors import printable, shortened

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.progress import TaskID
    from rich.table import Table
    from rich.text import Text

    from vlm_unlearn.errors import Problems
    from vlm_unlearn.records import Comparison, Rate, Row, Summary
    from vlm_unlearn.reporting.columns import Column

JSON_OPTION = typer.Option(False, "--json", help="Print one JSON document and nothing else on standard output.")

OVERWRITE_OPTION = typer.Option(
    False, "--overwrite", help="Overwrite an existing output that vlm-unlearn has not written."
)


MAX_LINE_LENGTH = 2000  # characters of an error message, which may contain values of the user


def fail(error: BaseException, exit_code: int) -> NoReturn:
    """Prints an error in one line, ``vlm-unlearn: MESSAGE [CODE]``, and exits with the exit code."""
    line = fail_line(error)
    if os.environ.get("RANK", "0") != "0" and "Connection closed by peer" in line:
        raise SystemExit(exit_code)  # the first process has printed the cause
    sys.stderr.write(line)
    raise SystemExit(exit_code)


def fail_line(error: BaseException) -> str:
    """Returns the line that is printed for an error, ``vlm-unlearn: MESSAGE [CODE]``."""
    line = shortened(printable(" ".join(str(error).split())), MAX_LINE_LENGTH)
    code = getattr(error, "code", "")
    return f"vlm-unlearn: {line} [{code}]\n" if code else f"vlm-unlearn: {line}\n"


def print_json(value: object) -> None:
    """Prints the document of ``--json``."""
    sys.stdout.write(json.dumps(value, ensure_ascii=True, indent=2) + "\n")


def status_console() -> Console:
    """Returns a console on standard error, for progress and notes. Standard output is for results."""
    from rich.console import Console

    return Console(stderr=True)


def result_console() -> Console:
    """Returns a console on standard output, for tables.

    Without a terminal its width is the environment variable COLUMNS, or 150 if that is not set, so that tables fit.
    """
    from rich.console import Console

    columns = os.environ.get("COLUMNS", "")
    has_width = columns.isdecimal() and int(columns) > 0
    console = Console()
    return console if console.is_terminal or has_width else Console(width=150)


def quiet_libraries() -> None:
    """Turns off the progress bars and warnings of transformers, which would break up ours."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import warnings

    # PEFT uses the deprecated attribute. The user can do nothing about it.
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def keep_deepspeed_off_stdout() -> None:
    """Drops DeepSpeed's log messages below ERROR and writes the others to standard error.

    Where DeepSpeed is installed, accelerate imports it, and it logs to standard output, which is for results.
    """
    import logging

    def divert(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            sys.stderr.write(f"{record.getMessage()}\n")
        return False

    logging.getLogger("DeepSpeed").addFilter(divert)


PROGRESS_SECONDS = 60  # between two progress lines where no bar can be drawn


class Stages:
    """Progress of the stages of a command.

    On a terminal each stage is a progress bar. Without one, a line is printed when a stage starts and then each minute.
    """

    def __init__(self) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._console = status_console()
        self._tasks: dict[str, int] = {}
        self._draws_bars = self._console.is_terminal and not self._console.is_dumb_terminal
        self._wait_task: TaskID | None = None
        self._bar_width = 12 if self._console.width < 100 else 30
        self._last_line_time = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(self._bar_width),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=self._console,
            disable=not self._draws_bars,
        )

    def update(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """Sets the progress of a stage. Its bar appears with the first call.

        Args:
            total: Number of steps of the stage, or 0 if it is unknown.
            detail: Text next to the bar, truncated to the terminal's width.
        """
        self._end_wait()
        if stage not in self._tasks:
            self._tasks[stage] = int(self._progress.add_task(stage, total=total or None, detail=""))
            if not self._draws_bars:
                self._console.print(f"{stage} ({total})" if total else stage, markup=False, highlight=False)
        if not self._draws_bars and total and time.monotonic() - self._last_line_time > PROGRESS_SECONDS:
            self._last_line_time = time.monotonic()
            self._console.print(f"{stage}: {done:,} of {total:,}", markup=False, highlight=False)
        # rich would squeeze the counts and times on a narrow terminal, so a long detail is truncated.
        times, spaces = 2 * len("0:00:00"), 6
        used = max(map(len, self._tasks)) + self._bar_width + 2 * len(str(total)) + 1 + times + spaces
        detail = detail[: max(0, self._console.width - used)]
        task = self._tasks[stage]
        self._progress.update(task, completed=done, total=total or None, detail=detail)  # type: ignore[arg-type]

    def wait(self, activity: str) -> None:
        """Shows an activity of unknown length on a terminal until the first stage starts."""
        self._wait_task = self._progress.add_task(activity, total=None, detail="")

    def _end_wait(self) -> None:
        if self._wait_task is not None:
            self._progress.remove_task(self._wait_task)
            self._wait_task = None

    def __enter__(self) -> Stages:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_wait()
        self._progress.stop()


LARGE_FILE = 8 << 20  # bytes; a smaller file is read before anyone could see a bar


@contextmanager
def file_progress(stages: Stages) -> Iterator[None]:
    """Within the block, shows a progress bar in MB for each large data file that is read."""
    from vlm_unlearn.data.json_stream import reading_progress

    def on_read(path: Path, done: int, total: int) -> None:
        if total >= LARGE_FILE:
            stages.update(f"read {printable(path.name)} (MB)", done >> 20, total >> 20)

    with reading_progress(on_read):
        yield


class RatesTable:
    """A summary as a table of the terminal: rates in percent with 95 % intervals and changes, training costs, notes.

    The metrics of a single model are rows. Those of several models are columns, divided into several tables where the
    terminal is too narrow for one.

    Args:
        costs: The cost of training each model as text, by model name.
    """

    def __init__(self, summary: Summary, costs: Mapping[str, str] | None = None) -> None:
        self._summary = summary
        self._costs = costs or {}
        self._compared = {(comparison.model, comparison.metric): comparison for comparison in summary.comparisons}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table | Text]:
        from rich.text import Text

        from vlm_unlearn.reporting.columns import columns
        from vlm_unlearn.reporting.formatting import notes

        rows = self._summary.rows
        measured = columns(rows)
        if len(rows) == 1:
            yield _metric_rows(rows[0], measured)
        else:
            headings = {metric: heading for metric, heading, _ in measured}
            headings |= {COST: "training"} if self._costs else {}
            unlimited = options.update(max_width=10_000)
            tables: list[dict[str, str]] = [{}]  # the headings of each table
            for metric, heading in headings.items():
                wider = {**tables[-1], metric: heading}
                if tables[-1] and console.measure(self._table(wider), options=unlimited).maximum > options.max_width:
                    wider = {metric: heading}
                    tables.append(wider)
                tables[-1] = wider
            yield from map(self._table, tables)
        for note in notes(self._summary, [metric for metric, _, _ in measured]):
            yield Text.from_markup(escape_markup(note))

    def _table(self, headings: Mapping[str, str]) -> Table:
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAVY)
        table.add_column("model", overflow="fold")
        for heading in headings.values():
            table.add_column(escape_markup(heading), justify="right")
        for row in self._summary.rows:
            cells = (
                self._costs.get(row.model, "–")
                if metric == COST
                else _cell(row, metric, self._compared.get((row.model, metric)))
                for metric in headings
            )
            table.add_row(escape_markup(row.model), *cells)
        return table


COST = ""  # the column key of the training cost, where other columns have the name of a metric


def escape_markup(text: str) -> str:
    """Escapes untrusted text for rich: no markup and no terminal control characters."""
    from rich.markup import escape

    return escape(printable(text))


def _cell(row: Row, metric: str, comparison: Comparison | None) -> str:
    from vlm_unlearn.reporting.formatting import bounds, change, percent, published

    rate, paper = row.metrics.get(metric), published(row, metric)
    lines = [percent(rate), f"[dim]{bounds(rate).strip('[]')}[/dim]", change(comparison)]
    lines += [
        f"published {percent(paper)}" if paper else "",
        f"{rate.failed} failed" if rate is not None and rate.failed else "",
    ]
    return "\n".join(line for line in lines if line)


def _published(rate: Rate | None) -> str:
    from vlm_unlearn.reporting.formatting import percent

    if rate is None:
        return ""
    return percent(rate) + (f" ({rate.failed:,} failed)" if rate.failed else "")


def _metric_rows(row: Row, measured: Sequence[Column]) -> Table:
    from rich import box
    from rich.table import Table

    from vlm_unlearn.reporting.formatting import bounds, percent

    table = Table(box=box.SIMPLE_HEAVY)
    table.add_column(escape_markup(row.model), overflow="fold")
    for heading in ("rate", "95 % interval", "n", "failed"):
        table.add_column(heading, justify="right")
    if row.paper:
        table.add_column("published", justify="right")
    published_only = [(metric, metric, "") for metric in row.paper if metric not in row.metrics]
    for metric, heading, _ in [*measured, *published_only]:
        rate = row.metrics.get(metric)
        counts = ("", "") if rate is None else (f"{rate.n:,}", f"{rate.failed:,}")
        paper = [_published(row.paper.get(metric))] if row.paper else []
        table.add_row(escape_markup(heading), percent(rate), bounds(rate).strip("[]"), *counts, *paper)
    return table


def print_assessments(console: Console, rows: Sequence[Row]) -> None:
    """Prints the assessment of each model as plain text, the safest models first."""
    from vlm_unlearn.reporting.assessment_text import assessment_text, safest_first

    for row in safest_first(rows):
        console.print(
            printable(assessment_text(row)),
            markup=False,
            highlight=False,
            soft_wrap=not console.is_terminal,
        )


@contextmanager
def problem_report(problems: Problems) -> Iterator[None]:
    """Lists the broken records on standard error when the block ends, also when it fails."""
    try:
        yield
    finally:
        show_problems(problems)


def skipped_note(problems: Problems) -> str:
    """Returns the number of skipped records for the last line of a command, or an empty string if there is none."""
    return f"; {problems.count:,} broken record{'' if problems.count == 1 else 's'} skipped" if problems else ""


def show_problems(problems: Problems, at_most: int = 10) -> None:
    """Lists the first broken records on standard error, and prints their number."""
    if not problems:
        return
    for message in problems.messages[:at_most]:
        sys.stderr.write(f"skipped: {printable(' '.join(message.split()))}\n")
    if problems.count > at_most:
        sys.stderr.write(f"skipped: {problems.count - at_most:,} more\n")
    sys.stderr.write(f"{problems.count:,} broken record{' was' if problems.count == 1 else 's were'} skipped\n")
