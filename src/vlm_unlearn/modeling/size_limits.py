"""Bounds on the sizes that the files of a model folder describe, checked before anything of that size is built."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.nn.modules import module as torch_module

from vlm_unlearn.data.processor_call import MAX_PIXELS, Processor, image_sides
from vlm_unlearn.errors import UserError
from vlm_unlearn.store import read_json

MB = 1 << 20
# Published models stay below a tenth of these sizes, apart from vocabularies, which reach 40 MB.
MAX_FILE_BYTES = {
    "config.json": 4 * MB,
    "generation_config.json": 4 * MB,
    "processor_config.json": 4 * MB,
    "preprocessor_config.json": 4 * MB,
    "video_preprocessor_config.json": 4 * MB,
    "adapter_config.json": 4 * MB,
    "chat_template.json": 4 * MB,
    "tokenizer_config.json": 64 * MB,
}
MAX_BYTES_BY_SUFFIX = {".jinja": MB, ".json": 256 * MB, ".model": 256 * MB, ".txt": 256 * MB}
MAX_LIST_LENGTH = 10_000
# transformers builds lists of these lengths from a config.
MAX_LAYERS = 30_000
_LAYER_KEY = re.compile(r"layers?|depths?|blocks?|stages?|experts?|labels")
MAX_MODULES = 20_000  # modules and parameters of a model, of which 5,000 to 10,000 are built in a second
MAX_BUFFER_NUMBERS = 1 << 28
MAX_IMAGE_TOKENS = 65_536
_TOKEN_KEY = re.compile(r"seq_len|seq_length|num_\w*tokens")
MAX_EDGE = 5_792  # the edge of a square of MAX_PIXELS
MAX_TILE_PIXELS = 1 << 26  # of all tiles of an image together
_SIZE_KEYS = ("size", "crop_size", "pad_size", "max_image_size", "min_size", "tile_size", "min_pixels", "max_pixels")
# The image processor repeats a tile this many times at most.
_TILE_KEYS = ("max_image_tiles", "max_patches", "min_patches", "pan_and_scan_max_num_crops", "max_slice_nums")


def validate_file_sizes(folder: Path) -> None:
    """Checks that no file of a model folder but the weights is far larger than those of published models.

    Raises:
        UserError: A file is too large.
    """
    for file in [*folder.glob("*"), *folder.glob("*/*.jinja"), *folder.glob("*/tokenizer*.json")]:
        limit = MAX_FILE_BYTES.get(file.name, MAX_BYTES_BY_SUFFIX.get(file.suffix))
        if limit is not None and file.is_file() and file.stat().st_size > limit:
            raise UserError(
                f"has {file.stat().st_size:,} bytes, more than {limit:,}. Use the model's original file.",
                code="file-too-large",
                file=file,
            )


def validate_config_sizes(folder: Path) -> None:
    """Checks the numbers of layers and labels in config.json, of which transformers builds lists.

    Raises:
        UserError: A number is too large. `field` names it.
    """
    validate_file_sizes(folder)
    for key, value in _integers(_read(folder / "config.json")):
        if value > MAX_LAYERS and _LAYER_KEY.search(key.rpartition(".")[2]):
            raise _too_large(folder / "config.json", key, value, MAX_LAYERS)


def validate_processor_sizes(folder: Path) -> None:
    """Checks the lists and the numbers of image tokens in the files of a processor, before it is loaded.

    Raises:
        UserError: A list is too long or a number too large. `field` names it.
    """
    validate_file_sizes(folder)
    for name in ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
        content = _read(folder / name)
        for key, value in _integers(content):
            if value > MAX_IMAGE_TOKENS and _TOKEN_KEY.search(key.rpartition(".")[2]):
                raise _too_large(folder / name, key, value, MAX_IMAGE_TOKENS)
        for key, items in _lists(content):
            if len(items) > MAX_LIST_LENGTH:
                raise UserError(
                    f"has {len(items):,} items, more than {MAX_LIST_LENGTH:,}. Use the model's original file.",
                    code="invalid-model",
                    file=folder / name,
                    field=key,
                )


def validate_image_sizes(processor: Processor, folder: Path) -> None:
    """Checks the sizes to which a processor resizes, crops or pads every image.

    Args:
        processor: The processor.
        folder: The model folder, for error messages.

    Raises:
        UserError: An image would have too many pixels. `field` names the setting.
    """
    image_processor = getattr(processor, "image_processor", None)
    # In these classes, the edges of a size are numbers of pixels.
    edges_are_pixels = hasattr(type(image_processor), "temporal_patch_size")
    largest_tile = 1
    for name in _SIZE_KEYS:
        sides = image_sides(getattr(image_processor, name, None))
        for key, value in sides.items():
            is_area = "pixels" in (name + key) or (edges_are_pixels and key.endswith("_edge"))
            limit = MAX_PIXELS if is_area else MAX_EDGE
            if value > limit:
                raise _too_large(folder, f"{name}.{key}" if key else name, value, limit)
        largest_tile = max(largest_tile, sides.get("height", 1) * sides.get("width", 1))
    for name in _TILE_KEYS:
        count = getattr(image_processor, name, None)
        if isinstance(count, int) and count * largest_tile > MAX_TILE_PIXELS:
            raise _too_large(folder, name, count, max(1, MAX_TILE_PIXELS // largest_tile))
    pinpoints = getattr(image_processor, "image_grid_pinpoints", None)
    for sides in pinpoints if isinstance(pinpoints, list | tuple) else ():
        if all(isinstance(side, int) for side in sides) and math.prod(sides) > MAX_PIXELS:
            raise _too_large(folder, "image_grid_pinpoints", math.prod(sides), MAX_PIXELS)


@contextmanager
def limited_modules(num_tensors: int, file: str | Path) -> Iterator[None]:
    """Within the block, building a model of far more modules than its weight files can fill raises an error.

    Args:
        num_tensors: The number of tensors in the weight files, 0 if they are unknown.
        file: The model folder, for the error message.

    Raises:
        UserError: The model has too many modules.
    """
    limit, count = MAX_MODULES + 20 * num_tensors, 0

    def add(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > limit:
            raise UserError(
                f"config.json describes a model of more than {limit:,} modules and weights, but the weight files "
                f"contain {num_tensors:,} tensors. Check the numbers of layers in config.json.",
                code="invalid-model",
                file=file,
            )

    handles = [
        torch_module.register_module_module_registration_hook(add),
        torch_module.register_module_parameter_registration_hook(add),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def validate_buffers(skeleton: Any, file: Path) -> None:
    """Checks the size of the buffers of a model on the meta device. No weight file contains most of them.

    Raises:
        UserError: The buffers would fill the memory.
    """
    for name, buffer in skeleton.named_buffers():
        if buffer.numel() > MAX_BUFFER_NUMBERS:
            raise UserError(
                f"config.json describes a table of {buffer.numel():,} numbers ({name}), more than "
                f"{MAX_BUFFER_NUMBERS:,}. Check the sizes in config.json.",
                code="invalid-model",
                file=file,
            )


def _too_large(file: Path, key: str, value: int, limit: int) -> UserError:
    return UserError(
        f"is {value:,}, more than {limit:,}. Use the model's original file.", code="invalid-model", file=file, field=key
    )


def _read(file: Path) -> Any:
    return read_json(file) if file.is_file() else None


def _integers(value: Any) -> Iterator[tuple[str, int]]:
    """Yields ``(dotted key, number)`` of every integer in a JSON value."""
    for key, item in _items(value):
        if isinstance(item, int) and not isinstance(item, bool):
            yield key, item


def _lists(value: Any) -> Iterator[tuple[str, list[Any]]]:
    """Yields ``(dotted key, list)`` of every list in a JSON value."""
    for key, item in _items(value):
        if isinstance(item, list):
            yield key, item


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """Yields ``(dotted key, value)`` of all nested values. The items of a list have the key of the list."""
    stack: list[tuple[str, Any]] = [("", value)]
    while stack:
        key, item = stack.pop()
        yield key, item
        if isinstance(item, dict):
            stack += [(f"{key}.{name}" if key else name, child) for name, child in item.items()]
        elif isinstance(item, list):
            stack += [(key, child) for child in item]
