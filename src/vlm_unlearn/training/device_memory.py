"""The memory that a training process can still take: that of its GPU, or that of the machine or of its container."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")  # the control groups of this process


def free_memory(device: torch.device) -> int:
    """Returns the bytes that this process can still take on a device.

    On a CPU this is the available memory of the machine, or of a control group (a container or a cluster's job) of this
    process if that is less, divided by the number of processes of the run on this machine.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    import psutil

    available = [int(psutil.virtual_memory().available), *_cgroup_memory()]
    return min(available) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _cgroup_memory() -> Iterator[int]:
    """Yields the bytes that each control group of this process leaves, of those that have a limit.

    Files that the kernel keeps in memory count as free, since it drops them when memory is short.
    """
    try:
        lines = OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:  # number:controllers:path
        _, controllers, path = line.split(":", 2) if line.count(":") >= 2 else ("", "none", "")
        if not controllers:  # version 2
            root, limit, usage, files = CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage = CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            files = "total_inactive_file"
        else:
            continue
        group = root / path.strip("/")
        # In a container, the path can be that outside of it. The group of the process is then the root.
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(root))):
            try:
                statistics = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
                used = int((folder / usage).read_text()) - int(statistics.get(files, 0))
                yield max(0, int((folder / limit).read_text()) - used)
            except (OSError, ValueError):  # missing, or "max" for no limit
                continue
