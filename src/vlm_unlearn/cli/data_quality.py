"""``vlm-unlearn data audit`` and ``check``: measure the quality of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vlm_unlearn.cli.common import (
    JSON_OPTION,
    OVERWRITE_OPTION,
    Stages,
    file_progress,
    print_json,
    problem_report,
    skipped_note,
)
from vlm_unlearn.cli.image_folders import reads_images
from vlm_unlearn.errors import printable

if TYPE_CHECKING:
    from vlm_unlearn.data.formats.table import Columns
    from vlm_unlearn.data_tools.audit import Audit, LabelBy
    from vlm_unlearn.data_tools.check import TokenCount
    from vlm_unlearn.records import Example

FILE = typer.Argument(
    ...,
    metavar="FILE",
    help="A file of VLGuard, SafeEraser or LLaVA, .jsonl, .csv, .parquet, or a training-set folder.",
)
QUESTION = typer.Option(None, "--question-column", help="Column of a table with the question. Default: question.")
ANSWER = typer.Option(None, "--answer-column", help="Column with the answer. Default: answer.")
IMAGE = typer.Option(
    None, "--image-column", help="Column with the image path. Default: image. A row without a path is text only."
)
SET = typer.Option(
    None,
    "--set-column",
    help="Column with forget (harmful), retain (harmless) or decouple. Default: set, if the table has it.",
)


def table_columns(**options: str | None) -> Columns:
    """Returns the column names of a table. Columns that an option names must exist. The others have their defaults."""
    from vlm_unlearn.data.formats.table import Columns

    names = {field: column for field, column in options.items() if column is not None}
    return Columns(**names, required=frozenset(names))


def label_by(name: str) -> LabelBy:
    """Returns the value of ``--label``.

    Raises:
        UserError: It is none of auto, set and answer.
    """
    from vlm_unlearn.errors import UserError, quoted

    match name:
        case "auto" | "set" | "answer":
            return name
        case _:
            raise UserError(f"{quoted(name)} is not one of auto, set and answer", code="unknown-name", field="--label")


def audit(
    file: str = FILE,
    label: str = typer.Option(
        "auto",
        "--label",
        help="How to detect refusals: set (the file's sets), answer (the answer's words), or auto: set if it exists.",
    ),
    html: Path = typer.Option(None, "--html", help="Also write an HTML page with bar charts."),
    question: str = QUESTION,
    answer: str = ANSWER,
    image: str = IMAGE,
    set_column: str = SET,
    overwrite: bool = OVERWRITE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Measures whether surface words predict refusal in a data set.

    It lists the words to attack a model with, and those to test over-refusal with.

    Example:

      vlm-unlearn data audit VLGuard/train.json --html audit.html
    """
    from vlm_unlearn.data.readers import read_any
    from vlm_unlearn.data_tools.audit import audit, labeled_questions
    from vlm_unlearn.errors import Problems
    from vlm_unlearn.judging.keyword import corrected_refusal
    from vlm_unlearn.store import record_outputs, validate_outputs

    validate_outputs([html] if html else [], [file], overwrite)
    problems = Problems()
    entries = read_any(
        file, None, table_columns(question=question, answer=answer, image=image, set=set_column), problems
    )
    with problem_report(problems), Stages() as stages, file_progress(stages):
        result = audit(labeled_questions(entries, label_by(label), lambda text: corrected_refusal(text) is not None))
    if html:
        from vlm_unlearn.reporting.audit_page import write_audit_page

        write_audit_page(html, result, Path(file).name)
        record_outputs([html])
        typer.echo(f"page: {html}", err=True)
    if as_json:
        print_json({"file": Path(file).name, **result.as_json(), "broken": problems.count})
    else:
        _print_audit(result)
        if problems:
            typer.echo(skipped_note(problems).removeprefix("; "))


