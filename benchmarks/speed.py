"""Training steps of this package compared with the published structure: speed, peak memory and losses of every method.

    make bench          every method, size and growth: fifty minutes on two cores
    make bench-quick    the smallest size, under four minutes
    python benchmarks/speed.py --table    prints the results of the last `make bench` as a Markdown table for the docs

Both sides get the same batches and run their steps in turn in one process, so that noise of the machine affects
both. The speedup is the median of the steps' ratios in the last epoch. Memory is measured in a separate process per
side, as the peak above the memory of Python and its libraries. Rows are written one by one to
benchmarks/results/latest.json, or to part.json next to it if only some cases run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "latest.json"
PART = RESULTS.with_name("part.json")
MAIN = ("npo", "gd+pd", "kl", "rmu")
THREADS = 2


@dataclass(frozen=True)
class Case:
    method: str
    size: str = "15M"
    questions_per_image: int = 4
    image_tokens: int = 144
    steps: int = 6  # each with different images
    epochs: int = 2


QUICK = [*(Case(method, epochs=1) for method in MAIN), Case("npo", questions_per_image=1, epochs=1)]


def cases() -> list[Case]:
    """Returns the cases of a full run: those of the README first, then growth, other methods and the largest size."""
    from steps import METHODS

    published = [
        Case(method, "53M", questions, steps=10)
        for method, questions in (*((method, 4) for method in MAIN), ("npo", 1))
    ]
    growth = [*(Case("npo", questions_per_image=questions) for questions in (1, 2, 8)), Case("npo", image_tokens=576)]
    data = [Case("npo", steps=steps, epochs=3) for steps in (4, 16)]
    other_methods = [Case(method) for method in METHODS if method not in MAIN]
    large = [Case(method, "160M") for method in ("npo", "gd+pd")]
    return [*published, *(Case(method) for method in MAIN), *growth, *other_methods, *large, *data]


def compare(case: Case) -> dict[str, Any]:
    """Runs the same steps from the same weights on both sides and returns the row of the case.

    The medians are over the last epoch, which is typical of a longer run, and exclude the very first step.
    """
    import torch
    from steps import SIZES, Ours, Published, build, make_batches
    from torch.utils.flop_counter import FlopCounterMode

    published = [make_batches(number, case.questions_per_image, case.image_tokens) for number in range(case.steps)]
    ours = [{role: dict(batch) for role, batch in batches.items()} for batches in published]
    torch.manual_seed(1)
    our_runner = Ours(build(SIZES[case.size], case.image_tokens), case.method, ours)
    torch.manual_seed(1)
    published_runner = Published(build(SIZES[case.size], case.image_tokens), case.method)
    times: list[tuple[float, float]] = []
    losses: list[tuple[float, float]] = []
    for fast, slow in list(zip(ours, published, strict=True)) * case.epochs:
        started = time.perf_counter()
        loss = our_runner.step(fast)
        between = time.perf_counter()
        losses.append((loss, published_runner.step(slow)))
        times.append((between - started, time.perf_counter() - between))
    timed = times[-case.steps :] if case.epochs > 1 else times[1:]
    ratios = [slow / fast for fast, slow in timed]
    seconds = statistics.median(fast for fast, _ in timed)
    roles = our_runner.method.requirements.roles
    samples = sum(len(published[0][role]["input_ids"]) for role in roles)
    tokens = sum(int(batches[role]["attention_mask"].sum()) for batches in published for role in roles) / case.steps
    our_seconds, published_seconds = (sum(side) for side in zip(*times, strict=True))

    def product_flops(_target: list[int], left: list[int], right: list[int], **_: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    # By default, the product that adds to a tensor in place is not counted.
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product_flops}) as work:
        our_runner.step(ours[-1])
    with FlopCounterMode(display=False) as published_work:
        published_runner.step(published[-1])
    return {
        **asdict(case),
        "speedup": statistics.median(ratios),
        "speedup_lowest": min(ratios),
        "speedup_highest": max(ratios),
        "seconds": seconds,
        "published_seconds": statistics.median(slow for _, slow in timed),
        "samples_per_second": samples / seconds,
        "tokens_per_second": tokens / seconds,
        "run_seconds": our_runner.preparation_seconds
        + our_seconds,  # including the reference values computed before the first step
        "run_speedup": published_seconds / (our_runner.preparation_seconds + our_seconds),
        "work_ratio": published_work.get_total_flops()
        / work.get_total_flops(),  # floating-point operations, independent of the machine
        "max_loss_difference": max(abs(a - b) for a, b in losses),
        "first_loss": losses[0][0],
        "last_loss": losses[-1][0],
    }


def peak(side: str, case: Case) -> None:
    """Prints the peak memory in MiB of some steps of one side, above that of an idle process."""
    import torch
    from steps import SIZES, Ours, Published, build, make_batches

    from vlm_unlearn.store import peak_memory_mb

    torch.set_num_threads(THREADS)
    steps = [make_batches(number, case.questions_per_image, case.image_tokens) for number in range(2)]
    idle = peak_memory_mb()
    base = build(SIZES[case.size], case.image_tokens)
    runner: Any = Ours(base, case.method, steps) if side == "ours" else Published(base, case.method)
    for batches in steps:
        runner.step(batches)
    print(peak_memory_mb() - idle)


def memory(case: Case) -> dict[str, float]:
    """Returns the peak memory of both sides."""
    # With this threshold, the allocator returns blocks of 64 KiB or more at once, so that the peak counts only
    # memory in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "HF_HUB_OFFLINE": "1"}
    processes = {}
    for side in ("ours", "published"):
        command = [sys.executable, "-W", "ignore", __file__, "--peak", side, json.dumps(asdict(case))]
        processes[side] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    peaks = {side: float(process.communicate()[0].split()[-1]) for side, process in processes.items()}
    return {
        "memory_mb": round(peaks["ours"]),
        "published_memory_mb": round(peaks["published"]),
        "memory_ratio": peaks["ours"] / peaks["published"],
    }


def machine() -> dict[str, Any]:
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def show(row: dict[str, Any]) -> None:
    case = f"{row['method']:<10} {row['size']:>5} {row['questions_per_image']:>2} questions {row['image_tokens']:>4}"
    rate = f"{row['samples_per_second']:6.1f} samples/s {row['tokens_per_second']:7.0f} tokens/s"
    steps = f"{row['speedup_lowest']:.2f}-{row['speedup_highest']:.2f}"
    speedup = f"{row['speedup']:5.2f}x ({steps}, run {row['run_speedup']:.2f})"
    ratios = f"work {row['work_ratio']:.1f}x  memory {row['memory_ratio']:.2f}  loss {row['max_loss_difference']:.0e}"
    print(f"{case} tokens  {rate}  {speedup}  {ratios}", flush=True)


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "method": lambda row: f"`{row['method']}`",
    "model": lambda row: row["size"],
    "questions an image": lambda row: f"{row['questions_per_image']}",
    "image tokens": lambda row: f"{row['image_tokens']}",
    "steps × epochs": lambda row: f"{row['steps']} × {row['epochs']}",
    "samples/s": lambda row: f"{row['samples_per_second']:.1f}",
    "times faster": lambda row: f"**{row['speedup']:.1f}** ({row['speedup_lowest']:.1f}–{row['speedup_highest']:.1f})",
    "whole run": lambda row: f"{row['run_speedup']:.1f}",
    "less work": lambda row: f"{row['work_ratio']:.1f}",
    "memory": lambda row: f"{row['memory_ratio']:.2f}",
    "losses differ by": lambda row: f"{row['max_loss_difference']:.0e}",
}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows as the Markdown table of docs/performance.md."""
    return markdown(list(COLUMNS), [[cell(row) for cell in COLUMNS.values()] for row in rows])


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Returns a table with text in the first column and numbers in the others."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---", *["---:"] * (len(heads) - 1)], *lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="measure the smallest size only")
    parser.add_argument("--method", help="measure this method only")
    parser.add_argument("--size", help="measure this size only")
    parser.add_argument("--out", type=Path, help="the results file, also of --table")
    parser.add_argument(
        "--table", action="store_true", help="print the results file as a Markdown table, without measuring"
    )
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        peak(options.peak[0], Case(**json.loads(options.peak[1])))
        return
    if options.table:
        print(table(json.loads((options.out or RESULTS).read_text())["rows"]))
        return

    import torch

    from vlm_unlearn.store import package_versions, write_json

    out = options.out or (PART if options.quick or options.method or options.size else RESULTS)
    torch.set_num_threads(THREADS)
    rows: list[dict[str, Any]] = []
    for case in QUICK if options.quick else cases():
        if options.method in (None, case.method) and options.size in (None, case.size):
            rows.append({**compare(case), **memory(case)})
            show(rows[-1])
            write_json(out, {"machine": machine(), "threads": THREADS, "versions": package_versions(), "rows": rows})


if __name__ == "__main__":
    main()
