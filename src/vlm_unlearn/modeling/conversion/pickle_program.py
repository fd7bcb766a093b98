"""The program that reads a pickled weights file: loads it with limits and serves its tensors as bytes.

`vlm_unlearn.modeling.conversion.tensor_files` starts it. The file may be malicious, so that only this process unpickles
it, with ``torch.load(weights_only=True)`` and under limits of time and memory. The parent process receives names,
shapes and bytes.

Protocol: a JSON request on the first line of standard input. The answer is a line of JSON, either with ``tensors`` or
with ``code`` and ``reason``. Then each line of standard input is the number of a tensor, and the answer its bytes.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import sys
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO

MEMORY_EXCEEDED = 3  # exit code
MAX_TENSORS = 200_000
MAX_NAME_CHARS = 1_000
MAX_DIMENSIONS = 16


class RejectedError(Exception):
    """The file is not a plain dict of tensors."""


def main() -> None:
    """Serves the tensors of the file that the first line of standard input names."""
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever a library prints is no part of the answers
    request = json.loads(sys.stdin.buffer.readline())
    try:
        import torch  # noqa: F401  (its libraries are no part of the limit)

        _set_memory_limit(request["memory_bytes"])
        _set_timer(request["load_seconds"])
        is_mapped = zipfile.is_zipfile(request["file"])
        tensors = _load(request["file"], is_mapped)
        described = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
        _answer(output, {"tensors": described})
        _set_timer(0)
    except (MemoryError, SystemError):
        raise SystemExit(MEMORY_EXCEEDED) from None
    except RejectedError as error:
        _answer(output, {"code": "invalid-checkpoint", "reason": str(error)})
        return
    except Exception as error:
        text = str(error)
        if "not enough memory" in text or "Cannot allocate memory" in text or "unable to mmap" in text:
            raise SystemExit(MEMORY_EXCEEDED) from None
        unsafe = "weights_only" in text or "Weights only load failed" in text
        _answer(output, {"code": "unsafe-pickle" if unsafe else "invalid-checkpoint", "reason": _reason(text, error)})
        return
    try:
        _serve(list(tensors.values()), output, request["read_seconds"], is_mapped)
    except BrokenPipeError:  # the parent process has ended
        os._exit(0)


def _serve(tensors: list[Any], output: BinaryIO, seconds: float, is_mapped: bool) -> None:
    """Writes the bytes of each tensor whose number is on a line of standard input."""
    import torch

    for line in sys.stdin.buffer:
        _set_timer(seconds)
        stored = tensors[int(line)].detach()
        tensor = stored.contiguous()
        output.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
        output.flush()
        if is_mapped:
            _release(stored)
        _set_timer(0)


def _reason(text: str, error: Exception) -> str:
    """Returns the line of an error that contains its cause. torch's errors begin with advice to turn the check off."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    cause = next((line for line in lines if "Unsupported" in line or "GLOBAL" in line), None)
    return f"{type(error).__name__}: {cause or (lines[0] if lines else '')}"[:300]


def _answer(output: BinaryIO, value: dict[str, Any]) -> None:
    output.write(json.dumps(value).encode() + b"\n")
    output.flush()


def _load(file: str, is_zip: bool) -> dict[str, Any]:
    """Returns the tensors of a file of ``torch.save``, on the CPU. Those of a zip file stay on disk until a read.

    Raises:
        RejectedError: It is not a dict of plain tensors that together are as large as the file.
    """
    import torch

    if is_zip:
        _check_records(file)
    # The tensors are mapped privately, so that nothing changes the file.
    content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    if not isinstance(content, dict) or not content:
        raise RejectedError(f"contains a {type(content).__name__}, not a dict of tensors")
    if len(content) > MAX_TENSORS:
        raise RejectedError(f"contains more than {MAX_TENSORS:,} tensors")
    file_bytes, total = os.path.getsize(file), 0
    for name, tensor in content.items():
        if not isinstance(name, str) or len(name) > MAX_NAME_CHARS:
            raise RejectedError("contains a key that is not the name of a tensor")
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise RejectedError(f"contains a {type(tensor).__name__} under the key {name[:80]!r}, not a tensor")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise RejectedError(f"contains a tensor of a kind that is not supported under the key {name[:80]!r}")
        size = tensor.numel() * tensor.element_size()
        total += size
        # A tensor with strides of 0 claims more than the file contains.
        if tensor.dim() > MAX_DIMENSIONS or size > tensor.untyped_storage().nbytes() or total > 2 * file_bytes:
            raise RejectedError(f"contains a tensor under the key {name[:80]!r} that is larger than its data")
    return content


def _release(tensor: Any) -> None:
    """Lets the system drop the pages of a mapped tensor, so that memory never holds more than a part of the file.

    The pages have not been changed, so that they are read from the file again if they are needed.
    """
    if sys.platform != "linux" or not tensor.numel():
        return
    page = mmap.PAGESIZE
    begin = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page
    if tensor.is_contiguous() and end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def _check_records(file: str) -> None:
    """Checks that the records of a zip file are stored as they are. Compressed ones could fill the memory.

    Raises:
        RejectedError: A record is compressed.
    """
    with zipfile.ZipFile(file) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in _records(archive)):
            raise RejectedError("contains compressed records, which torch.save does not write")


def _records(archive: zipfile.ZipFile) -> Iterator[zipfile.ZipInfo]:
    records = archive.infolist()
    if len(records) > 2 * MAX_TENSORS:
        raise RejectedError(f"contains more than {MAX_TENSORS:,} tensors")
    yield from records


def _set_timer(seconds: float) -> None:
    """Lets the system end this process after some time, even while a library holds the interpreter's lock."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _set_memory_limit(memory_bytes: int) -> None:
    """Limits the address space of this process to its present size and some more bytes."""
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as handle:
            present = int(handle.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):  # on Windows and macOS
        return
    for limit, value in ((resource.RLIMIT_AS, present + memory_bytes), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(limit)[1]
        resource.setrlimit(limit, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


if __name__ == "__main__":
    main()
