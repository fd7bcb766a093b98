"""``vlm-unlearn doctor``: checks the installation and the machine.

It imports none of the packages that it lists, so that it is fast.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlm_unlearn.cli.common import JSON_OPTION, print_json, result_console

REQUIRED = (
    "vlm-unlearn",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
    "openai",
    "rouge-score",
    "matplotlib",
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
    _print(result)


def diagnosis() -> dict[str, Any]:
    """Returns versions, devices, memory in bytes, folders, settings, optional packages, and problems."""
    from vlm_unlearn.store import cache_folder

    cache = cache_folder()
    versions = {name: _version(name) for name in REQUIRED}
    optional = [
        {"package": name, "version": _version(name), "for": purpose, "install": f"pip install '{extra}'"}
        for name, extra, purpose in OPTIONAL
    ]
    machine = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": _memory(),
        "gpus": _gpus(),
    }
    folders = {
        "cache": _folder(cache),
        "hub": _folder(Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")),
    }
    settings = {
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE") == "1",
        "OPENAI_API_KEY": bool(os.environ.get("OPENAI_API_KEY")),  # never the key itself
        "VLM_UNLEARN_CACHE": os.environ.get("VLM_UNLEARN_CACHE"),
    }
    result = {"versions": versions, "optional": optional, "machine": machine, "folders": folders, "settings": settings}
    return {**result, "problems": _problems(result)}


def _problems(result: dict[str, Any]) -> list[str]:
    """Returns the problems of this machine, each with its fix."""
    missing = [name for name, installed in result["versions"].items() if installed is None]
    problems = [f"{name} is not installed; pip install -c constraints.txt {name}" for name in missing]
    torch = result["versions"]["torch"] or ""
    gpus = result["machine"]["gpus"]
    if gpus and "+cpu" in torch:
        problems.append(
            f"torch {torch} is a CPU build, but there are {len(gpus)} GPUs; install the CUDA build of the same version"
        )
    if _version("torchvision") is not None:
        problems.append(
            "torchvision is installed, but not needed; a build for another torch version breaks transformers' models"
        )
    for name, folder in result["folders"].items():
        if folder["free"] is not None and folder["free"] < MIN_FREE_BYTES:
            problems.append(
                f"{folder['path']} ({name}): {folder['free'] / 2**30:.1f} GiB free; move it with {_MOVED_BY[name]}"
            )
        if not folder["writable"]:
            problems.append(f"{folder['path']} ({name}): is not writable; move it with {_MOVED_BY[name]}")
    if os.environ.get("WORLD_SIZE", "1") != "1" and "MASTER_ADDR" not in os.environ:
        problems.append("WORLD_SIZE is set without the other variables of torchrun; unset it")
    return problems


_MOVED_BY = {"cache": "VLM_UNLEARN_CACHE", "hub": "HF_HOME"}


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


def _print(result: dict[str, Any]) -> None:
    from vlm_unlearn.cli.common import escape_markup
    from vlm_unlearn.errors import printable

    console = result_console()
    machine = result["machine"]
    memory = machine["memory"]
    console.print(
        f"Python {machine['python']} on {escape_markup(machine['platform'])}, {machine['cpus']} CPUs", highlight=False
    )
    console.print(f"memory {_gib(memory['total'])}, {_gib(memory['available'])} available", highlight=False)
    for gpu in machine["gpus"]:
        name = escape_markup(gpu["name"])
        console.print(f"GPU {name}, {_gib(gpu['memory'])}, {_gib(gpu['free'])} free", highlight=False)
    if not machine["gpus"]:
        console.print("no GPU: the demo and the tests need none, but a 7B model does", highlight=False)
    console.print()
    for name, installed in result["versions"].items():
        console.print(f"  {name:<14}{installed or 'missing'}", highlight=False)
    console.print()
    for extra in result["optional"]:
        status = escape_markup(extra["version"] or f"not installed; {extra['install']}")
        console.print(f"  {extra['package']:<14}{status}  ({escape_markup(extra['for'])})", highlight=False)
    console.print()
    for name, folder in result["folders"].items():
        used = "large" if folder["used"] is None else f"contains {_gib(folder['used'])}"
        free = "" if folder["free"] is None else f", {_gib(folder['free'])} free"
        console.print(f"{name}: {escape_markup(folder['path'])}, {used}{free}", highlight=False)
    settings = result["settings"]
    console.print(
        f"OPENAI_API_KEY {'is' if settings['OPENAI_API_KEY'] else 'is not'} set (judges on a server)", highlight=False
    )
    if settings["HF_HUB_OFFLINE"]:
        console.print("HF_HUB_OFFLINE=1: downloads are off", highlight=False)
    for problem in result["problems"]:
        sys.stderr.write(f"problem: {printable(problem)}\n")
    if not result["problems"]:
        console.print("\nEverything that the demo needs is installed: vlm-unlearn demo --out demo", highlight=False)


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
