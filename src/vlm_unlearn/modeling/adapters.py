"""Loads adapters of PEFT, and rejects those whose tensors do not match the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict

from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.store import read_json, validate_model_files, write_json
from vlm_unlearn.store.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_tensor_names


def load_adapter(model: Any, folder: Path) -> Any:
    """Returns the model with the adapter of a local folder.

    Every tensor of the file must match a parameter, and every parameter of the adapter must be in the file. PEFT only
    warns, and the model would answer as its base does.

    Args:
        model: The base model, changed in place.
        folder: The adapter folder. Its files are not looked up on a hub.

    Raises:
        UserError: A tensor is missing, is not part of the model, or has another shape.
    """
    validate_model_files(folder)
    file = folder / ADAPTER_WEIGHTS
    try:
        adapted: Any = PeftModel.from_pretrained(model, str(folder))
        # Loads the tensors once more, for the list of names that did not match.
        result = adapted.load_adapter(str(folder), "default")
    except Exception as error:  # another shape, or an adapter_config.json that does not fit the model
        reason = (str(error).strip() or type(error).__name__).splitlines()
        raise UserError(
            f"the adapter does not fit its base model: {' '.join(reason)[:300]}", code="adapter-mismatch", file=file
        ) from None
    names = read_tensor_names(file)
    # PEFT does not list missing modules that were trained next to the adapters.
    other = {key for key in get_peft_model_state_dict(adapted, save_embedding_layers=False) if ".lora_" not in key}
    missing = sorted({*result.missing_keys, *(other - names)})
    unexpected = sorted(result.unexpected_keys)
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing, for example {quoted(missing[0])}")
    if unexpected:
        problems.append(f"{len(unexpected)} tensors are not part of the model, for example {quoted(unexpected[0])}")
    if problems:
        raise UserError(
            f"the adapter does not match its base model: {'. '.join(problems)}. Train or save the adapter again.",
            code="adapter-mismatch",
            file=file,
        )
    return adapted


def sort_adapter_config(folder: Path) -> None:
    """Sorts the lists of module names in an adapter's config. PEFT writes sets, in an order that differs by process."""
    config = read_json(folder / ADAPTER_CONFIG)
    for name in ("target_modules", "modules_to_save", "exclude_modules", "target_parameters"):
        if isinstance(config.get(name), list):
            config[name] = sorted(config[name])
    write_json(folder / ADAPTER_CONFIG, config)
