"""LoRA adapters of LLaVA's code, with the projector and other trained tensors in non_lora_trainables.bin."""

from __future__ import annotations

from pathlib import Path

from vlm_unlearn.errors import UserError
from vlm_unlearn.modeling.conversion.assembly import assemble
from vlm_unlearn.modeling.conversion.base import (
    CheckpointFormat,
    Conversion,
    ConversionOptions,
    register,
    required_base,
)
from vlm_unlearn.modeling.conversion.bases import read_original_model
from vlm_unlearn.modeling.conversion.llava_config import read_settings
from vlm_unlearn.modeling.conversion.lora import as_lora, read_adapter_scale, split_adapters
from vlm_unlearn.modeling.conversion.names import hub_name, unwrapped
from vlm_unlearn.modeling.conversion.overlay import overlay
from vlm_unlearn.modeling.conversion.tensor_files import open_tensors

ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
OTHERS = "non_lora_trainables.bin"


@register("llava_lora")
class LlavaLoraFormat(CheckpointFormat):
    """Adapters that are merged into their base, which is a LLaVA in either format or a language model.

    Source: ``llava/train/train.py`` and ``llava/model/builder.py`` of haotian-liu/LLaVA.
    """

    summary = f"LoRA of LLaVA's code: adapter_config.json, adapter_model and {OTHERS}"

    def matches(self, source: Path) -> bool:
        """Returns whether the folder contains an adapter with the file of other trained tensors."""
        return (source / "adapter_config.json").is_file() and (source / OTHERS).is_file()

    def read(self, source: Path, options: ConversionOptions) -> Conversion:
        """Returns the conversion of a folder and its base."""
        base_name = required_base(options, source, "LoRA matrices")
        file = next((source / name for name in ADAPTERS if (source / name).is_file()), None)
        if file is None:
            raise UserError(
                f"contains neither {ADAPTERS[0]} nor {ADAPTERS[1]}. Download it again.",
                code="invalid-model",
                file=source,
            )
        scale = read_adapter_scale(source / "adapter_config.json")
        pairs, more = split_adapters(open_tensors([file]), file)
        others = {**more, **{unwrapped(name): tensor for name, tensor in open_tensors([source / OTHERS]).items()}}
        if not pairs:
            raise UserError("contains no LoRA matrices. Download it again.", code="adapter-mismatch", file=file)
        lora = as_lora(pairs, scale)
        base = read_original_model(base_name)
        if base is None:
            replaced = {hub_name(name): tensor for name, tensor in others.items()}
            modules = {hub_name(module + ".").removesuffix("."): pair for module, pair in lora.items()}
            return overlay("llava_lora", base_name, replaced, modules, source, options)
        settings = read_settings(source if (source / "config.json").is_file() else base.folder)
        tensors = {**base.tensors, **others}
        return assemble("llava_lora", settings, tensors, lora, base.folder, [source, base.folder], options)
