"""``vlm-unlearn export``: writes the model of a training run as a Hugging Face folder."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import typer

from vlm_unlearn.cli.common import JSON_OPTION, print_json, quiet_libraries, status_console


class Precision(StrEnum):
    """Data types of exported weights."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


def export(
    run: Path = typer.Argument(..., metavar="RUN", help="A folder that train wrote."),
    out: Path = typer.Option(..., "--out", help="The model folder to write. It must be empty or new."),
    evaluations: list[Path] = typer.Option(
        [],
        "--evaluation",
        help="An evaluation folder of this model or its base. The model card shows its rates. May be repeated.",
    ),
    precision: Precision = typer.Option(
        Precision.auto,
        "--precision",
        help="Data type of the weights. auto: that of the base model (LoRA) or of the run (full).",
    ),
    license: str = typer.Option(
        None, "--license", help="License of the base model for the card, by its name on the hub (llama2, apache-2.0)."
    ),
    as_json: bool = JSON_OPTION,
) -> None:
    """Writes a model folder that transformers loads: merged weights, processor, chat template and model card.

    Example:

      vlm-unlearn export runs/npo --evaluation evaluations/base --evaluation evaluations/npo --out models/llava-npo
    """
    from vlm_unlearn.errors import UserError
    from vlm_unlearn.store import RunDirectory, describe_path

    if not RunDirectory(run).recipe_file.is_file():
        raise UserError(
            f"is not a run folder of `vlm-unlearn train`{describe_path(run)}", code="run-not-found", file=run
        )
    with status_console().status("loading transformers"):
        from vlm_unlearn.modeling.export import export_run
        from vlm_unlearn.reporting.model_card import model_card

        quiet_libraries()
    with status_console().status("merging and writing the weights"):
        card = model_card(run, evaluations, license)
        folder = export_run(run, out, precision.value, card)
    if as_json:
        print_json({"model": str(folder)})
    else:
        typer.echo(f"model in {folder}; its card is README.md")
