"""Reads the tensors of weight files one after the other, so that memory holds one of them at a time.

A safetensors file is read at the offsets of its header. A pickled file is read by a process with limits
(`vlm_unlearn.modeling.conversion.pickle_program`), which sends the bytes.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.modeling.conversion import pickle_program
from vlm_unlearn.store import read_json, validate_header_size

LOAD_SECONDS = 120.0  # of unpickling, which maps the tensors but does not read them
READ_SECONDS = 600.0  # of a tensor on a slow file system
MEMORY_BYTES = 2 << 30  # beyond the file itself
MAX_PICKLE_BYTES = 64 << 30
MAX_OPEN_PROCESSES = 3  # base, adapter, and the weights next to it
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}


class TensorInfo(NamedTuple):
    """Data type and shape of a tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """The number of bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile(Protocol):
    """A file of named tensors."""

    file: Path

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors by name, without their values."""

    def read(self, name: str) -> torch.Tensor:
        """Returns a tensor on the CPU."""


class Stored(NamedTuple):
    """A tensor in a file."""

    source: TensorFile
    name: str

    @property
    def info(self) -> TensorInfo:
        """Data type and shape."""
        return self.source.tensors[self.name]

    def read(self) -> torch.Tensor:
        """Returns the tensor on the CPU."""
        return self.source.read(self.name)


