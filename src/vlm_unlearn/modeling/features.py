"""Caches the image features of a frozen vision tower, so that each image runs through the tower once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlm_unlearn.errors import UserError
from vlm_unlearn.store import remove_stale_temp_files

LAST_HIDDEN_STATE = "last"  # the key of the tower's output; layers have their number as key

Features = dict[str, Tensor]  # the features of one image, [tokens, width], by layer


class FeatureCache:
    """Features by the content of the image, at most `limit` bytes in memory or in a folder.

    Entries that this run has used are never evicted. Each epoch uses all images in turn, so evicting the least recently
    used entry would evict every entry shortly before its next use. Files of earlier runs are evicted, the least
    recently used first.

    Args:
        limit: The maximum number of bytes. Processes that share a folder each count the entries they have used and the
            files that existed when they started.
        cache_dir: The folder for the features, also those of later runs. Its name must identify everything besides the
            image that the features depend on: weights, precision and library versions. None stores them in main memory.

    Raises:
        UserError: The folder cannot be created.
    """

    def __init__(self, limit: int, cache_dir: Path | None = None) -> None:
        self._limit = limit
        self._cache_dir = cache_dir
        self._memory: dict[str, Features] = {}
        self._sizes: dict[str, int] = {}  # in bytes, the least recently used first
        self._used: set[str] = set()
        if cache_dir is not None:
            try:
                cache_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"the feature cache cannot be created ({error.strerror}). Set VLM_UNLEARN_CACHE to a writable "
                    "folder, or use training.feature_cache=memory.",
                    code="output-not-writable",
                    file=cache_dir,
                ) from error
            with suppress(OSError):  # the folder is read-only
                remove_stale_temp_files(cache_dir)
            files = []
            for file in cache_dir.glob("*.safetensors"):
                with suppress(FileNotFoundError):  # evicted by another process
                    files.append((file.stat().st_mtime, file.stem, file.stat().st_size))
            self._sizes = {key: size for _, key, size in sorted(files)}
            self._make_room(0)

    def get(self, key: str) -> Features | None:
        """Returns the features of an image, or None. A folder may contain features that another process has added."""
        self._used.add(key)
        features = self._memory.get(key) if self._cache_dir is None else _read(self._cache_dir / f"{key}.safetensors")
        if features is None:
            self._sizes.pop(key, None)
        else:
            self._sizes.setdefault(key, _num_bytes(features))
        return features

    def put(self, key: str, features: Features) -> None:
        """Stores the features of an image if there is room for them."""
        size = _num_bytes(features)
        if key in self._sizes or not self._make_room(size):
            return
        features = {name: value.cpu() for name, value in features.items()}
        if self._cache_dir is None:
            self._memory[key] = features
        elif not _write(self._cache_dir / f"{key}.safetensors", features):
            return
        self._sizes[key] = size

    def _make_room(self, size: int) -> bool:
        """Evicts entries unused by this run until `size` bytes fit. Returns whether they do."""
        room = self._limit - sum(self._sizes.values()) - size
        if room >= 0 or size > self._limit:
            return room >= 0
        for key in [key for key in self._sizes if key not in self._used]:
            assert self._cache_dir is not None
            try:
                (self._cache_dir / f"{key}.safetensors").unlink(missing_ok=True)
            except OSError:  # owned by another user, or on a read-only disk
                continue
            room += self._sizes.pop(key)
            if room >= 0:
                break
        return room >= 0


def _num_bytes(features: Features) -> int:
    return sum(value.numel() * value.element_size() for value in features.values())


def _read(file: Path) -> Features | None:
    try:
        features = load_file(file)
    # The file does not exist, is truncated, or another process evicts it while it is opened (a RuntimeError).
    except (OSError, RuntimeError, SafetensorError):
        return None
    with suppress(OSError):  # the file is read-only
        os.utime(file)
    return features


def _write(file: Path, features: Features) -> bool:
    temp_file = file.with_name(f".{file.stem}.{os.getpid()}.part")
    try:
        save_file(features, temp_file)
        os.replace(temp_file, file)
    except (OSError, SafetensorError):
        temp_file.unlink(missing_ok=True)
        return False
    return True


def cache_vision_features(tower: nn.Module, cache: FeatureCache) -> Callable[[], None]:
    """Monkey-patches the vision tower's forward to cache its features per image. Returns a function that undoes it.

    The tower must stay frozen, and must not be sharded: all processes have to run a sharded tower together. Calls that
    pass more tensors than one [images, channels, height, width] are not cached. The cache key contains the image, the
    requested layers and the autocast precision.

    Args:
        tower: The vision tower.
        cache: Stores the features.
    """
    original_forward: Any = tower.forward
    # The features of the previous call. The reference pass of a training step runs the same images as the pass before
    # it, and the cache may have no room for them.
    previous: dict[str, Features] = {}

    def forward(
        pixel_values: Tensor, output_hidden_states: int | Sequence[int] | bool | None = None, **kwargs: Any
    ) -> Any:
        only_images = pixel_values.dim() == 4 and not any(isinstance(value, Tensor) for value in kwargs.values())
        if not only_images or isinstance(output_hidden_states, bool):
            return original_forward(pixel_values, output_hidden_states=output_hidden_states, **kwargs)
        layers = _layer_list(output_hidden_states)
        request = f"{layers} {_autocast_dtype(pixel_values.device)}"
        keys = [_cache_key(image, request) for image in pixel_values]
        features = {
            key: cached for key in dict.fromkeys(keys) if (cached := previous.get(key) or cache.get(key)) is not None
        }
        missing = {key: number for number, key in enumerate(keys) if key not in features}
        for key, number in missing.items():
            # One image at a time: a batch of other size would change the last bits, and with them resumed runs.
            with torch.no_grad():
                image = pixel_values[number : number + 1]
                outputs = original_forward(image, output_hidden_states=output_hidden_states, **kwargs)
            states = {str(layer): outputs.hidden_states[layer] for layer in layers}
            if not layers or -1 in layers:  # families may read `last_hidden_state` for layer -1, and a norm may differ
                states[LAST_HIDDEN_STATE] = outputs.last_hidden_state
            features[key] = {name: value[0].clone() for name, value in states.items()}
            cache.put(key, features[key])
        previous.clear()
        previous.update(features)
        stacked = {
            name: torch.stack([features[key][name].to(pixel_values.device) for key in keys])
            for name in features[keys[0]]
        }
        return BaseModelOutputWithPooling(
            last_hidden_state=stacked.get(LAST_HIDDEN_STATE),
            hidden_states={layer: stacked[str(layer)] for layer in layers} or None,
        )

    def restore() -> None:
        tower.forward = original_forward

    tower.forward = forward
    return restore


@contextmanager
def cached_vision_features(tower: nn.Module, limit: int, folder: Path | None = None) -> Iterator[None]:
    """Caches the features of a vision tower for the duration of the block. Does nothing if the tower is trainable.

    Args:
        tower: The vision tower, which must not be sharded.
        limit: The maximum size of the cache in bytes.
        folder: As in `FeatureCache`.
    """
    if any(parameter.requires_grad for parameter in tower.parameters()):
        yield
        return
    restore = cache_vision_features(tower, FeatureCache(limit, folder))
    try:
        yield
    finally:
        restore()


def _layer_list(layers: int | Sequence[int] | None) -> list[int]:
    if layers is None:
        return []
    return [layers] if isinstance(layers, int) else list(layers)


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _cache_key(image: Tensor, request: str) -> str:
    """Returns the digest of an image's pixels and of the requested outputs."""
    digest = hashlib.blake2b(f"{tuple(image.shape)} {image.dtype} {request}".encode(), digest_size=16)
    digest.update(image.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
