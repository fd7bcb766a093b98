"""``vlm-unlearn doctor``: checks the installation and the machine.

It imports none of the packages that it lists, so that it is fast.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlm_unlearn.cli.common import JSON_OPTION, print_json, result_console
from vlm_unlearn.errors import printable

REQUIRED = (
    *("vlm-unlearn", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "openai"),
    *("rouge-score", "matplotlib"),
)
# Optional packages: name, argument of pip install (an extra of this checkout, or the name), and purpose.
OPTIONAL = (
    ("deepspeed", ".[deepspeed]", "training with ZeRO-3 (recipes/engines/zero3.yaml)"),
    ("vllm", ".[vllm]", "generation.backend=vllm"),
    ("bitsandbytes", ".[quantization]", "trainable.mode=qlora"),
    ("num2words", ".[smolvlm]", "models of the family SmolVLM"),
    ("flash-attn", "flash-attn", "training.attn_implementation=flash_attention_2"),
    ("tensorboard", "tensorboard", "training.report_to=[tensorboard]"),
    ("wandb", "wandb", "training.report_to=[wandb]"),
    ("trackio", "trackio", "training.report_to=[trackio]"),
)
MIN_FREE_BYTES = 5 * 2**30  # with less free disk space, the first checkpoint of a 7B run may not fit


def doctor(as_json: bool = JSON_OPTION) -> None:
    """Prints the versions, devices, memory and caches of this machine, and how to install missing packages.

    Example:

      vlm-unlearn doctor
    """
    result = diagnosis()
    if as_json:
        print_json(result)
        return
    console = result_console()
    for line in _lines(result):
        console.print(printable(line), markup=False, highlight=False)
    for problem in result["problems"]:
        sys.stderr.write(f"problem: {printable(problem)}\n")


def diagnosis() -> dict[str, Any]:
    """Returns versions, devices, memory in bytes, folders, settings, optional packages, and problems."""
    from vlm_unlearn.store import cache_folder

    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    result = {
        "versions": {name: _version(name) for name in REQUIRED},
        "optional": [
            {"package": name, "version": _version(name), "for": purpose, "install": f"pip install '{extra}'"}
            for name, extra, purpose in OPTIONAL
        ],
        "machine": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory": _memory(),
            "gpus": _gpus(),
        },
        "folders": {"cache": _folder(cache_folder()), "hub": _folder(hub)},
        "settings": {
            "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE") == "1",
            "OPENAI_API_KEY": bool(os.environ.get("OPENAI_API_KEY")),  # never the key itself
            "VLM_UNLEARN_CACHE": os.environ.get("VLM_UNLEARN_CACHE"),
        },
    }
    return {**result, "problems": _problems(result)}


def _problems(result: dict[str, Any]) -> list[str]:
    """Returns the problems of this machine, each with its fix."""
    versions, gpus = result["versions"], result["machine"]["gpus"]
    rules = [
        *(
            (installed is None, f"{name} is not installed; pip install -c constraints.txt {name}")
            for name, installed in versions.items()
        ),
        (
            gpus and "+cpu" in (versions["torch"] or ""),
            f"torch {versions['torch']} is a CPU build, but there are {len(gpus)} GPUs; install the CUDA build of the "
            "same version",
        ),
        (
            _version("torchvision") is not None,
            "torchvision is installed, but not needed; a build for another torch version breaks transformers' models",
        ),
    ]
    for name, variable in (("cache", "VLM_UNLEARN_CACHE"), ("hub", "HF_HOME")):
        folder = result["folders"][name]
        title, fix, free = f"{folder['path']} ({name})", f"move it with {variable}", folder["free"]
        rules += [
            (free is not None and free < MIN_FREE_BYTES, f"{title}: {_gib(free)} free; {fix}"),
            (not folder["writable"], f"{title}: is not writable; {fix}"),
        ]
    several = os.environ.get("WORLD_SIZE", "1") != "1" and "MASTER_ADDR" not in os.environ
    rules.append((several, "WORLD_SIZE is set without the other variables of torchrun; unset it"))
    return [text for applies, text in rules if applies]


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _memory() -> dict[str, int]:
    import psutil

    memory = psutil.virtual_memory()
    return {"total": int(memory.total), "available": int(memory.available)}


def _gpus() -> list[dict[str, Any]]:
    """Returns the GPUs that nvidia-smi lists, or an empty list without nvidia-smi."""
    import subprocess

    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, errors="replace", timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    cells = ([cell.strip() for cell in line.split(",")] for line in output.splitlines() if line.count(",") == 2)
    return [{"name": name, "memory": _mib(total), "free": _mib(free)} for name, total, free in cells]


def _mib(text: str) -> int | None:
    """Converts MiB to bytes. The result is None for "[N/A]", as for GPUs that share the machine's memory."""
    return int(text) * 2**20 if text.isascii() and text.isdecimal() else None


def _folder(path: Path) -> dict[str, Any]:
    """Returns the used and free bytes of a folder that may not exist yet, and whether it is writable."""
    existing = next((folder for folder in (path, *path.parents) if folder.is_dir()), None)
    free = shutil.disk_usage(existing).free if existing is not None else None
    blocked = path.exists() and not path.is_dir()  # by a file
    return {
        "path": str(path),
        "used": _used(path),
        "free": free,
        "writable": existing is not None and not blocked and os.access(existing, os.W_OK),
    }


def _used(path: Path, seconds: float = 1.0) -> int | None:
    """Returns the bytes of all files below a folder, or None if counting takes too long, as on a network disk."""
    end, total = time.monotonic() + seconds, 0
    for folder, _, files in os.walk(path):
        for file in files:
            with suppress(OSError):
                total += os.lstat(os.path.join(folder, file)).st_size
        if time.monotonic() > end:
            return None
    return total


def _lines(result: dict[str, Any]) -> Iterator[str]:
    """Yields the lines of a diagnosis, without its problems."""
    machine, settings = result["machine"], result["settings"]
    yield f"Python {machine['python']} on {machine['platform']}, {machine['cpus']} CPUs"
    yield f"memory {_gib(machine['memory']['total'])}, {_gib(machine['memory']['available'])} available"
    for gpu in machine["gpus"]:
        yield f"GPU {gpu['name']}, {_gib(gpu['memory'])}, {_gib(gpu['free'])} free"
    if not machine["gpus"]:
        yield "no GPU: the demo and the tests need none, but a 7B model does"
    yield ""
    for name, installed in result["versions"].items():
        yield f"  {name:<14}{installed or 'missing'}"
    yield ""
    for extra in result["optional"]:
        status = extra["version"] or f"not installed; {extra['install']}"
        yield f"  {extra['package']:<14}{status}  ({extra['for']})"
    yield ""
    for name, folder in result["folders"].items():
        used = "large" if folder["used"] is None else f"contains {_gib(folder['used'])}"
        free = "" if folder["free"] is None else f", {_gib(folder['free'])} free"
        yield f"{name}: {folder['path']}, {used}{free}"
    yield f"OPENAI_API_KEY {'is' if settings['OPENAI_API_KEY'] else 'is not'} set (judges on a server)"
    if settings["HF_HUB_OFFLINE"]:
        yield "HF_HUB_OFFLINE=1: downloads are off"
    if not result["problems"]:
        yield ""
        yield "Everything that the demo needs is installed: vlm-unlearn demo --out demo"


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
