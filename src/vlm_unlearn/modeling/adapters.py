"""Adapter folders of PEFT: which base model they belong to, and loading without a missing or unused tensor.

PEFT only warns of a tensor that matches no parameter, and leaves the parameter at its initial value. The model would
then answer as its base model does, and would be taken for the unlearned one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.store import RunDirectory, read_json, tensor_shapes, user_path, weight_files, write_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_MODEL_FILE = "base_model.json"  # next to adapters: the digest of their base model, and the shapes of their tensors
ADAPTER_NAME = "default"


def is_adapter(folder: Path) -> bool:
    """Returns whether a folder contains adapters of PEFT."""
    return (folder / ADAPTER_CONFIG).is_file()


def adapter_base(folder: Path) -> str:
    """Returns the folder or hub name of the base model that an adapter's config names.

    Raises:
        UserError: The config names none.
    """
    file = folder / ADAPTER_CONFIG
    config = read_json(file)
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(base, str) or not base:
        raise UserError(
            "must name the base model of the adapter.",
            code="invalid-field",
            file=file,
            field="base_model_name_or_path",
        )
    return base


def check_tensors(folder: Path) -> bool:
    """Checks that the tensors of an adapter are those that were saved, by their names and shapes.

    Returns:
        Whether base_model.json lists the tensors. If not, only `add_adapters` can check them.

    Raises:
        UserError: The weight file is missing or broken, or tensors are missing, renamed or of another shape.
    """
    shapes = _adapter_shapes(folder)
    file = folder / BASE_MODEL_FILE
    content = read_json(file) if file.is_file() else {}
    saved = content.get("tensors") if isinstance(content, dict) else None
    if not isinstance(saved, dict):
        return False
    _check_names(folder, missing=saved.keys() - shapes.keys(), unexpected=shapes.keys() - saved.keys())
    for name, shape in shapes.items():
        if saved[name] != shape:
            raise _invalid(folder, f"the tensor {quoted(name)} has the shape {shape} instead of {saved[name]}")
    return True


def describe_tensors(folder: Path) -> dict[str, list[int]]:
    """Returns the shapes of an adapter's tensors by name, for base_model.json."""
    return _adapter_shapes(folder)


def sort_adapter_config(folder: Path) -> None:
    """Sorts the lists of module names in an adapter's config. PEFT writes sets, in an order that differs by process."""
    file = folder / ADAPTER_CONFIG
    config = read_json(file)
    for name in ("target_modules", "modules_to_save", "exclude_modules", "target_parameters"):
        if isinstance(config.get(name), list):
            config[name] = sorted(config[name])
    write_json(file, config)


def _adapter_shapes(folder: Path) -> dict[str, list[int]]:
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():  # PEFT would look for it on the hub, and then for a pickle
        raise UserError(
            f"contains no {ADAPTER_WEIGHTS}. Copy it again. Pickled weights are not supported.",
            code="invalid-adapter",
            file=folder,
        )
    return tensor_shapes(file)


def check_adapters(skeleton: Any, folder: Path) -> None:
    """Checks that an adapter fits its base model, without reading a weight.

    Args:
        skeleton: The base model on the meta device, changed in place.
        folder: The adapter folder.

    Raises:
        UserError: As `add_adapters`.
    """
    import torch

    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in _adapter_shapes(folder).items()}
        _add(skeleton, folder, state)


def add_adapters(model: Any, folder: Path) -> Any:
    """Returns the PEFT model of a base model with the adapters of a folder.

    Args:
        model: The base model, changed in place.
        folder: The adapter folder.

    Raises:
        UserError: PEFT cannot load the adapter, a tensor of its file matches no parameter, or a parameter of the
            adapter is missing from the file.
    """
    from safetensors.torch import load_file

    _adapter_shapes(folder)  # raises an error that names a missing or broken file
    return _add(model, folder, load_file(folder / ADAPTER_WEIGHTS))


def _add(model: Any, folder: Path, state: dict[str, Any]) -> Any:
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from peft.utils import set_peft_model_state_dict

    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        adapted = PeftModel(model, config, ADAPTER_NAME)
        expected = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    except Exception as error:  # broken adapter_config.json files raise many types
        raise _invalid(folder, f"PEFT cannot build the adapter ({_first_line(error)})") from None
    if not hasattr(adapted.base_model, "merge_and_unload"):
        raise _invalid(folder, f"adapters of the type {config.peft_type} cannot be merged into their base model")
    try:
        result = set_peft_model_state_dict(adapted, state, ADAPTER_NAME)
    except KeyError as error:  # of a module in modules_to_save
        raise _invalid(folder, f"the tensor {quoted(str(error.args[0]))} is missing") from None
    except Exception as error:
        raise _invalid(folder, f"the tensors do not fit the base model ({_first_line(error)})") from None
    # transformers may rename tensors of older releases. Their number stays the same.
    missing = expected - state.keys() if len(state) < len(expected) or result.unexpected_keys else set()
    missing |= {name for name in result.missing_keys if f".{ADAPTER_NAME}" in name}
    _check_names(folder, missing, set(result.unexpected_keys))
    return adapted.eval()


def _check_names(folder: Path, missing: set[str], unexpected: set[str]) -> None:
    problems = [
        f"{len(names)} {problem}, for example {quoted(min(names))}"
        for names, problem in (
            (missing, "tensors of the adapter are missing"),
            (unexpected, "tensors match no parameter"),
        )
        if names
    ]
    if problems:
        raise _invalid(folder, " and ".join(problems))


def _invalid(folder: Path, problem: str) -> UserError:
    return UserError(
        f"{problem}. Copy the adapter folder again, or train again.",
        code="invalid-adapter",
        file=folder / ADAPTER_WEIGHTS,
    )


def _first_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def check_local_model(name: str) -> None:
    """Checks the weight files of a model folder, adapter folder or training run, if it is on this machine.

    For adapters that a training run of this project wrote, no library is loaded.

    Raises:
        UserError: A weight file is missing, broken, not a safetensors file inside the folder, or not what it was when
            it was saved.
    """
    folder = user_path(name)
    if not (folder / "config.json").is_file() and RunDirectory(folder).exists():
        folder = RunDirectory(folder).model
    if is_adapter(folder):
        if not check_tensors(folder):
            from vlm_unlearn.modeling.loader import run_model_folder

            run_model_folder(str(folder))
        folder = user_path(adapter_base(folder))
    if (folder / "config.json").is_file():
        for file in weight_files(folder):
            tensor_shapes(file)
