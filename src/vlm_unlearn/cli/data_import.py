"""``vlm-unlearn data import``: writes a training-set folder from published files or from your own."""

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
    show_problems,
    skipped_note,
)
from vlm_unlearn.cli.data_quality import ANSWER, IMAGE, QUESTION, table_columns
from vlm_unlearn.cli.image_folders import reads_images
from vlm_unlearn.cli.terminal import Commands

if TYPE_CHECKING:
    from vlm_unlearn.data_tools.importers import ImportResult

import_app = Commands("Writes a training-set folder from VLGuard, SafeEraser or your own files.")
IMAGES = typer.Option(..., "--images", help="The folder that the file's image paths are relative to.")
OUT = typer.Option(..., "--out", help="The training-set folder to write.")
SAFE_IMAGE_ANSWERS = typer.Option(
    None,
    "--safe-image-answers",
    help="JSON, image -> harmful answer to the unsafe question on a safe image, as written by select-harmful.",
)
ACCEPT_REFUSALS = typer.Option(
    False, "--accept-refusals", help="Accept a forget set that contains many refusals, as for mixed_sft."
)


def refusal_check(accept_refusals: bool) -> Callable[[str], bool] | None:
    """Returns the function with which an import recognizes refusals, or None if it accepts all answers."""
    from vlm_unlearn.judging.keyword import corrected_refusal

    return None if accept_refusals else lambda text: corrected_refusal(text) is not None


