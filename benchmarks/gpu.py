"""Training steps at the size of LLaVA-1.5-7B on one GPU: this package compared with the published structure, in bf16.

    python benchmarks/gpu.py                              under 8 minutes on a CUDA GPU, without data or network
    python benchmarks/gpu.py --shape tiny --device cpu    the same code in seconds, to test changes of this file

Weights are random and created on the GPU. `lora` has rank 128 and also trains the projector. `full` trains the
projector and the language model, with weights, gradients and AdamW's states in bf16 (8 bytes per parameter, 54 GB).
Float32 states (16 bytes, 108 GB) would leave too little memory for activations. Without adapters or a copy there is
no reference model, so `full` covers only methods that need none in a step.

Utilization is FLOPs per second divided by the device's peak for dense bf16 (`PEAKS`). torch counts the FLOPs
(`FlopCounterMode`): two for each multiplication in a matrix product, convolution or attention, forward and
backward. Masked attention counts in full. The FLOPs are those that each side runs, so redundant work raises the
published side's utilization, but not its tokens per second, which count the tokens of the batches without padding.

Rows are written to benchmarks/results/gpu.json one by one, with the cases that lacked time or memory.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from steps import IMAGE_TOKEN, Batches, Ours, Published, build_prepared_method, make_batches, moved
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from vlm_unlearn.config import TrainableConfig
from vlm_unlearn.models.shapes import PUBLISHED_CONFIGS
from vlm_unlearn.store import package_versions, write_json

RESULTS = Path(__file__).parent / "results" / "gpu.json"
DTYPE = torch.bfloat16
SECONDS = 440  # no case starts after this time
LORA = TrainableConfig.model_validate({"mode": "lora", "projector": True, "lora": {"r": 128, "lora_alpha": 256}})
TRAINABLE = {"lora": LORA, "full": TrainableConfig(mode="full", projector=True)}
PEAKS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA A100": 312e12,
}  # by the start of the device's name
TINY_VOCABULARY = 500
SIDES = ("ours", "published")
CASES = [  # training mode, method, questions per image; the most important first
    ("lora", "npo", 4),
    ("lora", "gd+pd", 4),
    ("lora", "kl", 4),
    ("lora", "rmu", 4),
    ("full", "npo", 4),
    ("full", "gd+pd", 4),
    ("lora", "npo", 1),
]


class OutOfTimeError(Exception):
    """A case cannot be finished in time."""


@dataclass(frozen=True)
class Machine:
    """The device and the limits of the measurement."""

    device: torch.device
    shape: str
    steps: int
    end: float  # in `time.monotonic`

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def computing(self) -> AbstractContextManager[Any]:
        """Returns the autocast context of a step. Each step needs its own, since it caches casts of the weights."""
        return torch.autocast(self.device.type, DTYPE)

    def description(self) -> dict[str, Any]:
        description = {
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            "device": str(self.device),
        }
        if not self.cuda:
            return description
        memory = torch.cuda.get_device_properties(self.device).total_memory
        return {
            **description,
            "device": torch.cuda.get_device_name(self.device),
            "memory_gib": round(memory / 2**30, 1),
            "driver": driver(),
        }

    def peak(self) -> float | None:
        """Returns the FLOPs per second of dense bf16, None for unknown devices such as the slower NVL cards."""
        name = torch.cuda.get_device_name(self.device) if self.cuda else ""
        peaks = (peak for prefix, peak in PEAKS.items() if name.startswith(prefix) and "NVL" not in name)
        return next(peaks, None)


@dataclass
class Measured:
    """The measurements of one side of a case."""

    tokens_per_second: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    flops_per_token: float = 0.0
    memory: int | None = None  # peak in bytes


def driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    return next(
        iter(subprocess.run(query, capture_output=True, text=True, timeout=20, check=False).stdout.splitlines()), None
    )


def config_of(shape: str) -> Any:
    config = PUBLISHED_CONFIGS["llava-hf/llava-1.5-7b-hf"]()
    config.image_token_id = IMAGE_TOKEN
    if shape == "tiny":
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 5, "num_attention_heads": 2}
        config.text_config.update({**sizes, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": TINY_VOCABULARY})
        config.vision_config.update({**sizes, "image_size": 56})
        config.image_seq_length = 16
    return config


def build(machine: Machine) -> Any:
    torch.manual_seed(0)
    with machine.device:
        return AutoModelForImageTextToText.from_config(
            config_of(machine.shape), dtype=DTYPE, attn_implementation="sdpa"
        )


def batches_of(machine: Machine, questions: int) -> list[Batches]:
    """Returns the batches of each step, with token ids of the shape's vocabulary."""
    tokens = config_of(machine.shape).image_seq_length
    steps = [moved(make_batches(number, questions, tokens), machine.device, DTYPE) for number in range(machine.steps)]
    if machine.shape == "tiny":
        for batch in (batch for batches in steps for batch in batches.values()):
            for name in ("input_ids", "labels"):
                batch[name] = torch.where(
                    batch[name] < TINY_VOCABULARY, batch[name], batch[name] % (TINY_VOCABULARY - 10) + 10
                )
    return steps


