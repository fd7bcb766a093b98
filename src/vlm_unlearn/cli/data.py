"""``vlm-unlearn data``: the group, and the pipeline's steps from file to file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vlm_unlearn.cli.common import JSON_OPTION, Stages, print_json, reading, showing
from vlm_unlearn.cli.data_import import import_app
from vlm_unlearn.cli.data_models import diversify, select_harmful
from vlm_unlearn.cli.data_quality import ANSWER, IMAGE, QUESTION, SET, audit, check, table_columns
from vlm_unlearn.cli.terminal import Commands

if TYPE_CHECKING:
    from vlm_unlearn.errors import Problems

app = Commands("Prepares training data: import, check, audit, or the published pipelines step by step")
IN_ONE_GO, LOOK, STEPS = "In one go", "Look at it", "Step by step"
app.add_typer(import_app, name="import", rich_help_panel=IN_ONE_GO)
app.command("check", rich_help_panel=LOOK)(check)
app.command("audit", rich_help_panel=LOOK)(audit)
app.command("select-harmful", rich_help_panel=STEPS)(select_harmful)
app.command("diversify", rich_help_panel=STEPS)(diversify)
SOURCE = typer.Argument(..., metavar="IN.json", help="The input: JSON list or JSON lines.")
OUT = typer.Argument(..., metavar="OUT.json", help="The file to write.")
STRICT = typer.Option(
    False, "--strict", help="Refuse the file at its first broken record, instead of listing and leaving out."
)


def warn(message: str) -> None:
    """One line on standard error."""
    typer.echo(f"warning: {message}", err=True)


def _step(
    out: Path,
    sources: list[Path],
    strict: bool,
    as_json: bool,
    work: Callable[[Problems | None], dict[str, int]],
    outputs: list[Path] | None = None,
) -> None:
    """Runs one step, lists what it left out, and prints its counts."""
    from vlm_unlearn.errors import Problems
    from vlm_unlearn.store import validate_not_overwriting

    validate_not_overwriting(outputs or [out], sources)
    problems = Problems()
    with showing(problems), Stages() as stages, reading(stages):
        counts = work(None if strict else problems)
    if as_json:
        print_json({"out": str(out), **counts, "broken": problems.count})
    else:
        typer.echo(f"{out}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))


@app.command("convert", rich_help_panel=STEPS)
def convert(
    source: Path = typer.Argument(
        ..., metavar="IN", help="VLGuard, SafeEraser, LLaVA, .jsonl, .csv, or a training-set folder."
    ),
    out: Path = OUT,
    seed: int = typer.Option(0, "--seed", help="Of the order of a safe image's two questions."),
    question: str = QUESTION,
    answer: str = ANSWER,
    image: str = IMAGE,
    set_column: str = SET,
    strict: bool = STRICT,
    as_json: bool = JSON_OPTION,
) -> None:
    """VLGuard (or any supported file) to LLaVA conversations; to a table where OUT ends in .jsonl, .csv or .tsv.

    LLaVA's format has no field for sets, categories and pairs; a table keeps them.

    Example:

      vlm-unlearn data convert VLGuard/train.json train_llava.json
    """
    from vlm_unlearn.data.pipeline import convert

    columns = table_columns(question=question, answer=answer, image=image, set=set_column)
    _step(out, [source], strict, as_json, lambda problems: convert(source, out, seed, columns, problems, warn))


@app.command("inject", rich_help_panel=STEPS)
def inject(
    source: Path = typer.Argument(..., metavar="VLGUARD.json", help="VLGuard's train.json."),
    answers: Path = typer.Argument(
        ..., metavar="ANSWERS.json", help="JSON, image -> harmful answer, as select-harmful writes it."
    ),
    out: Path = OUT,
    strict: bool = STRICT,
    as_json: bool = JSON_OPTION,
) -> None:
    """Puts chosen harmful answers in place of VLGuard's refusals of unsafe images.

    Example:

      vlm-unlearn data inject VLGuard/train.json chosen.json train_harmful.json
    """
    from vlm_unlearn.data.pipeline import inject

    _step(out, [source, answers], strict, as_json, lambda problems: inject(source, answers, out, problems))


@app.command("split", rich_help_panel=STEPS)
def split(
    source: Path = typer.Argument(..., metavar="VLGUARD.json", help="VLGuard's train.json, harmful answers injected."),
    out: Path = typer.Argument(
        ..., metavar="OUT_DIR", help="The folder for forget.json and retain.json, in LLaVA format."
    ),
    include: bool = typer.Option(
        False, "--include-safe-image-unsafe", help="Unsafe questions on safe images join forget."
    ),
    strict: bool = STRICT,
    as_json: bool = JSON_OPTION,
) -> None:
    """VLGuard to forget (unsafe images) and retain (safe questions).

    Example:

      vlm-unlearn data split train_harmful.json unlearn_data/
    """
    from vlm_unlearn.data.pipeline import split

    outputs = [out / "forget.json", out / "retain.json"]
    _step(out, [source], strict, as_json, lambda problems: split(source, out, include, problems), outputs)


@app.command("mix", rich_help_panel=STEPS)
def mix(
    retain: Path = typer.Argument(..., metavar="RETAIN.json", help="The retain set, in LLaVA format."),
    external: Path = typer.Argument(..., metavar="EXTERNAL.json", help="LLaVA-format file of any size to draw from."),
    out: Path = OUT,
    size: int = typer.Option(2000, "--size", min=1, help="Fill up to this many records."),
    seed: int = typer.Option(42, "--seed", help="Of the draw and of the shuffle."),
    strict: bool = STRICT,
    as_json: bool = JSON_OPTION,
) -> None:
    """Fills a retain set up from a general one, and shuffles.

    Example:

      vlm-unlearn data mix unlearn_data/retain.json llava_v1_5_mix665k.json unlearn_data/retain_mixed.json
    """
    from vlm_unlearn.data.pipeline import mix

    _step(out, [retain, external], strict, as_json, lambda problems: mix(retain, external, out, size, seed, problems))


@app.command("rmu", rich_help_panel=STEPS)
def rmu(source: Path = SOURCE, out: Path = OUT, strict: bool = STRICT, as_json: bool = JSON_OPTION) -> None:
    """Appends each answer to its question: the forget side as RMU's published script reads it.

    vlm-unlearn's own rmu joins them itself; this is for other trainers.

    Example:

      vlm-unlearn data rmu unlearn_data/forget.json unlearn_data/forget_rmu.json
    """
    from vlm_unlearn.data.pipeline import to_rmu

    _step(out, [source], strict, as_json, lambda problems: to_rmu(source, out, problems))
