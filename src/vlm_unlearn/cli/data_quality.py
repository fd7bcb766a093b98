"""``vlm-unlearn data audit`` and ``check``: is this set any good?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vlm_unlearn.cli.common import JSON_OPTION, Stages, print_json, reading, showing
from vlm_unlearn.errors import printable

if TYPE_CHECKING:
    from vlm_unlearn.data.audit import Audit, LabelBy
    from vlm_unlearn.data.check import TokenCount
    from vlm_unlearn.data.formats.table import Columns
    from vlm_unlearn.records import Example

FILE = typer.Argument(
    ..., metavar="FILE", help="VLGuard, SafeEraser, LLaVA, .jsonl, .csv, .parquet, or a training-set folder."
)
QUESTION = typer.Option(None, "--question-column", help="A table's column with the question; default: question.")
ANSWER = typer.Option(None, "--answer-column", help="With the answer; default: answer.")
IMAGE = typer.Option(
    None, "--image-column", help="With the image's path; default: image. A row without one is text alone."
)
SET = typer.Option(
    None, "--set-column", help="With forget (harmful), retain (harmless) or decouple; default: set, where there is one."
)


def table_columns(**named: str | None) -> Columns:
    """A table's columns: those that were named, which must be there, and the usual names of the others."""
    from vlm_unlearn.data.formats.table import Columns

    given = {field: column for field, column in named.items() if column is not None}
    return Columns(**given, required=frozenset(given))


def label_by(name: str) -> LabelBy:
    """What ``--label`` chose."""
    from vlm_unlearn.errors import UserError

    match name:
        case "auto" | "set" | "answer":
            return name
        case _:
            raise UserError(f'--label "{name}": use auto, set or answer')


def audit(
    file: str = FILE,
    label: str = typer.Option(
        "auto",
        "--label",
        help="What tells refusal: set (what the file says), answer (the answer's words), or auto: set where there is one.",
    ),
    html: Path = typer.Option(None, "--html", help="Also write a page with bars."),
    question: str = QUESTION,
    answer: str = ANSWER,
    image: str = IMAGE,
    set_column: str = SET,
    as_json: bool = JSON_OPTION,
) -> None:
    """Does this set teach refusal by surface words? Names the words to attack and to test over-refusal with.

    Example:

      vlm-unlearn data audit VLGuard/train.json --html audit.html
    """
    from vlm_unlearn.data.audit import audit, labeled_questions
    from vlm_unlearn.data.readers import read_any
    from vlm_unlearn.errors import Problems
    from vlm_unlearn.judging.keyword import corrected_refusal
    from vlm_unlearn.store import validate_not_overwriting

    validate_not_overwriting([html] if html else [], [file])
    problems = Problems()
    entries = read_any(
        file, None, table_columns(question=question, answer=answer, image=image, set=set_column), problems
    )
    with showing(problems), Stages() as stages, reading(stages):
        found = audit(labeled_questions(entries, label_by(label), lambda text: corrected_refusal(text) is not None))
    if html:
        from vlm_unlearn.reporting.audit_page import write_audit_page

        write_audit_page(html, found, Path(file).name)
        typer.echo(f"page: {html}", err=True)
    if as_json:
        print_json({"file": Path(file).name, **found.as_json(), "broken": problems.count})
    else:
        _print_audit(found)


