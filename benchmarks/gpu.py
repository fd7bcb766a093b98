"""Training steps at the size of LLaVA-1.5-7B on one GPU: this package compared with the published structure, in bf16.

    python benchmarks/gpu.py                              under 8 minutes on a CUDA GPU, without data or network
    python benchmarks/gpu.py --shape tiny --device cpu    the same code in seconds, to test changes of this file

Weights are random and created on the GPU. `lora` has rank 128 and also trains the projector. `full` trains the
projector and the language model, with weights, gradients and AdamW's states in bf16 (8 bytes per parameter, 54 GB).
Float32 states (16 bytes, 108 GB) would leave too little memory for activations. Without adapters or a copy there is
no reference model, so `full` covers only methods that need none in a step.

The published side runs with gradient checkpointing, as its scripts do, only where it needs more memory than the device
has. Neither side uses cuDNN's attention: its preparation for new shapes would dominate the few steps of a case, and the
PyTorch versions of the published code did not have it.

Utilization is FLOPs per second divided by the device's peak for dense bf16 (`PEAKS`). torch counts the FLOPs
(`FlopCounterMode`): two for each multiplication in a matrix product, convolution or attention, forward and backward.
Ours counts no masked scores between a prefix and its suffixes, whether computed or not. The published side's redundant
work counts, and raises its utilization but not its tokens per second: these count the tokens of the batches without
padding, once.

Rows are written to benchmarks/results/gpu.json one by one, with the cases that lacked time or memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from steps import IMAGE_TOKEN, Batches, Ours, Published, build_prepared_method, make_batches, moved
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from generation import compare_k_shot
from vlm_unlearn.config import TrainableConfig
from vlm_unlearn.modeling import packing
from vlm_unlearn.modeling.attention import without_cudnn_attention
from vlm_unlearn.modeling.shapes import PUBLISHED_CONFIGS
from vlm_unlearn.modeling.shared_attention import SegmentedAttention
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


@dataclass(frozen=True)
class Case:
    """A comparison of both sides, or of ours only with another attention implementation."""

    training: str
    method: str
    questions_per_image: int
    rows: int = 16  # questions of each role in a step
    attention: str = "sdpa"

    @property
    def sides(self) -> Sequence[str]:
        return SIDES if self.attention == "sdpa" else SIDES[:1]


CASES = [  # the most important first
    Case("lora", "npo", 4),
    Case("lora", "npo", 4, attention="flex_attention"),
    Case("lora", "npo", 4, rows=4),
    Case("lora", "gd+pd", 4, rows=4),
    Case("full", "npo", 4, rows=4),
    Case("lora", "kl", 4, rows=4),
    Case("lora", "rmu", 4, rows=4),
    Case("lora", "npo", 1, rows=4),
    Case("full", "gd+pd", 4, rows=4),
]
GENERATION_AFTER = 3  # cases


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


def build(machine: Machine, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    implementations = {"text_config": attention, "vision_config": "sdpa"}
    with machine.device:
        return AutoModelForImageTextToText.from_config(
            config_of(machine.shape), dtype=DTYPE, attn_implementation=implementations
        )


def batches_of(machine: Machine, questions: int, rows: int) -> list[Batches]:
    """Returns the batches of each step, with token ids of the shape's vocabulary."""
    tokens = config_of(machine.shape).image_seq_length
    steps = [
        moved(make_batches(number, questions, tokens, rows), machine.device, DTYPE) for number in range(machine.steps)
    ]
    if machine.shape == "tiny":
        for batch in (batch for batches in steps for batch in batches.values()):
            for name in ("input_ids", "labels"):
                batch[name] = torch.where(
                    batch[name] < TINY_VOCABULARY, batch[name], batch[name] % (TINY_VOCABULARY - 10) + 10
                )
    return steps


def tokens_of(batches: Batches, roles: Sequence[str]) -> int:
    return sum(int(batches[role]["attention_mask"].sum()) for role in roles)


