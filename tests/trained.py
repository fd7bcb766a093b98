"""What tests of training use: methods for models of two layers, and what a training changed."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

RMU = {"name": "rmu", "layer": 0}
RR = {"name": "rr", "layers": [0, 1]}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Those of a model of one file."""
    return load_file(folder / "model.safetensors")


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of the weights that differ."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}
