"""Plans a conversion and writes it: into a folder that appears once it is complete, resumable after a kill."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout

from vlm_unlearn.errors import UserError, nearest, quoted
from vlm_unlearn.modeling.conversion.base import (
    TEMPLATES,
    CheckpointFormat,
    Conversion,
    ConversionOptions,
    resolve_source,
)
from vlm_unlearn.modeling.conversion.llava_config import LANGUAGE_MODELS, read_config_file
from vlm_unlearn.modeling.conversion.tensor_files import ending_processes
from vlm_unlearn.modeling.conversion.writer import SHARD_BYTES, shards_of, write_shards
from vlm_unlearn.modeling.loader import load_processor, model_folder, model_skeleton
from vlm_unlearn.plugins import CHECKPOINT_FORMATS
from vlm_unlearn.store import (
    digest_json,
    is_recorded,
    package_versions,
    read_json,
    record_outputs,
    user_path,
    write_json,
)

RECORD = ".conversion"  # JSON, without a suffix, so that it is no part of the model's digest
_MODEL_FILES = re.compile(r"\.conversion|[\w.-]+\.(?:safetensors|bin|json|jinja|model|txt|md)")


def plan_conversion(source: str, options: ConversionOptions, format_name: str = "auto") -> Conversion:
    """Reads the headers of a checkpoint, and returns its conversion without writing anything.

    The result reads weights when `write_conversion` writes it. Call both within `ending_processes`.

    Args:
        source: The file, folder or hub name of the checkpoint.
        options: The settings.
        format_name: The name of a format, or ``auto`` to detect it.

    Raises:
        UserError: The format is unknown, or the checkpoint is incomplete, broken or malicious.
    """
    if options.template not in TEMPLATES:
        raise UserError(
            f"unknown template {quoted(options.template)}{nearest(options.template, TEMPLATES) or '.'} Available: "
            f"{', '.join(TEMPLATES)}.",
            code="unknown-name",
            field="--template",
        )
    if options.lora_alpha is not None and not 0 < options.lora_alpha < 1e6:
        raise UserError("must be a positive number.", code="invalid-field", field="--lora-alpha")
    path = resolve_source(source)
    if format_name != "auto":
        return _format(format_name).read(path, options)
    formats = {name: _format(name) for name in CHECKPOINT_FORMATS}
    matching = [name for name, checkpoint_format in formats.items() if checkpoint_format.matches(path)]
    if len(matching) == 1:
        return formats[matching[0]].read(path, options)
    if matching:
        raise UserError(
            f"fits several formats: {', '.join(matching)}. Choose one with --format.",
            code="unknown-format",
            file=path,
            field="--format",
        )
    hint = "Check the path."
    if (path / "adapter_config.json").is_file():
        hint = "An adapter of PEFT needs no conversion. Pass it to evaluate."
    elif (path / "config.json").is_file():
        is_language_model = read_config_file(path).get("model_type") in LANGUAGE_MODELS
        hint = "A folder of transformers needs no conversion. Pass it to train or evaluate."
        hint = "A language model is only the base of a conversion. Pass it as --base." if is_language_model else hint
    summaries = "; ".join(f"{name}: {checkpoint_format.summary}" for name, checkpoint_format in formats.items())
    raise UserError(
        f"has none of the formats that can be converted ({summaries}). {hint}", code="unknown-format", file=path
    )


def _format(name: str) -> CheckpointFormat:
    plugin: Any = CHECKPOINT_FORMATS.load(name, "--format")
    checkpoint_format: CheckpointFormat = plugin()
    return checkpoint_format


def describe(conversion: Conversion, shard_bytes: int = SHARD_BYTES) -> dict[str, Any]:
    """Returns format, size and files of a conversion as JSON."""
    return {
        "format": conversion.format,
        "tensors": len(conversion.weights),
        "merged": sum(weight.lora is not None for weight in conversion.weights),
        "bytes": conversion.num_bytes,
        "dtypes": sorted({str(weight.dtype).removeprefix("torch.") for weight in conversion.weights}),
        "files": list(shards_of(conversion.weights, shard_bytes)),
        "notes": list(conversion.notes),
    }


def write_conversion(
    conversion: Conversion,
    destination: Path,
    options: ConversionOptions,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes a conversion as a model folder.

    The folder appears once it is complete. An interrupted call with the same checkpoint and settings resumes after the
    last complete shard. A complete one is not repeated.

    Args:
        conversion: The conversion.
        destination: The folder to write. It must be empty, missing, or the unchanged result of a conversion.
        options: The settings of the conversion.
        overwrite: Whether another model folder there may be replaced.
        progress: Receives the numbers of written bytes and of all bytes.
        shard_bytes: The size of a shard.

    Returns:
        The absolute path of the folder.

    Raises:
        UserError: The destination contains other files, is part of an input, or cannot be written.
    """
    out = user_path(destination).absolute()
    request = digest_json([_fingerprint(conversion.inputs), asdict(options), shard_bytes, version("vlm-unlearn")])
    _validate_destination(out, conversion.inputs)
    if _is_complete(out, request):
        return out
    if out.exists() and any(out.iterdir()):
        _validate_replaceable(out, overwrite)
    scratch = out.with_name(f".{out.name[:100]}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{scratch}.lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise UserError("another process is writing this folder.", code="run-locked", file=out) from None
    except OSError as error:
        raise UserError(
            f"cannot be created ({error.strerror}). Choose another output folder.", code="output-not-writable", file=out
        ) from None
    try:
        _prepare(scratch, request, conversion.num_bytes)
        files = write_shards(scratch, conversion.weights, shard_bytes, progress)
        conversion.write_files(scratch)
        model_folder(str(scratch))
        model_skeleton(scratch)
        load_processor(scratch)
        record = {"request": request, "format": conversion.format, "files": _sizes(scratch, files)}
        write_json(scratch / RECORD, {**record, "converted_with": package_versions()})
        _replace(scratch, out)
        record_outputs(out.iterdir())
    finally:
        lock.release()
        Path(f"{scratch}.lock").unlink(missing_ok=True)
    return out


def convert(source: str, destination: Path, options: ConversionOptions | None = None, overwrite: bool = False) -> Path:
    """Converts a checkpoint into a model folder of Hugging Face.

    Args:
        source: The file, folder or hub name of the checkpoint.
        destination: The folder to write.
        options: The settings.
        overwrite: Whether another model folder at the destination may be replaced.

    Returns:
        The absolute path of the folder.

    Raises:
        UserError: The checkpoint cannot be converted, or the destination cannot be written.
    """
    options = options or ConversionOptions()
    with ending_processes():
        return write_conversion(plan_conversion(source, options), destination, options, overwrite)


def _fingerprint(inputs: Iterable[Path]) -> list[list[object]]:
    """Returns paths, sizes and times of all input files. Hashing the weights would take as long as converting them."""
    entries: list[list[object]] = []
    for path in inputs:
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.is_file():
                status = file.stat()
                entries.append([str(file.resolve()), status.st_size, status.st_mtime_ns])
    return entries


def _validate_destination(out: Path, inputs: Iterable[Path]) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError("is a link or a file. Choose another output folder.", code="output-exists", file=out)
    for path in inputs:
        folder = path.resolve() if path.is_dir() else path.resolve().parent
        if out.resolve() == folder or folder.is_relative_to(out.resolve()):
            raise UserError(
                "contains an input of the conversion. Choose another output folder.", code="output-exists", file=out
            )


def _validate_replaceable(out: Path, overwrite: bool) -> None:
    """Checks that a folder may be replaced: an unchanged result of a conversion, or with `overwrite` any model.

    Raises:
        UserError: It contains other files, or files that no conversion has written or that have changed since.
    """
    is_model = _is_model_folder(out)
    if is_model and (overwrite or all(is_recorded(path) for path in out.iterdir())):
        return
    problem = "is not empty, and vlm-unlearn has not written it or somebody has changed it since"
    advice = "or pass --overwrite" if is_model else "or move its files away"
    raise UserError(f"{problem}. Choose another output folder, {advice}.", code="output-exists", file=out)


def _is_complete(out: Path, request: str) -> bool:
    """Returns whether a folder is the unchanged result of the same conversion."""
    record = _read_record(out)
    return record.get("request") == request and record.get("files") == _sizes(out, record.get("files") or {})


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record = read_json(folder / RECORD)
    except UserError:
        return {}
    return record if isinstance(record, dict) else {}


def _sizes(folder: Path, names: Iterable[str]) -> dict[str, int]:
    files = {name: folder / name for name in names}
    return {name: file.stat().st_size if file.is_file() else -1 for name, file in files.items()}


def _is_model_folder(folder: Path) -> bool:
    """Returns whether a folder contains the files of a model and nothing else."""
    return (folder / "config.json").is_file() and all(
        path.is_file() and not path.is_symlink() and _MODEL_FILES.fullmatch(path.name) for path in folder.iterdir()
    )


def _prepare(scratch: Path, request: str, num_bytes: int) -> None:
    """Creates the temporary folder, or empties it if it is from another conversion.

    Raises:
        UserError: There is a folder of that name that no conversion has written, or the disk has too little space.
    """
    if scratch.is_symlink() or (scratch.exists() and not (scratch / RECORD).is_file() and any(scratch.iterdir())):
        raise UserError("is in the way. Move it away.", code="output-exists", file=scratch)
    if scratch.exists() and _read_record(scratch).get("request") != request:
        shutil.rmtree(scratch)
    scratch.mkdir(exist_ok=True)
    present = sum(file.stat().st_size for file in scratch.glob("*.safetensors"))
    free = shutil.disk_usage(scratch).free
    if num_bytes - present > free:
        raise UserError(
            f"needs {num_bytes - present:,} bytes, but the disk has {free:,}. Choose another output folder.",
            code="output-not-writable",
            file=scratch,
        )
    write_json(scratch / RECORD, {"request": request})


def _replace(scratch: Path, out: Path) -> None:
    """Moves the complete folder to its destination. A folder there is deleted once the new one is in its place."""
    if not out.exists():
        os.replace(scratch, out)
        return
    previous = out.with_name(f".{out.name[:100]}.{uuid4().hex[:12]}.old")
    os.replace(out, previous)
    os.replace(scratch, out)
    shutil.rmtree(previous, ignore_errors=True)
