"""Keeps what a frozen vision tower made of an image, so that each image goes through it once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlm_unlearn.errors import UserError
from vlm_unlearn.store import remove_stale_temp_files

LAST = "last"  # the name of a tower's last hidden state beside those of its layers, which are numbers

Features = dict[str, Tensor]  # one image's [tokens, width] by layer


class FeatureCache:
    """Features by the content of the image, at most `limit` bytes in memory or in a folder.

    What this run has asked for stays: epochs ask for all images in turn, and were the longest unused to make room for the next, none
    would be there when it is asked for again. Older files in the folder make room, the longest unused first.

    Args:
        limit: bytes; processes that share a folder count what each of them has asked for or found there.
        folder: keeps them there, for later runs too; it must be named by everything the features depend on: weights, precision, versions.

    Raises:
        UserError: the folder can't be made.
    """

    def __init__(self, limit: int, folder: Path | None = None) -> None:
        self._limit = limit
        self._folder = folder
        self._kept: dict[str, Features] = {}
        self._sizes: dict[str, int] = {}  # longest unused first
        self._asked: set[str] = set()
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"{folder}: no features can be kept there ({error.strerror}); "
                    "let VLM_UNLEARN_CACHE name a folder of yours, or take training.feature_cache=memory"
                ) from error
            with suppress(OSError):  # of a folder that can only be read
                remove_stale_temp_files(folder)
            files = []
            for file in folder.glob("*.safetensors"):
                with suppress(FileNotFoundError):  # another process makes room
                    files.append((file.stat().st_mtime, file.stem, file.stat().st_size))
            self._sizes = {key: size for _, key, size in sorted(files)}
            self._make_room(0)

    def get(self, key: str) -> Features | None:
        """An image's features, or None; in a folder those that another process has put there too."""
        self._asked.add(key)
        found = self._kept.get(key) if self._folder is None else _read(self._folder / f"{key}.safetensors")
        if found is None:
            self._sizes.pop(key, None)
        else:
            self._sizes.setdefault(key, _bytes(found))
        return found

    def put(self, key: str, features: Features) -> None:
        """Keeps the features of an image that was asked for in main memory or on disk, if there is room there."""
        size = _bytes(features)
        if key in self._sizes or not self._make_room(size):
            return
        features = {name: value.cpu() for name, value in features.items()}
        if self._folder is None:
            self._kept[key] = features
        elif not _write(self._folder / f"{key}.safetensors", features):
            return
        self._sizes[key] = size

    def _make_room(self, size: int) -> bool:
        """Whether so many bytes have room, once what this run has not asked for is gone as far as it must."""
        room = self._limit - sum(self._sizes.values()) - size
        for key in [key for key in self._sizes if key not in self._asked] if room < 0 <= self._limit - size else ():
            assert self._folder is not None
            try:
                (self._folder / f"{key}.safetensors").unlink(missing_ok=True)
            except OSError:  # another user's, or on a disk that can only be read
                continue
            room += self._sizes.pop(key)
            if room >= 0:
                break
        return room >= 0


def _bytes(features: Features) -> int:
    return sum(value.numel() * value.element_size() for value in features.values())


def _read(file: Path) -> Features | None:
    try:
        found = load_file(file)
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ):  # never there, torn, or taken away by another process, even while it is opened
        return None
    with suppress(OSError):  # of a file that can only be read
        os.utime(file)
    return found


def _write(file: Path, features: Features) -> bool:
    part = file.with_name(f".{file.stem}.{os.getpid()}.part")
    try:
        save_file(features, part)
        os.replace(part, file)
    except (OSError, SafetensorError):
        part.unlink(missing_ok=True)
        return False
    return True


def cache_vision_features(tower: nn.Module, cache: FeatureCache) -> None:
    """From now on the vision tower runs only images that it has not seen.

    The tower must stay frozen and whole: where it is cut up among processes, all of them must run it together. Calls that give it
    more than one tensor [images, channels, height, width] are left as they are. Features are those of the precision that is asked
    for: autocast's differ.
    """
    run: Any = tower.forward
    last: dict[str, Features] = {}  # a step's reference has the same images, and the cache may have no room for them

    def forward(
        pixel_values: Tensor, output_hidden_states: int | Sequence[int] | bool | None = None, **others: Any
    ) -> Any:
        alone = pixel_values.dim() == 4 and not any(isinstance(value, Tensor) for value in others.values())
        if not alone or isinstance(output_hidden_states, bool):
            return run(pixel_values, output_hidden_states=output_hidden_states, **others)
        layers = _numbers(output_hidden_states)
        asked = f"{layers} {_autocast(pixel_values.device)}"
        keys = [_digest(image, asked) for image in pixel_values]
        found = {
            key: features for key in dict.fromkeys(keys) if (features := last.get(key) or cache.get(key)) is not None
        }
        missing = {key: number for number, key in enumerate(keys) if key not in found}
        for key, number in missing.items():
            # Alone, so that what is beside it in a batch, or was cached before a run went on, changes no bit of it.
            with torch.no_grad():
                outputs = run(pixel_values[number : number + 1], output_hidden_states=output_hidden_states, **others)
            states = {str(layer): outputs.hidden_states[layer] for layer in layers}
            if not layers or -1 in layers:  # some families then read the last state itself, which a norm may set apart
                states[LAST] = outputs.last_hidden_state
            found[key] = {name: value[0].clone() for name, value in states.items()}
            cache.put(key, found[key])
        last.clear()
        last.update(found)
        together = {
            name: torch.stack([found[key][name].to(pixel_values.device) for key in keys]) for name in found[keys[0]]
        }
        return BaseModelOutputWithPooling(
            last_hidden_state=together.get(LAST),
            hidden_states={layer: together[str(layer)] for layer in layers} or None,
        )

    tower.forward = forward


def _numbers(layers: int | Sequence[int] | None) -> list[int]:
    if layers is None:
        return []
    return [layers] if isinstance(layers, int) else list(layers)


def _autocast(device: torch.device) -> torch.dtype | None:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _digest(image: Tensor, asked: str) -> str:
    """Names an image's features by its pixels as the tower gets them, and by what is asked of it."""
    digest = hashlib.blake2b(f"{tuple(image.shape)} {image.dtype} {asked}".encode(), digest_size=16)
    digest.update(image.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
