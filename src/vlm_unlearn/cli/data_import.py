"""``vlm-unlearn data import``: from published files, or your own, to a training-set folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vlm_unlearn.cli.common import JSON_OPTION, Stages, print_json, reading, show_problems
from vlm_unlearn.cli.data_quality import ANSWER, IMAGE, QUESTION, table_columns
from vlm_unlearn.cli.terminal import Commands

if TYPE_CHECKING:
    from vlm_unlearn.data.importers import ImportResult

import_app = Commands("Makes a training-set folder of VLGuard, SafeEraser or your own files.")
IMAGES = typer.Option(..., "--images", help="The folder that the file's image paths are relative to.")
OUT = typer.Option(..., "--out", help="The training-set folder to write.")


@import_app.command("vlguard")
def vlguard(
    file: Path = typer.Argument(..., metavar="TRAIN.json", help="VLGuard's train.json."),
    images: Path = IMAGES,
    out: Path = OUT,
    harmful_answers: Path = typer.Option(
        None, "--harmful-answers", help="JSON, image -> harmful answer to unlearn; without it the refusals stay."
    ),
    include_safe_image_unsafe: bool = typer.Option(
        False, "--include-safe-image-unsafe", help="Unsafe questions on safe images join forget."
    ),
    external: Path = typer.Option(None, "--external", help="LLaVA-format file to fill the retain set from."),
    external_images: Path = typer.Option(None, "--external-images", help="Its image folder; default: the file's own."),
    retain_size: int = typer.Option(2000, "--retain-size", min=1, help="Fill the retain set up to this many pairs."),
    seed: int = typer.Option(42, "--seed", help="Of the draw from the external file and of the shuffle."),
    as_json: bool = JSON_OPTION,
) -> None:
    """VLGuard: forget = unsafe images, retain = safe questions, filled up from general data.

    Without --harmful-answers the forget set holds the reference refusals: data for mixed_sft. npo and rmu want the harmful
    answers, or they would unlearn refusing.

    Example:

      vlm-unlearn data import vlguard VLGuard/train.json --images VLGuard/train --harmful-answers harmful.json --out data/vlguard
    """
    from vlm_unlearn.data.importers import import_vlguard

    _guard(out, file, harmful_answers, external)
    with Stages() as stages, reading(stages):
        imported = import_vlguard(
            file,
            images,
            out,
            harmful_answers,
            include_safe_image_unsafe,
            external,
            external_images,
            retain_size,
            seed,
            lambda done, total: stages.update("images", done, total),
        )
    if harmful_answers is None:
        typer.echo(
            "note: forget holds VLGuard's refusals, for mixed_sft; for npo and rmu pass --harmful-answers", err=True
        )
    _show(imported, out, as_json)


@import_app.command("safe-eraser")
def safe_eraser(
    file: Path = typer.Argument(..., metavar="ALL_TRAIN.json", help="SafeEraser's all_train.json (or JSON lines)."),
    images: Path = IMAGES,
    out: Path = OUT,
    refusals: Path = typer.Option(None, "--refusals", help="SafeEraser's prompt.json, whose idk sentences po teaches."),
    as_json: bool = JSON_OPTION,
) -> None:
    """SafeEraser: forget, retain and decouple sets, paired.

    Example:

      vlm-unlearn data import safe-eraser dataset/all_train.json --images dataset --refusals dataset/prompt.json --out data/safe_eraser
    """
    from vlm_unlearn.data.importers import import_safe_eraser

    _guard(out, file, refusals)
    with Stages() as stages, reading(stages):
        imported = import_safe_eraser(
            file, images, out, refusals, lambda done, total: stages.update("images", done, total)
        )
    _show(imported, out, as_json)


@import_app.command("files")
def files(
    table: str = typer.Argument(
        None, metavar="TABLE", help="One .csv, .jsonl or .parquet, or datasets name, with a set column."
    ),
    images: Path = IMAGES,
    out: Path = OUT,
    forget: str = typer.Option(
        None, "--forget", help="File of harmful pairs to unlearn: LLaVA, .jsonl, .csv, .parquet, or a datasets name."
    ),
    retain: str = typer.Option(None, "--retain", help="File of pairs to keep."),
    decouple: str = typer.Option(
        None, "--decouple", help="File of the unsafe questions on benign images; pair_id ties them."
    ),
    preferred: str = typer.Option(
        None, "--preferred", help="File of the unsafe questions answered rightly, for dpo; pair_id ties them."
    ),
    refusals: Path = typer.Option(None, "--refusals", help='JSON {"idk": [...]}: the sentences that po teaches.'),
    question: str = QUESTION,
    answer: str = ANSWER,
    image: str = IMAGE,
    id: str = typer.Option(None, "--id-column", help="With an id; default: id."),
    category: str = typer.Option(None, "--category-column", help="With a category; default: category."),
    pair: str = typer.Option(
        None, "--pair-column", help="What ties a decouple or preferred row to its forget row; default: pair_id."
    ),
    set_column: str = typer.Option(
        None, "--set-column", help="TABLE's: forget (harmful), retain (harmless), decouple, preferred; default: set."
    ),
    as_json: bool = JSON_OPTION,
) -> None:
    """Your own data: a table with a set column, or a file for each set.

    Example:

      vlm-unlearn data import files pairs.csv --images images --out data/mine

      vlm-unlearn data import files --forget harmful.json --retain retain_mixed.json --images images --out data/mine
    """
    from vlm_unlearn.data.importers import import_files
    from vlm_unlearn.errors import UserError

    named = {"forget": forget, "retain": retain, "decouple": decouple, "preferred": preferred}
    given = {role: file for role, file in named.items() if file}
    if table and given:
        raise UserError("give one TABLE with a set column, or --forget and --retain, not both")
    if not table and not (forget and retain):
        raise UserError("give one TABLE with a set column, or both --forget and --retain")
    _guard(out, table, forget, retain, decouple, preferred, refusals)
    named_set = (set_column or "set") if table else None
    columns = table_columns(
        question=question, answer=answer, image=image, id=id, category=category, pair=pair, set=named_set
    )
    with Stages() as stages, reading(stages):
        imported = import_files(
            {"": table} if table else given,
            images,
            out,
            columns,
            refusals,
            lambda done, total: stages.update("images", done, total),
        )
    _show(imported, out, as_json)


def _guard(out: Path, *inputs: str | Path | None) -> None:
    from vlm_unlearn.data.training_set import FILES
    from vlm_unlearn.store import validate_not_overwriting

    validate_not_overwriting([out / name for name in FILES], inputs)


def _show(imported: ImportResult, out: Path, as_json: bool) -> None:
    show_problems(imported.problems)
    if imported.text_only == sum(imported.counts.values()):
        typer.echo("warning: no example has an image; if the table names images, pass --image-column", err=True)
    if as_json:
        document = {
            "out": str(out),
            "counts": imported.counts,
            "left_out": imported.left_out,
            "text_only": imported.text_only,
        }
        print_json({**document, "broken": imported.problems.count})
        return
    text_only = [f"{imported.text_only:,} of them text only"] * bool(imported.text_only)
    left_out = [f"left out ({why}) {count:,}" for why, count in imported.left_out.items()]
    typer.echo(
        f"{out}: "
        + ", ".join([*(f"{role} {count:,}" for role, count in imported.counts.items()), *text_only, *left_out])
    )
