"""``vlm-unlearn export``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import typer

from vlm_unlearn.cli.common import JSON_OPTION, print_json, quiet_libraries, status_console


class Precision(StrEnum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


def export(
    run: Path = typer.Argument(..., metavar="RUN", help="A folder that train wrote."),
    out: Path = typer.Option(..., "--out", help="The model folder to write; it must not hold anything yet."),
    evaluations: list[Path] = typer.Option(
        [],
        "--evaluation",
        help="An evaluation folder whose rates the model card shows, of this model or its base; may be repeated.",
    ),
    precision: Precision = typer.Option(
        Precision.auto, "--precision", help="Of the weights; auto: as the base model (LoRA) or the run (full)."
    ),
    license: str = typer.Option(
        None, "--license", help="The base model's license, as the hub names it (llama2, apache-2.0), for the card."
    ),
    as_json: bool = JSON_OPTION,
) -> None:
    """Writes a model folder that transformers loads as any other: merged weights, processor, chat template, model card.

    Example:

      vlm-unlearn export runs/npo --evaluation evaluations/base --evaluation evaluations/npo --out models/llava-npo
    """
    from vlm_unlearn.errors import UserError
    from vlm_unlearn.store import describe_path

    if not (run / "recipe.json").is_file():
        raise UserError(f"{run}: is no folder that `vlm-unlearn train` wrote{describe_path(run)}")
    with status_console().status("loading transformers"):
        from vlm_unlearn.models.export import export_run
        from vlm_unlearn.reporting.model_card import model_card

        quiet_libraries()
    with status_console().status("merging and writing the weights"):
        card = model_card(run, evaluations, license)
        folder = export_run(run, out, precision.value, card)
    if as_json:
        print_json({"model": str(folder)})
    else:
        typer.echo(f"model in {folder}; its card is README.md")
