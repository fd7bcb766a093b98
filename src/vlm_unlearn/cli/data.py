"""``vlm-unlearn data``: from published files to a training-set folder."""

from __future__ import annotations

from pathlib import Path

import typer

from vlm_unlearn.cli.common import JSON_OPTION, print_json

app = typer.Typer(help="Prepares training data.", no_args_is_help=True, rich_markup_mode=None)
import_app = typer.Typer(help="Makes a training-set folder of published files.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(import_app, name="import")
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

    Example:

      vlm-unlearn data import vlguard VLGuard/train.json --images VLGuard/train --harmful-answers harmful.json --out data/vlguard
    """
    from vlm_unlearn.data.importing import import_vlguard

    counts = import_vlguard(file, images, out, harmful_answers, include_safe_image_unsafe, external, external_images, retain_size, seed)
    _show(counts, out, as_json)


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
    from vlm_unlearn.data.importing import import_safe_eraser

    _show(import_safe_eraser(file, images, out, refusals), out, as_json)


def _show(counts: dict[str, int], out: Path, as_json: bool) -> None:
    if as_json:
        print_json({"out": str(out), "counts": counts})
    else:
        typer.echo(f"{out}: " + ", ".join(f"{role} {count}" for role, count in counts.items()))
