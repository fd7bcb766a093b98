"""The memory estimate compared with peaks that were measured on a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlm_unlearn.training.estimate import Memory, ModelSize, estimate

MEASURED = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "gpu_memory.json").read_text())["rows"]
VOCABULARY, RANK = 32_000, 64
MATRICES = [(1, 1), (1, 1), (1, 1), (1, 1), (1, 2.6875), (1, 2.6875), (2.6875, 1)]  # of a layer, in hidden sizes


def estimate_row(row: dict[str, Any]) -> Memory:
    hidden, layers = row["hidden_size"], row["layers"]
    widths = [(int(left * hidden), int(right * hidden)) for left, right in MATRICES]
    parameters = layers * sum(left * right for left, right in widths) + 2 * VOCABULARY * hidden
    adapters = layers * RANK * sum(left + right for left, right in widths)
    lora = row["mode"] == "lora"
    size = ModelSize(parameters + lora * adapters, adapters if lora else parameters, hidden, layers, VOCABULARY)
    return estimate(size, row["mode"], "bf16", 8 * 600, 8 * 64, row["checkpointing"], frozen_copy=False)


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: "-".join(str(value) for value in list(row.values())[:4]))
def test_estimate_is_within_5_percent_or_100_mib_of_the_measured_peak(row: dict[str, Any]) -> None:
    assert estimate_row(row).total / 2**20 == pytest.approx(row["measured_mib"], rel=0.05, abs=100)


def test_checkpointing_takes_less_and_states_are_sharded() -> None:
    row = {"hidden_size": 4096, "layers": 32, "mode": "lora"}
    stored, recomputed = (estimate_row({**row, "checkpointing": value}) for value in (False, True))
    assert recomputed.total < stored.total
    assert recomputed.states == stored.states
    assert recomputed.devices(24e9) == 1
    assert stored.devices(80e9) == 1
    assert stored.devices(stored.activations) == 0  # too small even if the states are sharded
