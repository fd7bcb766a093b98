"""What the commands share: output, progress, errors."""

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

from vlm_unlearn.errors import printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.progress import TaskID
    from rich.table import Table
    from rich.text import Text

    from vlm_unlearn.errors import Problems
    from vlm_unlearn.records import Comparison, Rate, Row, Summary
    from vlm_unlearn.reporting.columns import Column

JSON_OPTION = typer.Option(False, "--json", help="Print one JSON document on standard output and nothing else there.")


def fail(error: BaseException, exit_code: int) -> NoReturn:
    """Prints the error in one line, ``vlm-unlearn: MESSAGE [CODE]``, and exits."""
    line = printable(" ".join(str(error).split()))
    if os.environ.get("RANK", "0") != "0" and "Connection closed by peer" in line:
        raise SystemExit(exit_code)  # the first process has printed the cause
    code = getattr(error, "code", "")
    sys.stderr.write(f"vlm-unlearn: {line} [{code}]\n" if code else f"vlm-unlearn: {line}\n")
    raise SystemExit(exit_code)


def print_json(value: object) -> None:
    """The one document of ``--json``."""
    sys.stdout.write(json.dumps(value, ensure_ascii=True, indent=2) + "\n")


def status_console() -> Console:
    """A console on standard error, for progress and notes; standard output stays for results."""
    from rich.console import Console

    return Console(stderr=True)


def result_console() -> Console:
    """A console on standard output, for tables; where no terminal is, as wide as COLUMNS says, else so that no table is squeezed."""
    from rich.console import Console

    columns = os.environ.get("COLUMNS", "")
    told = columns.isdecimal() and int(columns) > 0
    console = Console()
    return console if console.is_terminal or told else Console(width=150)


def quiet_libraries() -> None:
    """Keeps transformers' own bars and warnings out of ours."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import warnings

    warnings.filterwarnings(
        "ignore", message=".is_gradient_checkpointing. is deprecated"
    )  # PEFT's call, not the user's
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def keep_deepspeed_off_stdout() -> None:
    """Where DeepSpeed is installed, accelerate imports it, and it logs to standard output, which is for results."""
    import logging

    def divert(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            sys.stderr.write(f"{record.getMessage()}\n")
        return False

    logging.getLogger("DeepSpeed").addFilter(divert)


TELL_SECONDS = 60  # between two lines about progress where no bar can be drawn


class Stages:
    """Progress bars, one a stage, drawn on a terminal; on a pipe a line when a stage begins, and each minute."""

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
        self._shown: dict[str, int] = {}
        self._drawn = self._console.is_terminal and not self._console.is_dumb_terminal
        self._waiting: TaskID | None = None
        self._bar = 12 if self._console.width < 100 else 30
        self._told = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(self._bar),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=self._console,
            disable=not self._drawn,
        )

    def update(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """Moves a stage's bar, which appears with its first move; a total of 0 is one that nobody knows."""
        self._end_wait()
        if stage not in self._shown:
            self._shown[stage] = int(self._progress.add_task(stage, total=total or None, detail=""))
            if not self._drawn:
                self._console.print(f"{stage} ({total})" if total else stage, markup=False, highlight=False)
        if not self._drawn and total and time.monotonic() - self._told > TELL_SECONDS:
            self._told = time.monotonic()
            self._console.print(f"{stage}: {done:,} of {total:,}", markup=False, highlight=False)
        cut = detail[: self._room(total)]
        self._progress.update(self._shown[stage], completed=done, total=total or None, detail=cut)  # type: ignore[arg-type]

    def _room(self, total: int) -> int:
        """Columns left for a detail: on a narrow terminal it is cut, or rich would squeeze the counts and times."""
        times, blanks = 2 * len("0:00:00"), 6
        used = max(map(len, self._shown)) + self._bar + 2 * len(str(total)) + 1 + times + blanks
        return max(0, self._console.width - used)

    def wait(self, what: str) -> None:
        """On a terminal, says what is done until the first stage moves, of which nobody knows how long it takes."""
        self._waiting = self._progress.add_task(what, total=None, detail="")

    def _end_wait(self) -> None:
        if self._waiting is not None:
            self._progress.remove_task(self._waiting)
            self._waiting = None

    def __enter__(self) -> Stages:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_wait()
        self._progress.stop()


LARGE_FILE = 8 << 20  # bytes; smaller ones are read before a bar could be looked at


