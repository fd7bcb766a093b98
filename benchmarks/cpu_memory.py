"""Compares the memory estimate of training steps without gradient checkpointing with peaks on a CPU in float32.

    OMP_NUM_THREADS=1 python benchmarks/cpu_memory.py

Each configuration runs two steps in a process of its own. The peak is the resident memory of the second step, above
that of the process before it builds the model. Writes benchmarks/results/cpu_memory.json.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
from itertools import product
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "cpu_memory.json"
WIDTH, LAYERS = 256, 8
MODES = (("full", 0.0), ("lora", 0.0), ("lora", 0.05))  # and the dropout of the adapters
METHODS = ("gd", "kl")
IMAGE_TOKENS, ROWS = 144, 16


def resident(field: str) -> int:
    """Returns the resident memory of this process in bytes, ``VmRSS`` now or ``VmHWM`` at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def trim() -> None:
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def measure(mode: str, dropout: float, method: str) -> dict[str, Any]:
    """Returns the peak of a step and its estimate, in MiB."""
    import torch
    from steps import Ours, Size, build, make_batches

    from vlm_unlearn.config import TrainableConfig
    from vlm_unlearn.modeling.batch_merge import merge_batches
    from vlm_unlearn.modeling.packing import packing_of
    from vlm_unlearn.training.estimate import COMPARED_LOGITS, estimate, model_size

    torch.set_num_threads(1)
    warm = Ours(build(Size(64, 2, 64, 1), IMAGE_TOKENS), method, [make_batches(0, 1, IMAGE_TOKENS, 1)])
    warm.step(make_batches(0, 1, IMAGE_TOKENS, 1))  # loads libraries
    del warm
    batches = [make_batches(number, 1, IMAGE_TOKENS, ROWS) for number in range(2)]
    trim()
    start = resident("VmRSS")
    lora = {"r": 16, "lora_dropout": dropout}
    trainable = TrainableConfig.model_validate({"mode": mode, "projector": True, "lora": lora})
    ours = Ours(build(Size(WIDTH, LAYERS, WIDTH, 2), IMAGE_TOKENS), method, batches, trainable)
    if method == "kl" and mode == "full":
        from vlm_unlearn.training.references import FrozenCopyReference

        ours.reference = FrozenCopyReference(ours.model)
    ours.model.train()
    ours.step(batches[0])
    trim()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    ours.step(batches[1])
    peak = resident("VmHWM") - start
    roles = [batches[1][role] for role in ours.method.requirements.roles]
    merged = merge_batches(roles)
    packing = packing_of(ours.vlm, merged)
    tokens = merged["input_ids"].numel() if packing is None else len(packing.segments.prefix)
    full_logits = set(ours.method.requirements.full_logit_roles)
    logit_tokens = 0
    for role in ours.method.requirements.roles:
        ids, labels = batches[1][role]["input_ids"], batches[1][role]["labels"]
        count = ids.numel() if role in full_logits else int((labels >= 0).sum())
        logit_tokens += count * (COMPARED_LOGITS if method == "kl" and role == "retain" else 1)
    frozen_copy = method == "kl" and mode == "full"
    memory = estimate(model_size(ours.vlm), mode, "fp32", tokens, logit_tokens, False, frozen_copy)
    return {
        "mode": mode,
        "dropout": dropout,
        "method": method,
        "measured_mib": round(peak / 2**20, 1),
        "estimated_mib": round(memory.total / 2**20, 1),
        "ratio": round(memory.total / peak, 3),
    }


def main() -> None:
    rows = []
    context = multiprocessing.get_context("spawn")
    for (mode, dropout), method in product(MODES, METHODS):
        with context.Pool(1) as pool:
            rows.append(pool.apply(measure, (mode, dropout, method)))
        print(rows[-1], flush=True)
        RESULTS.write_text(
            json.dumps({"width": WIDTH, "layers": LAYERS, "image_tokens": IMAGE_TOKENS, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
