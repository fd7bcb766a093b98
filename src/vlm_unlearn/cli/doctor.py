"""``vlm-unlearn doctor``: what this machine has, and what is missing for what. It imports none of it, so that it answers at once."""

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

NEEDED = (
    "vlm-unlearn",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
    "openai",
    "rouge-score",
    "plotly",
    "matplotlib",
)
# What is optional: package, what pip installs it by (an extra of this checkout, or its own name), what it is for.
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
ROOM = 5 * 2**30  # bytes of free disk below which a 7B run's first checkpoint may not fit


def doctor(as_json: bool = JSON_OPTION) -> None:
    """Says what this machine has: versions, devices, memory, caches; and how to install what is missing.

    Example:

      vlm-unlearn doctor
    """
    found = diagnosis()
    if as_json:
        print_json(found)
        return
    _print(found)


def diagnosis() -> dict[str, Any]:
    """Versions, devices, memory in bytes, folders, what is missing, and what is wrong."""
    from vlm_unlearn.store import cache_folder

    cache = cache_folder()
    versions = {name: _version(name) for name in NEEDED}
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
        "OPENAI_API_KEY": bool(os.environ.get("OPENAI_API_KEY")),  # whether, never which
        "VLM_UNLEARN_CACHE": os.environ.get("VLM_UNLEARN_CACHE"),
    }
    found = {"versions": versions, "optional": optional, "machine": machine, "folders": folders, "settings": settings}
    return {**found, "problems": _problems(found)}


def _problems(found: dict[str, Any]) -> list[str]:
    """What would go wrong, and the mend."""
    missing = [name for name, installed in found["versions"].items() if installed is None]
    problems = [f"{name} is not installed; pip install -c constraints.txt {name}" for name in missing]
    torch = found["versions"]["torch"] or ""
    gpus = found["machine"]["gpus"]
    if gpus and "+cpu" in torch:
        problems.append(
            f"torch {torch} is a CPU build beside {len(gpus)} GPUs; install the CUDA build of the same version"
        )
    if _version("torchvision") is not None:
        problems.append(
            "torchvision is installed: nothing here needs it, and a build for another torch breaks transformers' models"
        )
    for name, folder in found["folders"].items():
        if folder["free"] is not None and folder["free"] < ROOM:
            problems.append(
                f"{folder['path']} ({name}): {folder['free'] / 2**30:.1f} GiB free; move it with {_MOVED_BY[name]}"
            )
        if not folder["writable"]:
            problems.append(f"{folder['path']} ({name}): can't be written to; move it with {_MOVED_BY[name]}")
    if os.environ.get("WORLD_SIZE", "1") != "1" and "MASTER_ADDR" not in os.environ:
        problems.append("WORLD_SIZE is set without the rest of what torchrun sets; unset it")
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
    """NVIDIA's GPUs as its own tool tells them; none where there is no such tool."""
    import subprocess

    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, errors="replace", timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    cells = ([cell.strip() for cell in line.split(",")] for line in told.splitlines() if line.count(",") == 2)
    return [{"name": name, "memory": _mib(total), "free": _mib(free)} for name, total, free in cells]


def _mib(told: str) -> int | None:
    """Bytes; None where the tool doesn't tell ("[N/A]", as for GPUs that share the machine's memory)."""
    return int(told) * 2**20 if told.isascii() and told.isdecimal() else None


def _folder(path: Path) -> dict[str, Any]:
    """A folder that is there or would be made: the bytes in it and those free, and whether it can be written to."""
    there = next((folder for folder in (path, *path.parents) if folder.is_dir()), None)
    free = shutil.disk_usage(there).free if there is not None else None
    writable = (
        there is not None and (there == path or not path.exists()) and os.access(there, os.W_OK)
    )  # a file may be in the way
    return {
        "path": str(path),
        "used": _used(path),
        "free": free,
        "writable": writable,
    }


def _used(path: Path, seconds: float = 1.0) -> int | None:
    """Bytes of all files below a folder; None where counting them takes too long, as in a cache on a network's disk."""
    end, total = time.monotonic() + seconds, 0
    for folder, _, files in os.walk(path):
        for file in files:
            with suppress(OSError):
                total += os.lstat(os.path.join(folder, file)).st_size
        if time.monotonic() > end:
            return None
    return total


def _print(found: dict[str, Any]) -> None:
    from vlm_unlearn.cli.common import plain
    from vlm_unlearn.errors import printable

    console = result_console()
    machine = found["machine"]
    memory = machine["memory"]
    console.print(
        f"Python {machine['python']} on {plain(machine['platform'])}, {machine['cpus']} CPUs", highlight=False
    )
    console.print(f"memory {_gib(memory['total'])}, {_gib(memory['available'])} available", highlight=False)
    for gpu in machine["gpus"]:
        console.print(f"GPU {plain(gpu['name'])}, {_gib(gpu['memory'])}, {_gib(gpu['free'])} free", highlight=False)
    if not machine["gpus"]:
        console.print("no GPU: the demo and tests need none; a 7B model does", highlight=False)
    console.print()
    for name, installed in found["versions"].items():
        console.print(f"  {name:<14}{installed or 'missing'}", highlight=False)
    console.print()
    for extra in found["optional"]:
        told = extra["version"] or f"not installed; {extra['install']}"
        console.print(f"  {extra['package']:<14}{plain(told)}  ({plain(extra['for'])})", highlight=False)
    console.print()
    for name, folder in found["folders"].items():
        used = "large" if folder["used"] is None else f"holds {_gib(folder['used'])}"
        free = "" if folder["free"] is None else f", {_gib(folder['free'])} free"
        console.print(f"{name}: {plain(folder['path'])}, {used}{free}", highlight=False)
    settings = found["settings"]
    console.print(
        f"OPENAI_API_KEY {'is' if settings['OPENAI_API_KEY'] else 'is not'} set (judges on a server)", highlight=False
    )
    if settings["HF_HUB_OFFLINE"]:
        console.print("HF_HUB_OFFLINE=1: nothing is downloaded", highlight=False)
    for problem in found["problems"]:
        sys.stderr.write(f"problem: {printable(problem)}\n")
    if not found["problems"]:
        console.print("\nNothing is missing that the demo needs: vlm-unlearn demo --out demo", highlight=False)


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
