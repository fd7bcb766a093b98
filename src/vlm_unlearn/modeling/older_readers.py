"""Adds to an exported model the keys that transformers 4 and vLLM read, next to those of transformers 5.

transformers 5 writes some settings under keys that older releases do not know. They would fail, or silently use their
defaults: another base of the position embeddings, for example.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_unlearn.store import read_json, write_json

INTERNAL_KEYS = ("is_local", "local_files_only", "backend")  # arguments of the call that loaded the tokenizer


def add_older_forms(folder: Path) -> None:
    """Adds the older forms of settings to a model folder. What transformers 5 loads does not change.

    Args:
        folder: The folder that ``save_pretrained`` of the model and the processor wrote.
    """
    write_json(folder / "config.json", _add_to_config(read_json(folder / "config.json")))
    for file in folder.rglob("tokenizer_config.json"):  # InstructBLIP has a second tokenizer in a subfolder
        write_json(file, _add_to_tokenizer_config(read_json(file)))


def _add_to_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a model's config with the settings of rotary position embeddings in their older form."""
    older = dict(config)
    if isinstance(older.get("text_config"), dict):
        older["text_config"] = _with_older_rope(older["text_config"])
    older = _with_older_rope(older)
    if "dtype" in older:
        older.setdefault("torch_dtype", older["dtype"])
    return older


def _with_older_rope(section: Mapping[str, Any]) -> dict[str, Any]:
    older, parameters = dict(section), section.get("rope_parameters")
    if not isinstance(parameters, dict):
        return older
    if isinstance(parameters.get("full_attention"), dict):  # Gemma 3: one per type of layer
        local = parameters.get("sliding_attention") or {}
        if "rope_theta" in local:
            older.setdefault("rope_local_base_freq", local["rope_theta"])
        parameters = parameters["full_attention"]
    if "rope_theta" in parameters:
        older["rope_theta"] = parameters["rope_theta"]
    scaling = {name: value for name, value in parameters.items() if name not in ("rope_theta", "type")}
    if "mrope_section" in scaling and scaling.get("rope_type") == "default":
        scaling = {"type": "mrope", "rope_type": "default", "mrope_section": scaling["mrope_section"]}
    is_default = set(scaling) <= {"rope_type"} and not str(older.get("model_type")).startswith("mllama")
    older["rope_scaling"] = None if is_default else scaling
    return older


def _add_to_tokenizer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a tokenizer's config with a class and special tokens in a form that all releases read."""
    older = {name: value for name, value in config.items() if name not in INTERNAL_KEYS}
    if older.get("tokenizer_class") == "TokenizersBackend":
        older["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(older.get("extra_special_tokens"), list):
        unnamed = older.pop("extra_special_tokens")
        older["additional_special_tokens"] = unnamed
        older["extra_special_tokens"] = older.pop("model_specific_special_tokens", {})
    return older
