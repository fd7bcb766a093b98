"""Writes converted weights as safetensors shards, one tensor in memory at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from vlm_unlearn.modeling.conversion.base import Weight
from vlm_unlearn.modeling.conversion.tensor_files import DTYPE_CODES, byte_view
from vlm_unlearn.store import write_json

SHARD_BYTES = 4 << 30
INDEX = "model.safetensors.index.json"


def shards_of(weights: Sequence[Weight], shard_bytes: int = SHARD_BYTES) -> dict[str, list[Weight]]:
    """Returns the weights of each shard by its file name. The order of the weights is that of reading them."""
    groups: list[list[Weight]] = [[]]
    size = 0
    for weight in weights:
        if groups[-1] and size + weight.info.num_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(weight)
        size += weight.info.num_bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{number:05}-of-{len(groups):05}.safetensors": group for number, group in enumerate(groups, start=1)}


def write_shards(
    folder: Path, weights: Sequence[Weight], shard_bytes: int, progress: Callable[[int, int], None]
) -> list[str]:
    """Writes all shards and their index. A shard that an interrupted run has completed is not written again.

    Args:
        folder: The folder to write to.
        weights: The tensors of the model.
        shard_bytes: The size of a shard. A tensor is never divided.
        progress: Receives the numbers of written bytes and of all bytes.

    Returns:
        The names of the shards.
    """
    shards = shards_of(weights, shard_bytes)
    total = sum(weight.info.num_bytes for weight in weights)
    written = 0
    for name, group in shards.items():
        if not (folder / name).is_file():
            _write_shard(folder / name, group, lambda count, start=written: progress(start + count, total))  # type: ignore[misc]
        written += sum(weight.info.num_bytes for weight in group)
        progress(written, total)
    if len(shards) > 1:
        weight_map = {weight.name: name for name, group in shards.items() for weight in group}
        metadata = {"total_size": total}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
    return list(shards)


def _write_shard(file: Path, weights: Sequence[Weight], progress: Callable[[int], None]) -> None:
    """Writes a shard under another name, and renames it once it is on the disk.

    The header is that of the safetensors format: its length in 8 bytes, and then JSON with types, shapes and offsets.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for weight in weights:
        end = offset + weight.info.num_bytes
        header[weight.name] = {
            "dtype": DTYPE_CODES[weight.dtype],
            "shape": list(weight.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    temporary = file.with_name(f"{file.name}.part")
    with temporary.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        written = 0
        for weight in weights:
            tensor = weight.compute().contiguous()
            assert tuple(tensor.shape) == weight.shape, weight.name
            handle.write(byte_view(tensor))
            written += weight.info.num_bytes
            progress(written)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, file)
