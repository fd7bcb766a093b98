"""The memory that a process can still take, with the limits of control groups."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vlm_unlearn.training import device_memory
from vlm_unlearn.training.device_memory import free_memory


def write_group(folder: Path, names: tuple[str, str, str], limit: str, usage: int, files: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    limit_name, usage_name, files_name = names
    (folder / limit_name).write_text(f"{limit}\n")
    (folder / usage_name).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{files_name} {files}\n")


V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def group_v2(root: Path) -> str:
    write_group(root, V2, "max", 100, 0)
    write_group(root / "job", V2, "1000", 500, 200)  # 700 left
    write_group(root / "job" / "step", V2, "900", 100, 0)  # 800 left
    return "0::/job/step\n"


def group_of_a_container(root: Path) -> str:
    write_group(root, V2, "1000", 400, 100)
    return "0::/somewhere/outside\n"


def group_v1(root: Path) -> str:
    write_group(root / "memory" / "job", V1, "1000", 500, 200)
    return "3:cpu,cpuacct:/job\n2:memory:/job\n1:name=systemd:/\n"


@pytest.mark.parametrize("write", [group_v2, group_of_a_container, group_v1])
def test_free_memory_of_a_cpu_is_that_of_the_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], str]
) -> None:
    own = tmp_path / "cgroup"
    own.write_text(write(tmp_path / "fs"))
    monkeypatch.setattr(device_memory, "CGROUPS", tmp_path / "fs")
    monkeypatch.setattr(device_memory, "OWN_CGROUPS", own)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert free_memory(torch.device("cpu")) == 700
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_memory(torch.device("cpu")) == 350


def test_free_memory_without_control_groups_is_that_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_memory, "OWN_CGROUPS", tmp_path / "missing")
    assert free_memory(torch.device("cpu")) > 2**20
    (tmp_path / "damaged").write_text("0::/\nnonsense\n::::\n")
    monkeypatch.setattr(device_memory, "OWN_CGROUPS", tmp_path / "damaged")
    monkeypatch.setattr(device_memory, "CGROUPS", tmp_path)
    write_group(tmp_path, V2, "a lot", 1, 1)
    assert free_memory(torch.device("cpu")) > 2**20