@contextmanager
def reading(stages: Stages) -> Iterator[None]:
    """Within the block, a bar for each large data file that is read, in MB."""
    from vlm_unlearn.data.json_stream import reading_progress

    def on_read(path: Path, done: int, total: int) -> None:
        if total >= LARGE_FILE:
            stages.update(f"read {printable(path.name)} (MB)", done >> 20, total >> 20)

    with reading_progress(on_read):
        yield


class RatesTable:
    """The summary as rich prints it: rates in percent, 95 % intervals and changes below; what each model took to train; notes under it.

    One model's metrics stand below each other, several models' beside each other, in as many tables as the terminal is too narrow for one.
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
        used = columns(rows)
        if len(rows) == 1:
            yield _metric_lines(rows[0], used)
        else:
            headings = {metric: heading for metric, heading, _ in used} | ({COST: "training"} if self._costs else {})
            unlimited = options.update(max_width=10_000)
            parts: list[dict[str, str]] = [{}]
            for metric, heading in headings.items():
                wider = {**parts[-1], metric: heading}
                if parts[-1] and console.measure(self._table(wider), options=unlimited).maximum > options.max_width:
                    wider = {metric: heading}
                    parts.append(wider)
                parts[-1] = wider
            yield from map(self._table, parts)
        for note in notes(self._summary, [metric for metric, _, _ in used]):
            yield Text.from_markup(plain(note))

    def _table(self, headings: Mapping[str, str]) -> Table:
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAVY)
        table.add_column("model", overflow="fold")
        for heading in headings.values():
            table.add_column(plain(heading), justify="right")
        for row in self._summary.rows:
            cells = (
                self._costs.get(row.model, "–")
                if metric == COST
                else _cell(row, metric, self._compared.get((row.model, metric)))
                for metric in headings
            )
            table.add_row(plain(row.model), *cells)
        return table


COST = ""  # where a metric's name would be


def plain(text: str) -> str:
    """Text of others as rich shows it: no markup, nothing that a terminal would act on."""
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


def _metric_lines(row: Row, used: Sequence[Column]) -> Table:
    from rich import box
    from rich.table import Table

    from vlm_unlearn.reporting.formatting import bounds, percent

    table = Table(box=box.SIMPLE_HEAVY)
    table.add_column(plain(row.model), overflow="fold")
    for heading in ("rate", "95 % interval", "n", "failed"):
        table.add_column(heading, justify="right")
    if row.paper:
        table.add_column("published", justify="right")
    own = [(metric, metric, "") for metric in row.paper if metric not in row.metrics]
    for metric, heading, _ in [*used, *own]:
        rate = row.metrics.get(metric)
        counts = ("", "") if rate is None else (f"{rate.n:,}", f"{rate.failed:,}")
        paper = [_published(row.paper.get(metric))] if row.paper else []
        table.add_row(plain(heading), percent(rate), bounds(rate).strip("[]"), *counts, *paper)
    return table


def print_verdicts(console: Console, rows: Sequence[Row], folders: Mapping[str, Path]) -> None:
    """The report's verdicts as plain text, the safe models first.

    Args:
        folders: each model's evaluation.
    """
    from vlm_unlearn.evaluation.generate import saved_suite
    from vlm_unlearn.reporting.assessment import assess, safest_first
    from vlm_unlearn.reporting.metric_roles import assign_roles

    roles = assign_roles(rows, {model: saved_suite(folder) for model, folder in folders.items()})
    for assessment in safest_first([assess(row, roles) for row in rows]):
        console.print(
            printable(str(assessment)),
            markup=False,
            highlight=False,
            soft_wrap=not console.is_terminal,
        )


@contextmanager
def showing(problems: Problems) -> Iterator[None]:
    """Lists the broken records when the work ends, also when it fails."""
    try:
        yield
    finally:
        show_problems(problems)


def show_problems(problems: Problems, at_most: int = 10) -> None:
    """Lists broken records on standard error: the first few, and how many there are."""
    if not problems:
        return
    for message in problems.messages[:at_most]:
        sys.stderr.write(f"left out: {printable(' '.join(message.split()))}\n")
    if problems.count > at_most:
        sys.stderr.write(f"left out: {problems.count - at_most:,} more\n")
    sys.stderr.write(f"{problems.count:,} broken record{' was' if problems.count == 1 else 's were'} left out\n")