def tokens_of(batches: Batches, roles: Sequence[str]) -> int:
    return sum(int(batches[role]["attention_mask"].sum()) for role in roles)


def measure(machine: Machine, side: str, training: str, method: str, questions: int) -> Measured:
    """Measures the steps of one side. The first step is not timed, and the last batches run again to count FLOPs.

    Raises:
        OutOfTimeError: The time limit is reached.
        torch.OutOfMemoryError: The device has too little memory.
    """
    gc.collect()
    if machine.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(machine.device)
    steps = batches_of(machine, questions)
    base = build(machine)
    roles = build_prepared_method(method, base).roles
    measured = Measured()
    torch.manual_seed(1)
    with machine.computing():
        runner: Any = (
            Ours(base, method, steps, TRAINABLE[training])
            if side == "ours"
            else Published(base, method, TRAINABLE[training])
        )
    if training == "full":
        runner.model.to(DTYPE)
    for number, batches in enumerate(steps):
        if time.monotonic() > machine.end:
            raise OutOfTimeError
        started = time.perf_counter()
        with machine.computing():
            measured.losses.append(runner.step(batches))  # a float, so the device has finished
        seconds = time.perf_counter() - started
        if number:
            measured.tokens_per_second.append(tokens_of(batches, roles) / seconds)
    measured.memory = torch.cuda.max_memory_allocated(machine.device) if machine.cuda else None
    with machine.computing(), FlopCounterMode(display=False) as counter:
        runner.step(steps[-1])
    measured.flops_per_token = counter.get_total_flops() / tokens_of(steps[-1], roles)
    return measured


def compare(machine: Machine, training: str, method: str, questions: int) -> dict[str, Any]:
    """Returns the row of a case. A side that runs out of memory is listed under ``out_of_memory``.

    Raises:
        OutOfTimeError: The time limit is reached.
    """
    row: dict[str, Any] = {
        "training": training,
        "method": method,
        "questions_per_image": questions,
        "image_tokens": config_of(machine.shape).image_seq_length,
        "steps": machine.steps,
    }
    sides: dict[str, Measured] = {}
    for side in SIDES:
        try:
            sides[side] = measure(machine, side, training, method, questions)
        except torch.OutOfMemoryError:
            row["out_of_memory"] = [*row.get("out_of_memory", []), side]
    peak = machine.peak()
    for side, measured in sides.items():
        rate = statistics.median(measured.tokens_per_second)
        row[side] = {
            "tokens_per_second": rate,
            "flops_per_token": measured.flops_per_token,
            "utilisation": rate * measured.flops_per_token / peak if peak else None,
            "memory_gib": measured.memory / 2**30 if measured.memory else None,
        }
    if len(sides) == len(SIDES):
        ours, published = (sides[side] for side in SIDES)
        ratios = [fast / slow for fast, slow in zip(ours.tokens_per_second, published.tokens_per_second, strict=True)]
        row["speedup"] = statistics.median(ratios)
        row["work_ratio"] = published.flops_per_token / ours.flops_per_token
        row["memory_ratio"] = ours.memory / published.memory if ours.memory and published.memory else None
        row["max_loss_difference"] = max(abs(a - b) for a, b in zip(ours.losses, published.losses, strict=True))
    return row


def show(row: dict[str, Any]) -> None:
    print(f"{row['training']:<5}{row['method']:<7}{row['questions_per_image']} questions", end="")
    for side in SIDES:
        if side in row.get("out_of_memory", []):
            print(f"  {side}: out of memory", end="")
            continue
        utilization, memory = row[side]["utilisation"], row[side]["memory_gib"]
        print(f"  {side}: {row[side]['tokens_per_second']:,.0f} tokens/s", end="")
        print(
            f", {utilization:.0%} of the peak" if utilization else "",
            f", {memory:.0f} GiB" if memory else "",
            sep="",
            end="",
        )
    print(f"  {row['speedup']:.2f}x" if "speedup" in row else "", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("7b", "tiny"), default="7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--steps", type=int, default=6, help="steps per side of a case, at least 2; the first is not timed"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="no case starts after this time")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    machine = Machine(torch.device(options.device), options.shape, options.steps, time.monotonic() + options.seconds)
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    longest = 0.0
    for training, method, questions in CASES:
        started = time.monotonic()
        try:
            if started + longest > machine.end:
                raise OutOfTimeError
            rows.append(compare(machine, training, method, questions))
            show(rows[-1])
        except OutOfTimeError:
            left_out.append(
                {"training": training, "method": method, "questions_per_image": questions, "reason": "out of time"}
            )
        longest = max(longest, time.monotonic() - started)
        results = {
            "machine": machine.description(),
            "shape": machine.shape,
            "versions": package_versions(),
            "rows": rows,
            "left_out": left_out,
        }
        write_json(options.out, results)
    for case in left_out:
        print(
            f"left out, {case['reason']}: {case['training']} {case['method']}, {case['questions_per_image']} questions"
        )


if __name__ == "__main__":
    main()