class SafetensorsFile:
    """A safetensors file.

    Raises:
        UserError: The header is broken, or the file is truncated.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        length = validate_header_size(file)
        try:
            with file.open("rb") as handle:
                handle.seek(8)
                header = json.loads(handle.read(length))
            header.pop("__metadata__", None)
            self._offsets = {
                name: (int(item["data_offsets"][0]), int(item["data_offsets"][1])) for name, item in header.items()
            }
            self.tensors = {
                name: TensorInfo(DTYPES[item["dtype"]], tuple(int(side) for side in item["shape"]))
                for name, item in header.items()
            }
        except KeyError as error:
            raise _broken(file, f"the header has the unknown type or the missing field {quoted(error)}") from None
        except (OSError, ValueError, TypeError, AttributeError, IndexError, RecursionError):
            raise _broken(file, "the header cannot be read") from None
        self._start = 8 + length
        size = file.stat().st_size - self._start
        for name, (begin, end) in self._offsets.items():
            info = self.tensors[name]
            if min((begin, *info.shape)) < 0 or end - begin != info.num_bytes:
                raise _broken(file, f"the header gives {quoted(name)} a wrong size")
            if end > size:
                raise _broken(file, "the file is truncated. Download it again")

    def read(self, name: str) -> torch.Tensor:
        """Returns a tensor on the CPU."""
        info = self.tensors[name]
        buffer = torch.empty(info.num_bytes, dtype=torch.uint8)
        with self.file.open("rb") as handle:
            handle.seek(self._start + self._offsets[name][0])
            _fill(buffer, handle, self.file)
        return buffer.view(info.dtype).reshape(info.shape)


class PickleFile:
    """A file of ``torch.save`` with a dict of tensors, which a process with limits reads.

    Raises:
        UserError: The file is too large, or not a dict of tensors, contains code, or needs too much time or memory.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._process: subprocess.Popen[bytes] | None = None
        size = file.stat().st_size
        if size > MAX_PICKLE_BYTES:
            raise UserError(
                f"has {size:,} bytes, more than {MAX_PICKLE_BYTES:,}. Save the weights in several files.",
                code="file-too-large",
                file=file,
            )
        self.tensors = self._start()
        self._numbers = {name: number for number, name in enumerate(self.tensors)}

    def read(self, name: str) -> torch.Tensor:
        """Returns a tensor on the CPU."""
        if self._process is None and self._start() != self.tensors:
            raise _broken(self.file, "the file has changed while it was read. Run the same command again")
        process = _running(self)
        info = self.tensors[name]
        buffer = torch.empty(info.num_bytes, dtype=torch.uint8)
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.write(b"%d\n" % self._numbers[name])
            process.stdin.flush()
        try:
            _fill(buffer, process.stdout, self.file)
        except UserError:
            raise self._ended(READ_SECONDS) from None
        return buffer.view(info.dtype).reshape(info.shape)

    def _start(self) -> dict[str, TensorInfo]:
        """Starts the process, and returns the tensors of the file."""
        while len(_OPEN) >= MAX_OPEN_PROCESSES:
            _OPEN[0].close()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "MALLOC_ARENA_MAX"), "1"),
            "CUDA_VISIBLE_DEVICES": "",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-P", pickle_program.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        _OPEN.append(self)
        request = {
            "file": str(self.file.resolve()),
            "memory_bytes": self.file.stat().st_size + MEMORY_BYTES,
            "load_seconds": LOAD_SECONDS,
            "read_seconds": READ_SECONDS,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line.endswith(b"\n") else {}
        if "tensors" not in answer:
            raise self._rejected(answer) if answer else self._ended(LOAD_SECONDS)
        tensors = {}
        for name, (dtype, shape) in answer["tensors"].items():
            value = getattr(torch, dtype.removeprefix("torch."), None)
            if value not in DTYPE_CODES:
                self.close()
                raise _broken(self.file, f"{quoted(name)} has the data type {quoted(dtype)}, which is not supported")
            tensors[name] = TensorInfo(value, tuple(shape))
        return tensors

    def _rejected(self, answer: Mapping[str, Any]) -> UserError:
        """Ends the process, and returns the error that it has reported."""
        self.close()
        if answer["code"] == "unsafe-pickle":
            return UserError(
                f"contains more than tensors, and loading it could run code ({quoted(answer['reason'], 200)}). "
                "Do not use this file. Ask its author for weights in safetensors.",
                code="unsafe-pickle",
                file=self.file,
            )
        return _broken(self.file, f"it cannot be loaded ({quoted(answer['reason'], 200)}). Download or save it again")

    def _ended(self, seconds: float) -> UserError:
        """Returns the error of a process that has ended without an answer."""
        assert self._process is not None
        code = self._process.wait()
        self.close()
        if code == -14:  # SIGALRM, the end of the timer
            problem = f"loading it takes more than {seconds:g} s"
        else:
            problem = "loading it takes more memory than the file's size and 2 GB, or crashes"
        return UserError(f"{problem}. Use the original file.", code="resource-limit", file=self.file)

    def close(self) -> None:
        """Ends the process. The next `read` starts another one."""
        process, self._process = self._process, None
        if self in _OPEN:
            _OPEN.remove(self)
        if process is not None:
            process.kill()
            process.communicate()


_OPEN: list[PickleFile] = []  # with a process, the one used longest ago first


def _running(file: PickleFile) -> subprocess.Popen[bytes]:
    """Returns the process of a file, and marks it as the one used last."""
    assert file._process is not None
    _OPEN.remove(file)
    _OPEN.append(file)
    return file._process


@contextmanager
def ending_processes() -> Iterator[None]:
    """Ends the processes of all pickled files when the block ends."""
    try:
        yield
    finally:
        for file in list(_OPEN):
            file.close()


def open_tensor_file(file: Path) -> TensorFile:
    """Opens a weights file by its ending.

    Raises:
        UserError: The file is missing or broken.
    """
    if not file.is_file():
        raise UserError("no such file. Check the path, or download the model again.", code="file-not-found", file=file)
    return PickleFile(file) if file.suffix in PICKLE_SUFFIXES else SafetensorsFile(file)


def weight_files(folder: Path) -> list[Path]:
    """Returns the weight files of a model folder: those of its index, or the single one. Safetensors go first.

    Raises:
        UserError: There are none, or an index names a file that is missing or outside the folder.
    """
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            return _indexed(index, suffix)
        if (folder / f"{stem}{suffix}").is_file():
            return [folder / f"{stem}{suffix}"]
    raise UserError(
        "contains no weights: neither model.safetensors nor pytorch_model.bin, nor an index of several files.",
        code="invalid-model",
        file=folder,
    )


def _indexed(index: Path, suffix: str) -> list[Path]:
    """Returns the files that an index names, in the order of their names."""
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise UserError("must contain a weight_map.", code="invalid-model", file=index, field="weight_map")
    files = []
    for name in sorted(set(names.values())):
        problem = None
        if not name.endswith(suffix):
            problem = f"is not a {suffix} file"
        elif "/" in name or "\\" in name or "\0" in name:
            problem = "is not directly in the model folder. Move the file there"
        elif not (index.parent / name).is_file():
            problem = "is missing. Download the model again"
        if problem:
            raise UserError(f"{quoted(name)} {problem}.", code="invalid-model", file=index, field="weight_map")
        files.append(index.parent / name)
    return files


def open_tensors(files: list[Path]) -> dict[str, Stored]:
    """Returns the tensors of several files by name.

    Raises:
        UserError: A file is broken, or two files contain the same tensor.
    """
    tensors: dict[str, Stored] = {}
    for file in files:
        source = open_tensor_file(file)
        for name in source.tensors:
            if name in tensors:
                raise UserError(
                    f"contains {quoted(name)}, which {tensors[name].source.file.name} contains too. Download the model "
                    "again.",
                    code="invalid-model",
                    file=file,
                )
            tensors[name] = Stored(source, name)
    return tensors


def _fill(buffer: torch.Tensor, stream: Any, file: Path) -> None:
    """Fills a tensor of bytes from a stream.

    Raises:
        UserError: The stream ends too early.
    """
    view = byte_view(buffer)
    position = 0
    while position < len(view):
        count = stream.readinto(view[position:])
        if not count:
            raise _broken(file, "the file is truncated. Download it again")
        position += count


def byte_view(tensor: torch.Tensor) -> memoryview:
    """Returns the bytes of a contiguous tensor on the CPU, without copying them."""
    content: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(content)


def _broken(file: Path, problem: str) -> UserError:
    return UserError(f"broken weights: {problem}.", code="invalid-model", file=file)
