"""Puts trained tensors and LoRA matrices over a base model that is a folder of Hugging Face."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.modeling.conversion.base import Conversion, ConversionOptions, LoraPair, Weight, is_supported_dtype
from vlm_unlearn.modeling.conversion.names import canonical, is_buffer
from vlm_unlearn.modeling.conversion.tensor_files import Stored, TensorInfo, open_tensors, weight_files
from vlm_unlearn.modeling.loader import DTYPES, model_folder, model_skeleton
from vlm_unlearn.store import read_json, write_json

# Files of a model folder that are no weights.
_COPIED = re.compile(r"[\w.-]+\.(?:json|jinja|model|txt)")
_NOT_COPIED = re.compile(r".*\.index\.json|manifest\.json|unlearning_manifest\.json|README.*")


def overlay(
    format_name: str,
    base: str,
    replaced: Mapping[str, Stored],
    lora: Mapping[str, LoraPair],
    checkpoint: Path,
    options: ConversionOptions,
) -> Conversion:
    """Returns the conversion of a base model with replaced tensors and merged LoRA matrices.

    Args:
        format_name: The name of the format.
        base: The base model: a folder or hub name in the format of Hugging Face.
        replaced: Tensors that replace those of the base, by their name in any release of transformers.
        lora: LoRA matrices by the name of the module.
        checkpoint: The file of the tensors, for error messages.
        options: Settings of the conversion.

    Raises:
        UserError: The base has no tensor of that name, or one of another shape.
    """
    folder = model_folder(base)
    model_skeleton(folder)  # raises an error if the config does not describe an image-text-to-text model
    tensors = open_tensors(weight_files(folder))
    replaced = {canonical(name): stored for name, stored in replaced.items() if not is_buffer(name)}
    lora = {canonical(f"{module}.weight"): pair for module, pair in lora.items()}
    names = {canonical(name) for name in tensors}
    unexpected = sorted((replaced.keys() | lora.keys()) - names)
    if unexpected:
        raise UserError(
            f"contains {len(unexpected)} tensors that the base model {quoted(base)} does not have, for example "
            f"{quoted(unexpected[0])}. Pass the model that the training began with as --base.",
            code="adapter-mismatch",
            file=checkpoint,
        )
    weights = []
    for name, stored in tensors.items():
        key = canonical(name)
        dtype = stored.info.dtype
        if options.precision != "auto" and is_supported_dtype(stored.info):
            dtype = DTYPES[options.precision]
        shape, pair = stored.info.shape, lora.get(key)
        if key in replaced:
            stored = replaced[key]
            _check_shape(stored.info, shape, key, checkpoint)
        if pair is not None:
            product = (pair.b.info.shape[0], pair.a.info.shape[1])
            _check_shape(TensorInfo(dtype, product), shape, key, checkpoint)
        weights.append(Weight(name, stored, dtype, shape, pair))

    def write_files(out: Path) -> None:
        for file in [*sorted(folder.iterdir()), *sorted(folder.glob("[!.]*/*"))]:  # InstructBLIP has a second tokenizer
            if file.is_file() and _COPIED.fullmatch(file.name) and not _NOT_COPIED.fullmatch(file.name):
                copied = out / file.relative_to(folder)
                copied.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copied)
        if options.precision != "auto":
            _set_dtype(out / "config.json", options.precision)

    return Conversion(format_name, weights, write_files, [checkpoint, folder])


def _check_shape(info: TensorInfo, shape: tuple[int, ...], name: str, file: Path) -> None:
    if info.shape != shape:
        raise UserError(
            f"{quoted(name)} has the shape {info.shape}, but the base model needs {shape}. Pass the model that the "
            "training began with as --base.",
            code="adapter-mismatch",
            file=file,
        )
    if not is_supported_dtype(info):
        raise UserError(
            f"{quoted(name)} does not hold floating-point numbers. Quantized checkpoints are not supported.",
            code="unsupported-setting",
            file=file,
        )


def _set_dtype(file: Path, precision: str) -> None:
    """Writes the data type of the weights into config.json, under the keys of all releases of transformers."""
    config = read_json(file)
    name = str(DTYPES[precision]).removeprefix("torch.")
    sections = [config, *(section for section in config.values() if isinstance(section, dict))]
    for section in sections:
        for key in ("dtype", "torch_dtype"):
            if key in section:
                section[key] = name
    config["dtype"] = config["torch_dtype"] = name
    write_json(file, config)