def measure(machine: Machine, side: str, case: Case, checkpointing: bool = False) -> Measured:
    """Measures the steps of one side. The first step is not timed, and the last batches run again to count FLOPs.

    Raises:
        OutOfTimeError: The time limit is reached.
        torch.OutOfMemoryError: The device has too little memory.
    """
    gc.collect()
    if machine.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(machine.device)
    steps = batches_of(machine, case.questions_per_image, case.rows)
    base = build(machine, case.attention)
    roles = build_prepared_method(case.method, base).requirements.roles
    measured = Measured()
    torch.manual_seed(1)
    with machine.computing():
        runner: Any = (
            Ours(base, case.method, steps, TRAINABLE[case.training])
            if side == "ours"
            else Published(base, case.method, TRAINABLE[case.training])
        )
    if case.training == "full":
        runner.model.to(DTYPE)
    if checkpointing:
        runner.model.train()
        runner.model.enable_input_require_grads()
        runner.model.activation_checkpointing_enable({"use_reentrant": False})
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
    if case.attention == "sdpa":
        measured.flops_per_token = count_flops(machine, runner, steps[-1]) / tokens_of(steps[-1], roles)
    return measured


def count_flops(machine: Machine, runner: Ours | Published, batches: Batches) -> int:
    """Runs a step and counts its FLOPs. Returns 0 if the device has too little memory for that."""
    build_segmented = patch.object(packing, "describe_packed_sequence", segmented)
    try:
        with build_segmented, machine.computing(), FlopCounterMode(display=False) as counter:
            runner.step(batches)
    except torch.OutOfMemoryError:
        return 0  # seen on the published side with gradient checkpointing
    return counter.get_total_flops()


def segmented(segment_ids: torch.Tensor, device: torch.device) -> SegmentedAttention:
    """Returns the attention that computes no masked scores, for counting FLOPs."""
    return SegmentedAttention.build(segment_ids).to(device)


def measure_with_enough_memory(machine: Machine, side: str, case: Case, row: dict[str, Any]) -> Measured | None:
    """Measures a side. One that needs too much memory is measured again with gradient checkpointing.

    Returns:
        None if the device has too little memory for both. What ran out of memory is added to the row.

    Raises:
        OutOfTimeError: The time limit is reached.
    """
    for checkpointing in (False, True):
        try:
            measured = measure(machine, side, case, checkpointing)
            row[side] = {"gradient_checkpointing": checkpointing}
            return measured
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)
            row.setdefault("out_of_memory", []).append(f"{side}, checkpointing" if checkpointing else side)
    return None


def compare(machine: Machine, case: Case) -> dict[str, Any]:
    """Returns the row of a case.

    Raises:
        OutOfTimeError: The time limit is reached.
    """
    tokens = config_of(machine.shape).image_seq_length
    row: dict[str, Any] = {**asdict(case), "image_tokens": tokens, "steps": machine.steps}
    sides: dict[str, Measured] = {}
    for side in case.sides:
        measured = measure_with_enough_memory(machine, side, case, row)
        if measured is not None:
            sides[side] = measured
    peak = machine.peak()
    for side, measured in sides.items():
        rate = statistics.median(measured.tokens_per_second)
        counted = measured.flops_per_token > 0
        row[side] |= {
            "tokens_per_second": rate,
            "flops_per_token": measured.flops_per_token if counted else None,
            "utilisation": rate * measured.flops_per_token / peak if peak and counted else None,
            "memory_gib": measured.memory / 2**30 if measured.memory else None,
        }
    if len(sides) == len(SIDES):
        ours, published = (sides[side] for side in SIDES)
        ratios = [fast / slow for fast, slow in zip(ours.tokens_per_second, published.tokens_per_second, strict=True)]
        row["speedup"] = statistics.median(ratios)
        counted = ours.flops_per_token and published.flops_per_token
        row["work_ratio"] = published.flops_per_token / ours.flops_per_token if counted else None
        row["memory_ratio"] = ours.memory / published.memory if ours.memory and published.memory else None
        differences = [abs(a - b) for a, b in zip(ours.losses, published.losses, strict=True)]
        row["first_loss"] = ours.losses[0]
        row["first_loss_difference"], row["max_loss_difference"] = differences[0], max(differences)
    return row


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['training']:<5}{row['method']:<7}{row['rows']:>2} rows, {row['questions_per_image']} an image, "
        f"{row['attention']}:",
        end="",
    )
    for side in SIDES:
        if "tokens_per_second" not in row.get(side, {}):
            continue
        utilization, memory = row[side]["utilisation"], row[side]["memory_gib"]
        print(f"  {side}: {row[side]['tokens_per_second']:,.0f} tokens/s", end="")
        print(f", {utilization:.0%} of the peak" if utilization else "", end="")
        print(f", {memory:.0f} GiB" if memory else "", end="")
        print(" with checkpointing" if row[side]["gradient_checkpointing"] else "", end="")
    print(f"  {row['speedup']:.2f}x" if "speedup" in row else "", end="")
    print(f"  out of memory: {', '.join(row['out_of_memory'])}" if "out_of_memory" in row else "", flush=True)