@reads_images
def check(
    file: str = FILE,
    images: Path = typer.Option(
        None, "--images", help="The folder that image paths are relative to. Default: the folder of the file."
    ),
    against: list[str] = typer.Option(
        [], "--against", metavar="FILE", help="Another file, such as the test set, to find leakage. May be repeated."
    ),
    against_images: Path = typer.Option(
        None, "--against-images", help="The image folder of that file. Default: --images."
    ),
    no_images: bool = typer.Option(False, "--no-images", help="Do not open the image files."),
    processor: str = typer.Option(
        None, "--processor", help="A model folder or hub name whose processor counts the tokens."
    ),
    max_length: int = typer.Option(
        2048,
        "--max-length",
        min=1,
        help="The recipe's training.max_length, to compare with the token counts of --processor.",
    ),
    out: Path = typer.Option(None, "--out", help="Also write the report as JSON."),
    question: str = QUESTION,
    answer: str = ANSWER,
    image: str = IMAGE,
    set_column: str = SET,
    overwrite: bool = OVERWRITE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Checks a data set for broken images and records, duplicates, leakage between sets, and lengths.

    The exit code is 1 if some of the data cannot be trained on.

    Example:

      vlm-unlearn data check data/vlguard --against VLGuard/test.json --against-images VLGuard/test
      --processor llava-hf/llava-1.5-7b-hf
    """
    from vlm_unlearn.data_tools.check import Checker, DataSource
    from vlm_unlearn.judging.keyword import corrected_refusal
    from vlm_unlearn.store import record_outputs, validate_outputs, write_json

    def is_refusal(text: str) -> bool:
        return corrected_refusal(text) is not None

    validate_outputs([out] if out else [], [file, *against], overwrite)
    with Stages() as stages, file_progress(stages):
        checker = Checker(
            not no_images,
            table_columns(question=question, answer=answer, image=image, set=set_column),
            stages.update,
            is_refusal,
        )
        checker.add(DataSource(file, images), _token_count(processor) if processor else None, max_length)
        for other in against:
            checker.add(DataSource(other, against_images or images, against=True))
        report = checker.report()
    if out:
        write_json(out, report)
        record_outputs([out])
    if as_json:
        print_json(report)
    else:
        _print_check(report)
    if report["errors"]:
        raise typer.Exit(1)


def _token_count(model: str) -> TokenCount:
    """Returns a function that counts the tokens of an example: of its question, and of all its text and image."""
    from vlm_unlearn.cli.common import quiet_libraries

    quiet_libraries()
    from vlm_unlearn.data.encoding import PromptMeter, Turn
    from vlm_unlearn.modeling.loader import load_processor, model_folder

    meter = PromptMeter(load_processor(model_folder(model)))

    def count(example: Example, path: Path | None) -> tuple[int, int]:
        turn = Turn.of_example(example, path)
        return meter.prompt_tokens(turn), meter.total_tokens(turn)

    return count


def _print_check(report: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAVY)
    for heading in (
        "set",
        "records",
        "questions",
        "distinct",
        "text only",
        *(("tokens: median", "longest") if report["lengths"] else ()),
    ):
        table.add_column(heading, justify="left" if heading == "set" else "right")
    for name, counts in report["sets"].items():
        lengths = report["lengths"].get(name)
        tokens = [f"{lengths['median']:,}", f"{lengths['max']:,}"] if lengths else []
        numbers = (counts[key] for key in ("records", "questions", "distinct_questions", "text_only"))
        table.add_row(escape(printable(name)), *(f"{number:,}" for number in numbers), *tokens)
    console.print(table)
    images = report["images"]
    if images["usable"] is not None:
        counts = f"{images['usable']:,} usable, {images['distinct_contents']:,} different"
        console.print(f"images: {images['distinct_paths']:,} paths, {counts}")
    findings = [
        *((message, "broken") for message in report["broken"]["first"][:5]),
        *((message, "over the limit") for message in report["too_long"]["question"]["first"][:5]),
        *(
            (f"{leak['what']}: {message}", "leak")
            for leak in report["leakage"]
            if not leak["by_design"]
            for message in leak["first"][:2]
        ),
    ]
    hidden = report["broken"]["count"] - len(report["broken"]["first"][:5])
    if hidden > 0:
        more = f"{hidden:,} more; --out FILE lists the first {len(report['broken']['first'])}"
        findings.insert(5, (more, "broken"))
    for message, kind in findings:
        console.print(f"  {kind}: {escape(printable(message))}", soft_wrap=True)
    for line in report["errors"]:
        console.print(f"[bold red]error[/]: {escape(line)}")
    for line in report["warnings"]:
        console.print(f"[yellow]warning[/]: {escape(line)}")
    if not report["errors"] and not report["warnings"]:
        console.print("no problems")


def _print_audit(result: Audit) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"\n{escape(result.verdict)}\n", style="bold" if result.level in ("strong", "some") else "")
    if result.level == "unknown":
        return
    table = Table(
        box=box.SIMPLE_HEAVY,
        title=f"{result.n:,} questions, {result.refused:,} refused (detected by the {result.label})",
    )
    for heading in ("alone", "accuracy", "interval", "bits", "by chance"):
        table.add_column(heading, justify="left" if heading == "alone" else "right")
    for name, predictor in result.predictors.items():
        table.add_row(
            name.replace("_", " "),
            f"{100 * predictor.leave_one_out_accuracy:.1f} %",
            f"{100 * predictor.low:.1f}, {100 * predictor.high:.1f}",
            f"{predictor.mutual_information:.3f}",
            f"{predictor.chance_information:.3f}",
        )
    console.print(table)
    for outcome, heading in (("answer", "associated with answers"), ("refuse", "associated with refusals")):
        words = Table(box=box.SIMPLE_HEAVY)
        words.add_column(heading, overflow="fold", max_width=30)
        for name in ("questions", "refused", "interval", "PMI"):
            words.add_column(name, justify="right")
        for word in result.words[outcome][:8]:
            style = "[bold]" if word.word in result.triggers[outcome] else ""
            words.add_row(
                f"{style}{escape(printable(word.word))}{'' if word.significant else ' ·'}",
                f"{word.count:,}",
                f"{100 * word.share:.1f} %",
                f"{100 * word.low:.1f}, {100 * word.high:.1f}",
                f"{word.pmi:.2f}",
            )
        console.print(words)
    console.print(
        "bits: mutual information with refusal, and that of shuffled labels by chance; "
        "PMI: pointwise mutual information in bits; · within chance",
        style="dim",
    )
