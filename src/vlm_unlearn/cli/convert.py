"""``vlm-unlearn convert``: makes Hugging Face model folders of checkpoints in the formats of both papers' code."""

from __future__ import annotations

from pathlib import Path

import typer

from vlm_unlearn.cli.common import JSON_OPTION, OVERWRITE_OPTION, Stages, print_json, quiet_libraries, status_console
from vlm_unlearn.cli.export import Precision


def convert(
    source: str = typer.Argument(
        ...,
        metavar="SRC",
        help="A checkpoint: a folder, a hub name, or a file such as checkpoint.pt or mm_projector.bin.",
    ),
    destination: Path = typer.Argument(..., metavar="DEST", help="The model folder to write."),
    base: str = typer.Option(
        None, "--base", help="The model that an adapter, a projector or a checkpoint.pt belongs to. Folder or hub name."
    ),
    vision_tower: str = typer.Option(
        None, "--vision-tower", help="The CLIP model of a LLaVA. Default: the hub name in its config.json."
    ),
    format: str = typer.Option("auto", "--format", help="llava, llava_lora, llava_projector, safe_eraser, or auto."),
    precision: Precision = typer.Option(
        Precision.auto, "--precision", help="Data type of the weights. auto: that of the checkpoint or its base."
    ),
    lora_alpha: float = typer.Option(
        None,
        "--lora-alpha",
        help="LoRA's alpha of a checkpoint.pt. Default: that of its cfg.yaml, or 256 as published.",
    ),
    template: str = typer.Option(
        "llava-hf", "--template", help="Chat template of a LLaVA: llava-hf, or vicuna_v1 with the system line."
    ),
    plan: bool = typer.Option(False, "--plan", help="Check the checkpoint and list the output without writing it."),
    overwrite: bool = OVERWRITE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Converts a checkpoint of LLaVA's or SafeEraser's code to a model folder that transformers loads.

    LoRA matrices are merged. Weights are read one after the other. Run again after an interruption, it resumes.

    Example:

      vlm-unlearn convert liuhaotian/llava-v1.5-7b models/llava-7b

      vlm-unlearn convert checkpoints/npo-lora models/npo --base liuhaotian/llava-v1.5-7b

      vlm-unlearn convert ckpt_results/po/checkpoint.pt models/po --base llava-hf/llava-1.5-7b-hf
    """
    with status_console().status("loading transformers"):
        from vlm_unlearn.modeling.conversion.base import ConversionOptions
        from vlm_unlearn.modeling.conversion.run import describe, plan_conversion, write_conversion
        from vlm_unlearn.modeling.conversion.tensor_files import ending_processes

        quiet_libraries()
    options = ConversionOptions(base, vision_tower, precision.value, lora_alpha, template)
    with ending_processes(), Stages() as stages:
        stages.wait("reading the checkpoint")
        conversion = plan_conversion(source, options, format)
        result = describe(conversion)
        if not plan:

            def show(done: int, total: int) -> None:
                stages.update("convert (MB)", done >> 20, total >> 20)

            result["model"] = str(write_conversion(conversion, destination, options, overwrite, show))
    if as_json:
        print_json(result)
        return
    summary = f"{result['format']}: {result['tensors']:,} tensors, {result['bytes'] / 1e9:,.2f} GB"
    merged = f", LoRA merged into {result['merged']:,} of them" if result["merged"] else ""
    typer.echo(f"{summary} in {', '.join(result['dtypes'])}{merged}")
    for note in result["notes"]:
        typer.echo(note)
    typer.echo(f"would write {', '.join(result['files'])}" if plan else f"model in {result['model']}")
