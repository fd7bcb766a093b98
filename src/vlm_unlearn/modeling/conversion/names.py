"""Names of tensors: those of LLaVA's code, of models on the hub, and of training libraries' wrappers."""

from __future__ import annotations

import re

# Wrappers of DeepSpeed, DDP, torch.compile and PEFT around the trained model.
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.|base_model\.model\.)")
_ADAPTER = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?!weight$)[\w-]+)?(?:\.weight)?$")
# Constants that older releases of transformers saved.
_BUFFERS = re.compile(r"(?:^|\.)(?:rotary_emb\.inv_freq|position_ids)$")
_VISION_TOWER = "model.vision_tower.vision_tower."
_PROJECTOR = "model.mm_projector."
_PROJECTOR_LAYERS = {"0": "linear_1", "2": "linear_2"}


def unwrapped(name: str) -> str:
    """Returns the name of a tensor without the prefixes of wrappers, and without PEFT's ``base_layer``."""
    while match := _WRAPPERS.match(name):
        name = name[match.end() :]
    return name.replace(".base_layer.", ".").replace("._checkpoint_wrapped_module.", ".")


def adapter_part(name: str) -> tuple[str, str] | None:
    """Returns the module and the side (``A`` or ``B``) of a LoRA matrix, or None for another tensor."""
    match = _ADAPTER.match(name)
    return None if match is None else (match["module"], match["side"])


def is_buffer(name: str) -> bool:
    """Returns whether a tensor is a constant, which transformers computes itself."""
    return _BUFFERS.search(name) is not None


def canonical(name: str) -> str:
    """Returns a name that is the same in all releases of transformers.

    Examples: ``language_model.model.norm.weight`` and ``model.language_model.norm.weight`` are both
    ``language_model.norm.weight``.
    """
    name = re.sub(r"^model\.(?=(?:language_model|vision_tower|vision_model|multi_modal_projector)\.)", "", name)
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    name = re.sub(r"^language_model\.model\.", "language_model.", name)
    return re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", name)


def hub_name(name: str) -> str:
    """Returns the name of a tensor or module of LLaVA's code in a LLaVA of the hub.

    A name that LLaVA's code does not have is returned as it is.
    """
    if name.startswith(_VISION_TOWER):
        return "vision_tower." + name.removeprefix(_VISION_TOWER)
    if name.startswith(_PROJECTOR):
        number, _, rest = name.removeprefix(_PROJECTOR).partition(".")
        if number in _PROJECTOR_LAYERS and rest:
            return f"multi_modal_projector.{_PROJECTOR_LAYERS[number]}.{rest}"
        if not rest:  # a projector of one layer
            return f"multi_modal_projector.linear_1.{number}"
        return name
    if name.startswith(("model.layers.", "model.embed_tokens.", "model.norm.")):
        return f"language_model.{name}"
    return f"language_model.{name}" if name.startswith("lm_head.") else name
