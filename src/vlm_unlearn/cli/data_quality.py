"""``vlm-unlearn data audit``, ``check`` and ``diversify``: is this set any good, and what can be done."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from vlm_unlearn.cli.common import JSON_OPTION, print_json, show_problems

if TYPE_CHECKING:
    from vlm_unlearn.data.audit import Audit
    from vlm_unlearn.data.formats.table import Columns

FILE = typer.Argument(..., metavar="FILE", help="VLGuard, SafeEraser, LLaVA, .jsonl, .csv, .parquet, or a training-set folder.")
QUESTION = typer.Option("question", "--question-column", help="A table's column.")
ANSWER = typer.Option("answer", "--answer-column", help="A table's column.")
IMAGE = typer.Option("image", "--image-column", help="A table's column.")
SET = typer.Option(None, "--set-column", help="A table's column with forget (harmful), retain (harmless) or decouple.")


def _columns(question: str, answer: str, image: str, set_column: str | None) -> Columns:
    from vlm_unlearn.data.formats.table import Columns

    return Columns(question=question, answer=answer, image=image, set=set_column)


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
    from vlm_unlearn.data.audit import audit, labelled
    from vlm_unlearn.data.reading import read_any
    from vlm_unlearn.errors import Problems, RequestError
    from vlm_unlearn.judging.keyword import corrected_refusal

    by: Literal["auto", "set", "answer"]
    match label:
        case "auto" | "set" | "answer":
            by = label
        case _:
            raise RequestError(f'--label "{label}": use auto, set or answer')
    problems = Problems()
    entries = read_any(file, None, _columns(question, answer, image, set_column), problems)
    found = audit(labelled(entries, by, lambda text: corrected_refusal(text) is not None))
    show_problems(problems)
    if html:
        from vlm_unlearn.reporting.audit_page import write_audit_page

        write_audit_page(html, found, Path(file).name)
    if as_json:
        print_json({"file": Path(file).name, **found.as_json(), "broken": problems.count})
    else:
        _print_audit(found)


def _print_audit(found: Audit) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"\n{escape(found.verdict)}\n", style="bold" if found.level in ("strong", "some") else "")
    table = Table(box=box.SIMPLE_HEAVY, title=f"{found.n:,} questions, {found.refused:,} refused (told by the {found.label})")
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
                f"{'[bold]' if word.word in found.triggers[way] else ''}{escape(printable(word.word))}",
                f"{word.count:,}",
                f"{100 * word.share:.1f} %",
                f"{100 * word.low:.1f}, {100 * word.high:.1f}",
                f"{word.pmi:.2f}",
            )
        console.print(words)


def printable(text: str) -> str:
    """Text of a data file without anything that a terminal would act on."""
    return "".join(char if char.isprintable() else "�" for char in text)
