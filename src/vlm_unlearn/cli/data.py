"""``vlm-unlearn data``: prepares training data, in one command or in the published steps from file to file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

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
from vlm_unlearn.cli.data_filter import filter_command
from vlm_unlearn.cli.data_import import SAFE_IMAGE_ANSWERS, import_app
from vlm_unlearn.cli.data_models import diversify, select_harmful
from vlm_unlearn.cli.data_quality import ANSWER, IMAGE, QUESTION, SET, audit, check, table_columns
from vlm_unlearn.cli.terminal import Commands

if TYPE_CHECKING:
    from vlm_unlearn.errors import Problems

app = Commands("Prepares training data: imports, checks and audits it, or runs the published pipelines step by step")
IMPORT, INSPECT, STEPS = "Import", "Inspect", "Step by step"
app.add_typer(import_app, name="import", rich_help_panel=IMPORT)
app.command("check", rich_help_panel=INSPECT)(check)
app.command("audit", rich_help_panel=INSPECT)(audit)
app.command("select-harmful", rich_help_panel=STEPS)(select_harmful)
app.command("diversify", rich_help_panel=STEPS)(diversify)
app.command("filter", rich_help_panel=STEPS)(filter_command)
SOURCE = typer.Argument(..., metavar="IN.json", help="The input: a JSON list or JSON lines.")
OUT = typer.Argument(..., metavar="OUT.json", help="The file to write.")
STRICT = typer.Option(False, "--strict", help="Stop at the first broken record instead of skipping and listing it.")


def warn(message: str) -> None:
    """Prints a warning in one line on standard error."""
    typer.echo(f"warning: {message}", err=True)


def _step(
    out: Path,
    sources: list[Path],
    strict: bool,
    as_json: bool,
    overwrite: bool,
    work: Callable[[Problems | None], dict[str, int]],
    outputs: list[Path] | None = None,
) -> None:
    """Runs one step, lists the records that it skipped, and prints its counts.

    Args:
        sources: The input files.
        overwrite: Whether the outputs may replace files that no command has written.
        work: The step. It collects broken records in its argument, or raises at the first one if that is None.
        outputs: The files that the step writes, if they are not `out` itself.
    """
    from vlm_unlearn.errors import Problems
    from vlm_unlearn.store import record_outputs, validate_outputs

    validate_outputs(outputs or [out], sources, overwrite)
    problems = Problems()
    with problem_report(problems), Stages() as stages, file_progress(stages):
        counts = work(None if strict else problems)
    record_outputs(outputs or [out])
    if as_json:
        print_json({"out": str(out), **counts, "broken": problems.count})
    else:
        typer.echo(
            f"{out}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()) + skipped_note(problems)
        )


@app.command("convert", rich_help_panel=STEPS)
def convert(
    source: Path = typer.Argument(
        ..., metavar="IN", help="A file of VLGuard, SafeEraser or LLaVA, .jsonl, .csv, or a training-set folder."
    ),
    out: Path = OUT,
    seed: int = typer.Option(0, "--seed", help="Seed of the order of the two questions of a safe image."),
    question: str = QUESTION,
    answer: str = ANSWER,
    image: str = IMAGE,
    set_column: str = SET,
    paper_compat: bool = typer.Option(
        False,
        "--paper-compat",
        help="As published: keep the other fields of VLGuard's records, such as safe and harmful_category.",
    ),
    strict: bool = STRICT,
    overwrite: bool = OVERWRITE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Converts VLGuard (or any supported file) to LLaVA conversations, or to a table.

    OUT is a table if its name ends in .jsonl, .csv or .tsv. A table keeps sets, categories and pairs, which LLaVA's
    format has no field for.

    Example:

      vlm-unlearn data convert VLGuard/train.json train_llava.json
    """
    from vlm_unlearn.data_tools.pipeline import convert

    columns = table_columns(question=question, answer=answer, image=image, set=set_column)
    _step(
        out,
        [source],
        strict,
        as_json,
        overwrite,
        lambda problems: convert(source, out, seed, columns, problems, warn, paper_compat),
    )


