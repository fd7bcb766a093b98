"""SafeEraser's checkpoint.pt: the trained tensors of a LLaVA in transformers, with LoRA matrices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_unlearn.config.yaml_text import parse_yaml, read_bounded
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.modeling.conversion.base import CheckpointFormat, Conversion, ConversionOptions, is_hub_name, register
from vlm_unlearn.modeling.conversion.lora import as_lora, describe_rank, lora_scale, split_adapters
from vlm_unlearn.modeling.conversion.overlay import overlay
from vlm_unlearn.modeling.conversion.tensor_files import open_tensors

FILE = "checkpoint.pt"
CONFIG = "cfg.yaml"  # which the training writes into its folder. A checkpoint in step_N is one folder below
PUBLISHED_ALPHA = 256.0  # in forget_lora.yaml and in the code of ckpt_infer.py


@register("safe_eraser")
class SafeEraserFormat(CheckpointFormat):
    """A dict of the parameters that were trained, in float16, with the names that PEFT gives them.

    It contains neither LoRA's alpha nor the name of the base, which cfg.yaml next to it has.

    Source: ``save_lora_weights`` in ``utils.py`` and ``ckpt_infer.py`` of yuu250/SafeEraser.
    """

    summary = f"SafeEraser's {FILE}"

    def matches(self, source: Path) -> bool:
        """Returns whether it is a file of torch.save, or a folder with SafeEraser's file."""
        return source.suffix in (".pt", ".pth") if source.is_file() else (source / FILE).is_file()

    def read(self, source: Path, options: ConversionOptions) -> Conversion:
        """Returns the conversion of a checkpoint and its base."""
        file = source if source.is_file() else source / FILE
        config_file, config = _training_config(file)
        base = options.base or str(config.get("model_path"))
        if options.base is None and not is_hub_name(base):
            raise UserError(
                "contains trained tensors only. Pass --base with the model that the training began with, such as "
                "llava-hf/llava-1.5-7b-hf.",
                code="missing-base",
                file=file,
                field="--base",
            )
        pairs, others = split_adapters(open_tensors([file]), file)
        lora = {}
        if pairs:
            rank = describe_rank(pairs)
            lora = as_lora(pairs, lora_scale(_alpha(options, config, config_file, rank), rank))
        return overlay("safe_eraser", base, others, lora, file, options)


def _training_config(file: Path) -> tuple[Path, Mapping[str, Any]]:
    """Returns the file with the settings of the training, and its content. It is empty if there is no such file.

    Raises:
        UserError: It is broken.
    """
    for folder in (file.parent, file.parent.parent):
        config_file = folder / CONFIG
        if not config_file.is_file():
            continue
        try:
            content = parse_yaml(read_bounded(config_file))
        except Exception as error:  # PyYAML raises many types
            raise UserError(
                f"cannot be read: {quoted(error, 200)}. Restore it, or move it away and pass --base and --lora-alpha.",
                code="invalid-yaml",
                file=config_file,
            ) from None
        return config_file, content if isinstance(content, dict) else {}
    return file.parent / CONFIG, {}


def _alpha(options: ConversionOptions, config: Mapping[str, Any], config_file: Path, rank: int) -> float:
    """Returns LoRA's alpha: that of the user, of the training's settings, or the published one.

    Raises:
        UserError: The settings are of a training with another rank.
    """
    if options.lora_alpha is not None:
        return options.lora_alpha
    settings = config.get("LoRA")
    if not isinstance(settings, dict):
        return PUBLISHED_ALPHA
    alpha = settings.get("alpha")
    if settings.get("r") != rank or isinstance(alpha, bool) or not isinstance(alpha, int | float) or alpha <= 0:
        raise UserError(
            f"has the rank {quoted(settings.get('r'))} and alpha {quoted(alpha)}, but the checkpoint has the rank "
            f"{rank}. Restore the file of this training, or pass --lora-alpha.",
            code="run-mismatch",
            file=config_file,
            field="LoRA",
        )
    return float(alpha)
