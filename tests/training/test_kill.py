"""A run killed at any point and started again ends with the weights of an uninterrupted one, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import run, run_killing


@pytest.mark.parametrize("trainable", ["{}", "{mode: lora, lora: {r: 4, dropout: 0.1}}"], ids=["full", "lora"])
def test_killed_training_ends_with_the_same_weights(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, trainable: str
) -> None:
    def arguments(name: str) -> list[object]:
        keys = [f"model={tiny_model}", f"data={training_sets['harmful']}", f"output={tmp_path / name}", f"trainable={trainable}"]
        return ["train", "tiny/npo", *keys, "training.max_steps=40", "training.batch_size=2", "training.save_steps=8"]

    done = run(*arguments("whole"))
    assert done.returncode == 0, done.stderr
    run_folder = tmp_path / "killed"
    checkpoints = run_folder / "checkpoints"
    run_killing(
        arguments("killed"),
        [
            (run_folder / "manifest.json").exists,
            (checkpoints / "checkpoint-8").exists,  # half written, most likely
            (checkpoints / "checkpoint-16" / "complete.json").exists,
            (checkpoints / "checkpoint-32" / "complete.json").exists,
        ],
    )
    weights = "model.safetensors" if trainable == "{}" else "adapter_model.safetensors"
    for name in (f"model/{weights}", "log.jsonl", "trainable.json"):
        assert (run_folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not checkpoints.exists()