@app.command("inject", rich_help_panel=STEPS)
def inject(
    source: Path = typer.Argument(..., metavar="VLGUARD.json", help="VLGuard's train.json."),
    answers: Path = typer.Argument(
        ..., metavar="ANSWERS.json", help="JSON, image -> harmful answer, as written by select-harmful."
    ),
    out: Path = OUT,
    safe_image_answers: Path = SAFE_IMAGE_ANSWERS,
    paper_compat: bool = typer.Option(
        False,
        "--paper-compat",
        help="As published: keep a question without an answer, with its refusal, and look up answers by image only.",
    ),
    strict: bool = STRICT,
    overwrite: bool = OVERWRITE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Replaces VLGuard's refusals by selected harmful answers. A question without an answer is left out.

    Example:

      vlm-unlearn data inject VLGuard/train.json chosen.json train_harmful.json
    """
    from vlm_unlearn.data_tools.pipeline import inject

    sources = [source, answers, *([safe_image_answers] if safe_image_answers else [])]
    _step(
        out,
        sources,
        strict,
        as_json,
        overwrite,
        lambda problems: inject(source, answers, out, problems, safe_image_answers, paper_compat, warn),
    )


@app.command("split", rich_help_panel=STEPS)
def split(
    source: Path = typer.Argument(
        ..., metavar="VLGUARD.json", help="VLGuard's train.json with injected harmful answers."
    ),
    out: Path = typer.Argument(
        ..., metavar="OUT_DIR", help="The folder for forget.json and retain.json, in LLaVA format."
    ),
    include: bool = typer.Option(
        False, "--include-safe-image-unsafe", help="Add unsafe questions on safe images to the forget set."
    ),
    strict: bool = STRICT,
    overwrite: bool = OVERWRITE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Splits VLGuard into a forget set (unsafe images) and a retain set (safe questions).

    Example:

      vlm-unlearn data split train_harmful.json unlearn_data/
    """
    from vlm_unlearn.data_tools.pipeline import split

    outputs = [out / "forget.json", out / "retain.json"]
    _step(out, [source], strict, as_json, overwrite, lambda problems: split(source, out, include, problems), outputs)


@app.command("mix", rich_help_panel=STEPS)
def mix(
    retain: Path = typer.Argument(..., metavar="RETAIN.json", help="The retain set, in LLaVA format."),
    external: Path = typer.Argument(
        ..., metavar="EXTERNAL.json", help="A file in LLaVA format, of any size, to sample from."
    ),
    out: Path = OUT,
    size: int = typer.Option(2000, "--size", min=1, help="Number of records after filling up."),
    seed: int = typer.Option(42, "--seed", help="Seed of the sample and of the shuffle."),
    strict: bool = STRICT,
    overwrite: bool = OVERWRITE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Fills up a retain set with samples from a general one, and shuffles it.

    Example:

      vlm-unlearn data mix unlearn_data/retain.json llava_v1_5_mix665k.json unlearn_data/retain_mixed.json
    """
    from vlm_unlearn.data_tools.pipeline import mix

    _step(
        out,
        [retain, external],
        strict,
        as_json,
        overwrite,
        lambda problems: mix(retain, external, out, size, seed, problems),
    )


@app.command("to-rmu", rich_help_panel=STEPS)
def to_rmu(
    source: Path = SOURCE,
    out: Path = OUT,
    strict: bool = STRICT,
    overwrite: bool = OVERWRITE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Appends each answer to its question, the form of the forget set that RMU's published script reads.

    This is for other trainers. The method rmu of vlm-unlearn does so itself.

    Example:

      vlm-unlearn data to-rmu unlearn_data/forget.json unlearn_data/forget_rmu.json
    """
    from vlm_unlearn.data_tools.pipeline import to_rmu

    _step(out, [source], strict, as_json, overwrite, lambda problems: to_rmu(source, out, problems))
