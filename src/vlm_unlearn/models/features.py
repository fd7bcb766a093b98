"""Keeps what a frozen vision tower made of an image, so that each image goes through it once."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

LAST = "last"  # the name of a tower's last hidden state beside those of its layers, which are numbers

Features = dict[str, Tensor]  # one image's [tokens, width] by layer


class FeatureCache:
    """Features by the content of the image, at most `limit` bytes in memory or in a folder; the longest unused go first.

    Args:
        limit: bytes.
        folder: keeps them there, for later runs too; it must be named by everything the features depend on: weights, precision, versions.
    """

    def __init__(self, limit: int, folder: Path | None = None) -> None:
        self._limit = limit
        self._folder = folder
        self._kept: OrderedDict[str, Features] = OrderedDict()
        self._sizes: OrderedDict[str, int] = OrderedDict()  # longest unused first
        self._size = 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            files = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
            self._sizes.update((file.stem, file.stat().st_size) for file in files)
            self._size = sum(self._sizes.values())

    def get(self, key: str) -> Features | None:
        """An image's features, or None."""
        if key not in self._sizes:
            return None
        self._sizes.move_to_end(key)
        if self._folder is None:
            return self._kept[key]
        file = self._folder / f"{key}.safetensors"
        try:
            found = load_file(file)
            os.utime(file)
        except (OSError, SafetensorError):  # another process has made room, or a disk has lost it
            self._size -= self._sizes.pop(key)
            return None
        return found

    def put(self, key: str, features: Features) -> None:
        """Keeps an image's features, and lets go of others where there is no room."""
        size = sum(value.numel() * value.element_size() for value in features.values())
        if size > self._limit or key in self._sizes:
            return
        while self._sizes and self._size + size > self._limit:
            self._drop(next(iter(self._sizes)))
        self._sizes[key] = size
        self._size += size
        if self._folder is None:
            self._kept[key] = features
            return
        part = self._folder / f".{key}.{os.getpid()}.part"
        save_file(features, part)
        os.replace(part, self._folder / f"{key}.safetensors")

    def _drop(self, key: str) -> None:
        self._size -= self._sizes.pop(key)
        self._kept.pop(key, None)
        if self._folder is not None:
            (self._folder / f"{key}.safetensors").unlink(missing_ok=True)


def keep_features(tower: nn.Module, cache: FeatureCache) -> None:
    """From now on the vision tower runs only images that it has not seen.

    The tower must stay frozen and whole: where it is cut up among processes, all of them must run it together. Calls that give it
    more than one tensor [images, channels, height, width] are left as they are.
    """
    run: Any = tower.forward

    def forward(pixel_values: Tensor, output_hidden_states: int | Sequence[int] | bool | None = None, **others: Any) -> Any:
        alone = pixel_values.dim() == 4 and not any(isinstance(value, Tensor) for value in others.values())
        if not alone or isinstance(output_hidden_states, bool):
            return run(pixel_values, output_hidden_states=output_hidden_states, **others)
        layers = (
            []
            if output_hidden_states is None
            else [output_hidden_states]
            if isinstance(output_hidden_states, int)
            else list(output_hidden_states)
        )
        keys = [_content(image) for image in pixel_values]
        found = {key: features for key in keys if (features := cache.get(key)) is not None}
        missing = [number for number, key in enumerate(keys) if key not in found and key not in keys[:number]]
        if missing:
            with torch.no_grad():
                outputs = run(pixel_values[missing], output_hidden_states=output_hidden_states, **others)
            states = {str(layer): outputs.hidden_states[layer] for layer in layers} or {LAST: outputs.last_hidden_state}
            for place, number in enumerate(missing):
                found[keys[number]] = {name: value[place].clone() for name, value in states.items()}
                cache.put(keys[number], {name: value.cpu() for name, value in found[keys[number]].items()})
        together = {name: torch.stack([found[key][name].to(pixel_values.device) for key in keys]) for name in found[keys[0]]}
        return BaseModelOutputWithPooling(
            last_hidden_state=together.get(LAST), hidden_states={layer: together[str(layer)] for layer in layers} or None
        )

    tower.forward = forward


def _content(image: Tensor) -> str:
    """A digest of an image's pixels as the tower gets them."""
    data = image.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(data.tobytes(), digest_size=16, key=str((tuple(image.shape), image.dtype)).encode()).hexdigest()