def generate(machine: Machine) -> dict[str, Any]:
    """Compares generation with prefix sharing and answer by answer, for rewrites and samples of one question."""
    model = build(machine).eval()
    with without_cudnn_attention():
        return compare_k_shot(model, config_of(machine.shape).image_seq_length, repetitions=2, temperatures=[0.0])


def conditions(machine: Machine) -> dict[str, Any]:
    return {"machine": machine.description(), "shape": machine.shape, "versions": package_versions()}


def case_of(row: Mapping[str, Any]) -> Case:
    return Case(**{name.name: row[name.name] for name in fields(Case)})


def earlier_results(
    machine: Machine, file: Path, cases: Sequence[Case]
) -> tuple[list[dict[str, Any]], dict[str, Any] | None, list[dict[str, Any]]]:
    """Returns the file's rows, generation and cases left out, without the cases to measure now.

    All are empty if there is no file or it is from other conditions.
    """
    earlier = json.loads(file.read_text()) if file.exists() else {}
    if any(earlier.get(name) != value for name, value in conditions(machine).items()):
        return [], None, []
    rows, left_out = ([row for row in earlier[name] if case_of(row) not in cases] for name in ("rows", "left_out"))
    return rows, earlier["generation"], left_out


def save(
    machine: Machine,
    file: Path,
    rows: list[dict[str, Any]],
    generation: dict[str, Any] | None,
    left_out: list[dict[str, Any]],
) -> None:
    ordered = sorted(rows, key=lambda row: CASES.index(case_of(row)))
    write_json(file, {**conditions(machine), "rows": ordered, "generation": generation, "left_out": left_out})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("7b", "tiny"), default="7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--steps", type=int, default=6, help="steps per side of a case, at least 2; the first is not timed"
    )
    parser.add_argument(
        "--cases",
        type=int,
        nargs="+",
        choices=range(len(CASES)),
        default=range(len(CASES)),
        metavar="N",
        help="the cases to measure, from 0; the rows of others in a file of the same device and versions are kept",
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="no case starts after this time")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    machine = Machine(torch.device(options.device), options.shape, options.steps, time.monotonic() + options.seconds)
    cases = [CASES[number] for number in options.cases]
    rows, generation, left_out = earlier_results(machine, options.out, cases)
    longest = 0.0
    for case in cases:
        if case.attention == "flex_attention" and not machine.cuda:
            left_out.append({**asdict(case), "reason": "FlexAttention computes no gradients on a CPU"})
            continue
        started = time.monotonic()
        try:
            if started + longest > machine.end:
                raise OutOfTimeError
            with without_cudnn_attention():
                rows.append(compare(machine, case))
            show(rows[-1])
        except OutOfTimeError:
            left_out.append({**asdict(case), "reason": "out of time"})
        longest = max(longest, time.monotonic() - started)
        save(machine, options.out, rows, generation, left_out)
        if case == CASES[GENERATION_AFTER - 1] and generation is None and time.monotonic() < machine.end:
            gc.collect()
            generation = generate(machine)
            save(machine, options.out, rows, generation, left_out)
    for left in left_out:
        print(f"left out: {left}")


if __name__ == "__main__":
    main()
