"""A projector of LLaVA's code, mm_projector.bin, for a base model that has none or another one."""

from __future__ import annotations

from pathlib import Path

from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.modeling.conversion.assembly import assemble
from vlm_unlearn.modeling.conversion.base import (
    CheckpointFormat,
    Conversion,
    ConversionOptions,
    register,
    required_base,
)
from vlm_unlearn.modeling.conversion.bases import read_original_model
from vlm_unlearn.modeling.conversion.llava_config import is_llava_config, read_settings
from vlm_unlearn.modeling.conversion.names import hub_name, unwrapped
from vlm_unlearn.modeling.conversion.overlay import overlay
from vlm_unlearn.modeling.conversion.tensor_files import open_tensors
from vlm_unlearn.store import read_json

FILE = "mm_projector.bin"


@register("llava_projector")
class LlavaProjectorFormat(CheckpointFormat):
    """A projector alone, as the training writes it with ``--tune_mm_mlp_adapter``.

    Source: ``safe_save_model_for_hf_trainer`` in ``llava/train/train.py`` of haotian-liu/LLaVA.
    """

    summary = f"a projector of LLaVA's code: {FILE}, or mm_projector/checkpoint-N.bin"

    def matches(self, source: Path) -> bool:
        """Returns whether it is the file or the folder of a projector."""
        if source.is_file():
            return source.name == FILE or (source.suffix == ".bin" and source.parent.name == "mm_projector")
        return (source / FILE).is_file() and not (source / "adapter_config.json").is_file()

    def read(self, source: Path, options: ConversionOptions) -> Conversion:
        """Returns the conversion of a projector and its base."""
        file = source if source.is_file() else source / FILE
        base_name = required_base(options, file, "a projector alone")
        tensors = {unwrapped(name): tensor for name, tensor in open_tensors([file]).items()}
        # Older code has saved names without the prefix.
        tensors = {name if name.startswith("model.") else f"model.{name}": tensor for name, tensor in tensors.items()}
        if not any(name.startswith("model.mm_projector.") for name in tensors):
            raise UserError(
                f"contains no mm_projector, but for example {quoted(next(iter(tensors)))}. Check the path.",
                code="missing-tensors",
                file=file,
            )
        base = read_original_model(base_name)
        if base is None:
            replaced = {hub_name(name): tensor for name, tensor in tensors.items()}
            return overlay("llava_projector", base_name, replaced, {}, file, options)
        folders = [file.parent, file.parent.parent, *([base.folder] if base.is_llava else [])]
        configured = [folder for folder in folders if _has_config(folder)]
        if not configured:
            raise UserError(
                "there is no config.json of LLaVA next to it. Copy that of its training there, or pass a LLaVA as "
                "--base.",
                code="invalid-model",
                file=file,
            )
        settings = read_settings(configured[0])
        merged = {**base.tensors, **tensors}
        return assemble("llava_projector", settings, merged, {}, base.folder, [file, base.folder], options)


def _has_config(folder: Path) -> bool:
    file = folder / "config.json"
    return file.is_file() and is_llava_config(read_json(file))
