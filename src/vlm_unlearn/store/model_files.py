"""Checks the files of a model or adapter folder by their names and headers, without loading weights."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.store.files import read_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_MODEL_FILE = "base_model.json"  # next to adapters: the digest of their base model, and the names of their tensors
MAX_HEADER_BYTES = 25_000_000  # of a safetensors file: 200,000 tensors. The library's limit is 100 MB
LORA_PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))


def validate_model_files(folder: Path) -> None:
    """Checks that a folder names only safetensors files that are in it, and that its adapters are complete.

    An adapter must consist of complete pairs. If base_model.json lists its tensors, these must be in the file.

    Raises:
        UserError: A weights index or config.json names a pickle, a missing file or a file outside the folder, or
            tensors of an adapter are missing or renamed.
    """
    for index in sorted(folder.glob("*.safetensors.index.json")):
        _validate_index(index)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    weights_name = config.get("transformers_weights") if isinstance(config, dict) else None
    if weights_name is not None:
        _validate_name(weights_name, folder / "config.json", "transformers_weights", ".safetensors.index.json")
    if (folder / ADAPTER_CONFIG).is_file():
        _validate_adapter(folder)


def _validate_index(index: Path) -> None:
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise UserError("must contain a weight_map.", code="invalid-model", file=index, field="weight_map")
    for name in dict.fromkeys(json.dumps(name) for name in names.values()):
        _validate_name(json.loads(name), index, "weight_map")


def _validate_name(name: Any, file: Path, field: str, *more_endings: str) -> None:
    """Checks the name of a weights file. It must be in the folder itself, whose digest then covers it."""
    problem = None
    if not isinstance(name, str) or not name.endswith((".safetensors", *more_endings)):
        problem = "is not a safetensors file. Pickled weights can run code. Convert them to safetensors."
    elif "/" in name or "\\" in name or "\0" in name:
        problem = "is not directly in the model folder. Move the file there."
    elif not (file.parent / name).is_file():
        problem = "is missing. Download the model again."
    if problem:
        raise UserError(f"{quoted(str(name))} {problem}", code="invalid-model", file=file, field=field)


def _validate_adapter(folder: Path) -> None:
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        raise UserError(
            f"contains no {ADAPTER_WEIGHTS}. Restore the file, or train the adapter again.",
            code="invalid-model",
            file=folder,
        )
    keys = read_tensor_names(file)
    for first, second in LORA_PAIRS:
        for name, counterpart in ((first, second), (second, first)):
            for key in sorted(keys):
                other = key.replace(f".{name}", f".{counterpart}")
                if other != key and other not in keys:
                    raise UserError(
                        f"contains {quoted(key)} without {quoted(other)}. A tensor is missing or has another name. "
                        "Train or save the adapter again.",
                        code="adapter-mismatch",
                        file=file,
                    )
    base = read_json(folder / BASE_MODEL_FILE) if (folder / BASE_MODEL_FILE).is_file() else None
    saved = base.get("tensors") if isinstance(base, dict) else None
    if isinstance(saved, list) and set(saved) != keys:
        different = sorted(set(saved) ^ keys)
        raise UserError(
            f"contains other tensors than those that were saved ({len(different)} are missing or unexpected, such as "
            f"{quoted(str(different[0]))}). Restore the file, or train the adapter again.",
            code="adapter-mismatch",
            file=file,
        )
    config = read_json(folder / ADAPTER_CONFIG)
    if isinstance(config, dict) and config.get("peft_type") == "LORA" and not any(".lora_" in key for key in keys):
        raise UserError(
            "contains no LoRA tensors. Train or save the adapter again.", code="adapter-mismatch", file=file
        )


def read_tensor_names(file: Path) -> set[str]:
    """Returns the names of the tensors in a safetensors file.

    Raises:
        UserError: The header is broken.
    """
    length = validate_header_size(file)
    try:
        with file.open("rb") as handle:
            handle.seek(8)
            header = json.loads(handle.read(length))
        return set(header) - {"__metadata__"}
    except (OSError, ValueError, TypeError, RecursionError):
        raise UserError("broken weights: the header cannot be read.", code="invalid-model", file=file) from None


def validate_header_size(file: Path) -> int:
    """Returns the number of bytes of a safetensors file's header, which the file begins with.

    Raises:
        UserError: The header is broken or too large. It would take minutes to read.
    """
    try:
        with file.open("rb") as handle:
            length: int = struct.unpack("<Q", handle.read(8))[0]
    except (OSError, struct.error):
        raise UserError("broken weights: the header cannot be read.", code="invalid-model", file=file) from None
    if length > MAX_HEADER_BYTES:
        raise UserError(
            f"broken weights: the header has {length:,} bytes, more than {MAX_HEADER_BYTES:,}. Save the weights in "
            "several files.",
            code="invalid-model",
            file=file,
        )
    return length
