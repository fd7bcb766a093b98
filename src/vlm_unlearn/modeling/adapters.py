"""Loads adapters of PEFT, and rejects those whose tensors do not match the model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.modeling.size_limits import MAX_LIST_LENGTH, validate_file_sizes
from vlm_unlearn.modeling.trial import Pattern, try_patterns
from vlm_unlearn.store import read_json, validate_model_files, write_json
from vlm_unlearn.store.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_tensor_names

MAX_REPLICATED_LAYERS = 1_000
MAX_ITERATIONS = 100  # of an initialization of the adapters


def load_adapter(model: Any, folder: Path) -> Any:
    """Returns the model with the adapter of a local folder.

    Every tensor of the file must match a parameter, and every parameter of the adapter must be in the file. PEFT only
    warns, and the model would answer as its base does.

    Args:
        model: The base model, changed in place.
        folder: The adapter folder. Its files are not looked up on a hub.

    Raises:
        UserError: A tensor is missing, is not part of the model, or has another shape, or adapter_config.json describes
            something gigantic or contains a regular expression that takes too long.
    """
    validate_file_sizes(folder)
    validate_model_files(folder)
    _validate_config(model, folder)
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


def _validate_config(model: Any, folder: Path) -> None:
    """Checks adapter_config.json before PEFT uses it.

    Raises:
        UserError: A setting describes something gigantic, or is a regular expression that takes too long. `field` names
            it.
    """
    file = folder / ADAPTER_CONFIG
    config = read_json(file)
    if not isinstance(config, dict):
        raise UserError("must be a JSON object.", code="invalid-field", file=file)

    def error(field: str, problem: str) -> UserError:
        return UserError(
            f"{problem}. Restore the file, or train the adapter again.", code="adapter-mismatch", file=file, field=field
        )

    for field, value in config.items():
        if isinstance(value, list | dict) and len(value) > MAX_LIST_LENGTH:
            raise error(field, f"has {len(value):,} items, more than {MAX_LIST_LENGTH:,}")
    # No adapter has a rank above the sides of its matrices. PEFT allocates matrices of this rank.
    longest_side = _longest_side(folder / ADAPTER_WEIGHTS)
    for field, rank in _ranks(config):
        if rank > longest_side:
            raise error(field, f"is {rank:,}, but no tensor of {ADAPTER_WEIGHTS} has a side above {longest_side:,}")
    replicated = config.get("layer_replication")
    ranges = [pair for pair in replicated if isinstance(pair, list)] if isinstance(replicated, list) else []
    if any(isinstance(bound, int) and bound > MAX_REPLICATED_LAYERS for pair in ranges for bound in pair):
        raise error("layer_replication", f"replicates more than {MAX_REPLICATED_LAYERS:,} layers")
    iterations = re.fullmatch(r"pissa_niter_(\d+)", str(config.get("init_lora_weights")))
    if iterations and (len(iterations[1]) > 9 or int(iterations[1]) > MAX_ITERATIONS):
        raise error("init_lora_weights", f"has more than {MAX_ITERATIONS} iterations")
    try_patterns(list(_patterns(config, file)), [name for name, _ in model.named_modules()])


def _longest_side(file: Path) -> int:
    """Returns the longest side of the tensors in a safetensors file, according to its header."""
    try:
        with safe_open(file, framework="pt") as tensors:
            shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
    except (OSError, SafetensorError):
        raise UserError("broken weights: the file cannot be read.", code="invalid-model", file=file) from None
    return max((side for shape in shapes for side in shape), default=0)


def _ranks(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yields ``(setting, number)`` of the settings that are sides of matrices."""
    pattern = config.get("rank_pattern")
    ranks = {f"rank_pattern.{name}": rank for name, rank in pattern.items()} if isinstance(pattern, dict) else {}
    for field, value in {**{name: config.get(name) for name in ("r", "num_virtual_tokens")}, **ranks}.items():
        if isinstance(value, int):
            yield field, value


def _patterns(config: Mapping[str, Any], file: Path) -> Iterator[Pattern]:
    """Yields the regular expressions of an adapter's config, as PEFT calls them."""
    for field in ("target_modules", "exclude_modules"):
        if isinstance(config.get(field), str):
            yield Pattern(file, field, "fullmatch", config[field], config[field])
    templates = {
        "modules_to_save": r"(^|.*\.){}($|\..*)",
        "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
        "rank_pattern": r"(.*\.)?({})$",
        "alpha_pattern": r"(.*\.)?({})$",
    }
    for field, template in templates.items():
        items = config.get(field)
        for item in [items] if isinstance(items, str) else items if isinstance(items, list | dict) else ():
            if isinstance(item, str):
                yield Pattern(file, field, "match", item, template.replace("{}", item))


def sort_adapter_config(folder: Path) -> None:
    """Sorts the lists of module names in an adapter's config. PEFT writes sets, in an order that differs by process."""
    config = read_json(folder / ADAPTER_CONFIG)
    for name in ("target_modules", "modules_to_save", "exclude_modules", "target_parameters"):
        if isinstance(config.get(name), list):
            config[name] = sorted(config[name])
    write_json(folder / ADAPTER_CONFIG, config)
