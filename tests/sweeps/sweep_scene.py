"""A sweep of a few steps on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm_unlearn.config import Sweep, validate

OBJECTIVES = {"asr": "min", "degenerate_rate": "min"}


def tiny_sweep(model: Path, data: Path, world: Path, space: dict[str, Any], **changes: Any) -> Sweep:
    """Returns a sweep whose trials take a fraction of a second."""
    training = {"max_steps": 2, "per_device_train_batch_size": 2, "precision": "fp32", **changes.pop("training", {})}
    keys: dict[str, Any] = {
        "recipe": "tiny/npo",
        "overrides": {"model": str(model), "data": str(data), "training": training, **changes.pop("overrides", {})},
        "suite": "suites/tiny",
        "suite_overrides": {"root": str(world), "sample": {"num_questions": 2}, "generation": {"max_new_tokens": 3}},
        "sampler": "grid",
        "space": space,
        "objectives": OBJECTIVES,
    }
    return validate(Sweep, {**keys, **changes}, "sweep.yaml")
