"""The GPU benchmark script, run with a tiny model on the CPU."""

from __future__ import annotations

import importlib
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("gpu")


def run_script(gpu: Any, out: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, Any]:
    monkeypatch.setattr(
        sys, "argv", ["gpu.py", "--shape", "tiny", "--device", "cpu", "--steps", "2", "--out", str(out), *options]
    )
    gpu.main()
    results: dict[str, Any] = json.loads(out.read_text())
    return results


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_gpu_script_both_sides_have_equal_losses(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generation = importlib.import_module("generation")
    cases = [gpu.Case("lora", "npo", 4, rows=8), gpu.Case("full", "gd+pd", 4, rows=4)]
    monkeypatch.setattr(gpu, "CASES", cases)
    monkeypatch.setattr(gpu, "GENERATION_AFTER", 1)
    monkeypatch.setattr(gpu, "DTYPE", torch.float32)  # a CPU can be slow in bf16
    monkeypatch.setattr(gpu.Machine, "computing", lambda _machine: nullcontext())
    monkeypatch.setattr(generation, "NEW_TOKENS", 4)
    results = run_script(gpu, tmp_path / "gpu.json", monkeypatch)
    assert [(row["training"], row["method"], row["rows"]) for row in results["rows"]] == [
        ("lora", "npo", 8),
        ("full", "gd+pd", 4),
    ]
    assert results["left_out"] == []
    assert results["generation"]["greedy"]["times_faster_than_one_by_one"] > 1
    assert results["machine"]["device"] == "cpu"
    for row in results["rows"]:
        assert row["max_loss_difference"] < 1e-4  # of about 6
        assert row["work_ratio"] > 1.2
        assert row["ours"]["utilisation"] is None  # the peak of this device is unknown
        assert row["ours"]["tokens_per_second"] > 0


def test_gpu_script_lists_cases_out_of_time_or_memory(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(machine: Any, side: str, case: Any, checkpointing: bool) -> Any:
        if case.training == "full" or case.method == "kl":
            raise gpu.OutOfTimeError
        if side == "published" and (case.method == "rmu" or not checkpointing):
            raise torch.OutOfMemoryError
        return gpu.Measured([100.0], [1.0], 2.0, None)

    monkeypatch.setattr(gpu, "measure", measure)
    monkeypatch.setattr(gpu, "generate", lambda _machine: {})
    monkeypatch.setattr(gpu.Machine, "cuda", True)
    monkeypatch.setattr(gpu.Machine, "description", lambda _machine: {})
    monkeypatch.setattr(gpu.Machine, "peak", lambda _machine: None)
    results = run_script(gpu, tmp_path / "gpu.json", monkeypatch)
    by_method = {(row["method"], row["attention"]): row for row in results["rows"]}
    npo, rmu = by_method["npo", "sdpa"], by_method["rmu", "sdpa"]
    assert npo["out_of_memory"] == ["published"]
    assert npo["published"]["gradient_checkpointing"]
    assert not npo["ours"]["gradient_checkpointing"]
    assert npo["speedup"] == 1.0
    assert rmu["out_of_memory"] == ["published", "published, checkpointing"]
    assert "speedup" not in rmu
    assert "published" not in by_method["npo", "flex_attention"]
    assert {case["method"] for case in results["left_out"]} == {"kl", "npo", "gd+pd"}
    late = run_script(gpu, tmp_path / "late.json", monkeypatch, "--seconds", "-1")
    assert len(late["left_out"]) == len(gpu.CASES)


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H200 NVL", None), ("NVIDIA L4", None)],
)
def test_peak_is_known_for_listed_devices_only(
    gpu: Any, name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: name)
    assert gpu.Machine(torch.device("cuda"), "7b", 6, 0.0).peak() == peak