@import_app.command("vlguard")
@reads_images
def vlguard(
    file: Path = typer.Argument(..., metavar="TRAIN.json", help="VLGuard's train.json."),
    images: Path = IMAGES,
    out: Path = OUT,
    harmful_answers: Path = typer.Option(
        None, "--harmful-answers", help="JSON, image -> harmful answer to unlearn. Without it the refusals stay."
    ),
    include_safe_image_unsafe: bool = typer.Option(
        False, "--include-safe-image-unsafe", help="Add unsafe questions on safe images to the forget set."
    ),
    safe_image_answers: Path = SAFE_IMAGE_ANSWERS,
    external: Path = typer.Option(None, "--external", help="A file in LLaVA format to fill up the retain set from."),
    external_images: Path = typer.Option(
        None, "--external-images", help="The image folder of that file. Default: the folder of the file."
    ),
    retain_size: int = typer.Option(
        2000, "--retain-size", min=1, help="Number of pairs in the retain set after filling up."
    ),
    seed: int = typer.Option(42, "--seed", help="Seed of the sample from the external file and of the shuffle."),
    accept_refusals: bool = ACCEPT_REFUSALS,
    overwrite: bool = OVERWRITE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Imports VLGuard: forget = unsafe images, retain = safe questions, filled up from general data.

    npo and rmu need --harmful-answers. Without it the forget set contains the reference refusals, which are data for
    mixed_sft and need --accept-refusals. --safe-image-answers adds unsafe questions on safe images to the forget set.

    Example:

      vlm-unlearn data import vlguard VLGuard/train.json --images VLGuard/train
      --harmful-answers harmful.json --out data/vlguard
    """
    from vlm_unlearn.data.training_set import validate_training_set_outputs
    from vlm_unlearn.data_tools.importers import import_vlguard

    validate_training_set_outputs(out, [file, harmful_answers, safe_image_answers, external], overwrite)
    with Stages() as stages, file_progress(stages):
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
            safe_image_answers,
            refusal_check(accept_refusals),
        )
    _print_counts(imported, out, as_json)


@import_app.command("safe-eraser")
@reads_images
def safe_eraser(
    file: Path = typer.Argument(..., metavar="ALL_TRAIN.json", help="SafeEraser's all_train.json (or JSON lines)."),
    images: Path = IMAGES,
    out: Path = OUT,
    refusals: Path = typer.Option(
        None, "--refusals", help="SafeEraser's prompt.json. Its idk sentences are the targets of po."
    ),
    accept_refusals: bool = ACCEPT_REFUSALS,
    overwrite: bool = OVERWRITE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Imports SafeEraser: forget, retain and decouple sets with their pairs.

    Example:

      vlm-unlearn data import safe-eraser dataset/all_train.json --images dataset --refusals dataset/prompt.json
      --out data/safe_eraser
    """
    from vlm_unlearn.data.training_set import validate_training_set_outputs
    from vlm_unlearn.data_tools.importers import import_safe_eraser

    validate_training_set_outputs(out, [file, refusals], overwrite)
    with Stages() as stages, file_progress(stages):
        imported = import_safe_eraser(
            file,
            images,
            out,
            refusals,
            lambda done, total: stages.update("images", done, total),
            refusal_check(accept_refusals),
        )
    _print_counts(imported, out, as_json)


@import_app.command("files")
@reads_images
def files(
    table: str = typer.Argument(
        None,
        metavar="TABLE",
        help="A .csv, .jsonl or .parquet file, or the name of a dataset on the hub, with a set column.",
    ),
    images: Path = IMAGES,
    out: Path = OUT,
    forget: str = typer.Option(
        None,
        "--forget",
        help="Harmful pairs to unlearn: a file in LLaVA format, .jsonl, .csv, .parquet, or a dataset on the hub.",
    ),
    retain: str = typer.Option(None, "--retain", help="Pairs to retain."),
    decouple: str = typer.Option(
        None, "--decouple", help="Unsafe questions on benign images, paired with the forget set by pair_id."
    ),
    preferred: str = typer.Option(
        None,
        "--preferred",
        help="Preferred answers to the unsafe questions, for dpo, paired with the forget set by pair_id.",
    ),
    refusals: Path = typer.Option(None, "--refusals", help='JSON {"idk": [...]}: the target sentences of po.'),
    format_name: str = typer.Option(
        None, "--format", help="Format of the files, such as that of a plug-in or FILE.py:CLASS. Default: detected."
    ),
    question: str = QUESTION,
    answer: str = ANSWER,
    image: str = IMAGE,
    id: str = typer.Option(None, "--id-column", help="Column with the id. Default: id."),
    category: str = typer.Option(None, "--category-column", help="Column with the category. Default: category."),
    pair: str = typer.Option(
        None,
        "--pair-column",
        help="Column that pairs a decouple or preferred row with its forget row. Default: pair_id.",
    ),
    set_column: str = typer.Option(
        None,
        "--set-column",
        help="Column of TABLE with forget (harmful), retain (harmless), decouple or preferred. Default: set.",
    ),
    accept_refusals: bool = ACCEPT_REFUSALS,
    overwrite: bool = OVERWRITE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Imports your own data: a table with a set column, or a file for each set.

    Example:

      vlm-unlearn data import files pairs.csv --images images --out data/mine

      vlm-unlearn data import files --forget harmful.json --retain retain_mixed.json --images images --out data/mine
    """
    from vlm_unlearn.data.training_set import validate_training_set_outputs
    from vlm_unlearn.data_tools.importers import import_files
    from vlm_unlearn.errors import UserError

    options = {"forget": forget, "retain": retain, "decouple": decouple, "preferred": preferred}
    files_by_role = {role: file for role, file in options.items() if file}
    if table and files_by_role:
        raise UserError(
            "TABLE and --forget or --retain exclude each other. Pass TABLE with a set column, or a file for each set.",
            code="conflicting-settings",
        )
    if not table and not (forget and retain):
        raise UserError(
            "there is no data. Pass TABLE with a set column, or both --forget and --retain.", code="missing-setting"
        )
    inputs: list[str | Path | None] = [table, forget, retain, decouple, preferred, refusals]
    validate_training_set_outputs(out, inputs, overwrite)
    set_name = (set_column or "set") if table else None
    columns = table_columns(
        question=question, answer=answer, image=image, id=id, category=category, pair=pair, set=set_name
    )
    with Stages() as stages, file_progress(stages):
        imported = import_files(
            {"": table} if table else files_by_role,
            images,
            out,
            columns,
            refusals,
            lambda done, total: stages.update("images", done, total),
            format_name,
            refusal_check(accept_refusals),
        )
    _print_counts(imported, out, as_json)


def _print_counts(imported: ImportResult, out: Path, as_json: bool) -> None:
    """Lists the broken records and prints the number of examples of each role."""
    show_problems(imported.problems)
    if imported.text_only == sum(imported.counts.values()):
        typer.echo(
            "warning: no example has an image; if the table has a column of images, pass --image-column", err=True
        )
    if as_json:
        document = {
            "out": str(out),
            "counts": imported.counts,
            "left_out": imported.left_out,
            "text_only": imported.text_only,
        }
        print_json({**document, "broken": imported.problems.count})
        return
    counts = [f"{role} {count:,}" for role, count in imported.counts.items()]
    text_only = [f"{imported.text_only:,} of them text only"] * bool(imported.text_only)
    skipped = [f"skipped ({reason}) {count:,}" for reason, count in imported.left_out.items()]
    typer.echo(f"{out}: " + ", ".join([*counts, *text_only, *skipped]) + skipped_note(imported.problems))