def check(
    file: str = FILE,
    images: Path = typer.Option(
        None, "--images", help="The folder that image paths are relative to; default: the file's own."
    ),
    against: list[str] = typer.Option(
        [], "--against", metavar="FILE", help="Another file, such as the test set: what of it leaks?"
    ),
    against_images: Path = typer.Option(None, "--against-images", help="Its image folder; default: --images."),
    no_images: bool = typer.Option(False, "--no-images", help="Don't look at the image files."),
    processor: str = typer.Option(
        None, "--processor", help="A model folder or hub name: count tokens with its processor."
    ),
    max_length: int = typer.Option(
        2048, "--max-length", min=1, help="The recipe's training.max_length, for --processor."
    ),
    out: Path = typer.Option(None, "--out", help="Also write the findings as JSON."),
    question: str = QUESTION,
    answer: str = ANSWER,
    image: str = IMAGE,
    set_column: str = SET,
    as_json: bool = JSON_OPTION,
) -> None:
    """Broken images and records, duplicates, leakage between sets, lengths. Exit code 1 where something can't be trained on.

    Example:

      vlm-unlearn data check data/vlguard --against VLGuard/test.json --against-images VLGuard/test --processor llava-hf/llava-1.5-7b-hf
    """
    from vlm_unlearn.data.check import Checker, DataSource
    from vlm_unlearn.judging.keyword import corrected_refusal
    from vlm_unlearn.store import validate_not_overwriting, write_json

    def is_refusal(text: str) -> bool:
        return corrected_refusal(text) is not None

    validate_not_overwriting([out] if out else [], [file, *against])
    with Stages() as stages, reading(stages):
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
    if as_json:
        print_json(report)
    else:
        _print_check(report)
    if report["errors"]:
        raise typer.Exit(1)


def _token_count(model: str) -> TokenCount:
    from vlm_unlearn.cli.common import quiet_libraries

    quiet_libraries()
    from vlm_unlearn.data.encoding import PromptMeter, Turn
    from vlm_unlearn.models.loader import load_processor, model_folder

    meter = PromptMeter(load_processor(model_folder(model)))

    def count(example: Example, path: Path | None) -> tuple[int, int]:
        history = tuple((turn.question, turn.answer) for turn in example.history)
        turn = Turn(example.id, path, example.question, example.answer, history)
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
        console.print(
            f"images: {images['distinct_paths']:,} paths, {images['usable']:,} usable, {images['distinct_contents']:,} different"
        )
    found = [
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
        found.insert(5, (f"{hidden:,} more; --out FILE lists the first {len(report['broken']['first'])}", "broken"))
    for message, kind in found:
        console.print(f"  {kind}: {escape(printable(message))}", soft_wrap=True)
    for line in report["errors"]:
        console.print(f"[bold red]error[/]: {escape(line)}")
    for line in report["warnings"]:
        console.print(f"[yellow]warning[/]: {escape(line)}")
    if not report["errors"] and not report["warnings"]:
        console.print("nothing found")


def _print_audit(found: Audit) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"\n{escape(found.verdict)}\n", style="bold" if found.level in ("strong", "some") else "")
    if found.level == "unknown":
        return
    table = Table(
        box=box.SIMPLE_HEAVY, title=f"{found.n:,} questions, {found.refused:,} refused (told by the {found.label})"
    )
    for heading in ("alone", "accuracy", "interval", "bits", "by chance"):
        table.add_column(heading, justify="left" if heading == "alone" else "right")
    for name, predictor in found.predictors.items():
        table.add_row(
            name.replace("_", " "),
            f"{100 * predictor.leave_one_out_accuracy:.1f} %",
            f"{100 * predictor.low:.1f}, {100 * predictor.high:.1f}",
            f"{predictor.mutual_information:.3f}",
            f"{predictor.chance_information:.3f}",
        )
    console.print(table)
    for way, heading in (("answer", "goes with an answer"), ("refuse", "goes with refusal")):
        words = Table(box=box.SIMPLE_HEAVY)
        words.add_column(heading, overflow="fold", max_width=30)
        for name in ("questions", "refused", "interval", "PMI"):
            words.add_column(name, justify="right")
        for word in found.words[way][:8]:
            words.add_row(
                f"{'[bold]' if word.word in found.triggers[way] else ''}{escape(printable(word.word))}{'' if word.significant else ' ·'}",
                f"{word.count:,}",
                f"{100 * word.share:.1f} %",
                f"{100 * word.low:.1f}, {100 * word.high:.1f}",
                f"{word.pmi:.2f}",
            )
        console.print(words)
    console.print(
        "bits: mutual information with refusal, and what shuffled labels give by chance; PMI: pointwise, in bits; · not beyond chance",
        style="dim",
    )
