"""LoRA matrices in the tensors of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.modeling.conversion.base import LoraPair
from vlm_unlearn.modeling.conversion.names import adapter_part, unwrapped
from vlm_unlearn.modeling.conversion.tensor_files import Stored
from vlm_unlearn.store import read_json

# Settings of PEFT that add more than `scale * B @ A` to a weight, and the values with which they add nothing.
_UNSUPPORTED = {
    "use_dora": (None, False),
    "fan_in_fan_out": (None, False),
    "bias": (None, "none"),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
}


def split_adapters(
    tensors: Mapping[str, Stored], file: Path
) -> tuple[dict[str, tuple[Stored, Stored]], dict[str, Stored]]:
    """Divides the tensors of a checkpoint into LoRA matrices and others, without the prefixes of wrappers.

    Returns:
        The matrices A and B by module, and the other tensors by name.

    Raises:
        UserError: A matrix has no counterpart, or the shapes of two do not fit.
    """
    sides: dict[str, dict[str, Stored]] = {}
    others: dict[str, Stored] = {}
    for name, stored in tensors.items():
        plain = unwrapped(name)
        part = adapter_part(plain)
        if part is None:
            others[plain] = stored
        else:
            sides.setdefault(part[0], {})[part[1]] = stored
    pairs = {}
    for module, matrices in sides.items():
        if set(matrices) != {"A", "B"}:
            raise UserError(
                f"contains only one of the two LoRA matrices of {quoted(module)}. Save the checkpoint again.",
                code="adapter-mismatch",
                file=file,
            )
        a, b = matrices["A"], matrices["B"]
        shapes = a.info.shape, b.info.shape
        if any(len(shape) != 2 for shape in shapes) or shapes[0][0] != shapes[1][1]:
            raise UserError(
                f"contains LoRA matrices of {quoted(module)} with the shapes {shapes[0]} and {shapes[1]}, which do not "
                "fit. Only linear layers are supported.",
                code="adapter-mismatch",
                file=file,
            )
        pairs[module] = (a, b)
    return pairs, others


def read_adapter_scale(file: Path) -> float:
    """Returns the factor of ``B @ A`` according to adapter_config.json.

    Raises:
        UserError: A setting is missing, or is not supported.
    """
    config = read_json(file)

    def error(field: str, problem: str) -> UserError:
        return UserError(problem, code="unsupported-setting", file=file, field=field)

    if not isinstance(config, dict) or config.get("peft_type", "LORA") != "LORA":
        raise error("peft_type", "must be LORA. Merge other adapters with PEFT first.")
    for field, neutral in _UNSUPPORTED.items():
        if config.get(field) not in neutral:
            raise error(field, f"{quoted(config[field])} is not supported. Merge this adapter with PEFT first.")
    numbers: dict[str, float] = {}
    for field in ("r", "lora_alpha"):
        value = config.get(field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
            raise error(field, "must be a positive number. Restore the file.")
        numbers[field] = value
    return lora_scale(numbers["lora_alpha"], numbers["r"], bool(config.get("use_rslora")))


def lora_scale(alpha: float, rank: float, rank_stabilized: bool = False) -> float:
    """Returns the factor of ``B @ A`` (arXiv 2106.09685), or that of rank-stabilized LoRA (arXiv 2312.03732)."""
    return alpha / (math.sqrt(rank) if rank_stabilized else rank)


def as_lora(pairs: Mapping[str, tuple[Stored, Stored]], scale: float) -> dict[str, LoraPair]:
    """Returns the pairs of matrices with their scale."""
    return {module: LoraPair(a, b, scale) for module, (a, b) in pairs.items()}


def describe_rank(pairs: Mapping[str, tuple[Stored, Stored]]) -> Any:
    """Returns the rank of the first pair."""
    return next(iter(pairs.values()))[0].info.shape[0]
