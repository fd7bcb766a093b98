"""A run killed at any point and started again ends with the weights of an uninterrupted one, to the bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from helpers import command, recipe, run, run_killing


@pytest.mark.parametrize("trainable", ["{}", "{mode: lora, lora: {r: 4, dropout: 0.1}}"], ids=["full", "lora"])
def test_killed_training_ends_with_the_same_weights(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, trainable: str
) -> None:
    def arguments(name: str) -> list[object]:
        keys = [
            f"model={tiny_model}",
            f"data={training_sets['harmful']}",
            f"output={tmp_path / name}",
            f"trainable={trainable}",
        ]
        return [
            "train",
            "tiny/npo",
            *keys,
            "training.max_steps=40",
            "training.per_device_train_batch_size=2",
            "training.save_steps=8",
        ]

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


def test_killed_at_random_moments(tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path) -> None:
    """RMU with its control vector, a frozen copy, accumulation and prompt decoupling, killed wherever it falls, from start-up to the
    last save. ``VLM_UNLEARN_KILLS=10`` kills more often than CI does."""

    def arguments(name: str) -> list[object]:
        keys = [
            f"model={tiny_model}",
            f"data={training_sets['safe_eraser']}",
            f"output={tmp_path / name}",
            "prompt_decouple_weight=0.5",
        ]
        steps = [
            "training.max_steps=60",
            "training.per_device_train_batch_size=2",
            "training.gradient_accumulation_steps=2",
            "training.save_steps=3",
        ]
        return ["train", "tiny/rmu", *keys, *steps]

    started = time.monotonic()
    done = run(*arguments("whole"))
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    chance = random.Random()  # another draw each time, named below if the test fails
    fell: list[str] = []

    def compare() -> None:
        for name in ("model/model.safetensors", "model/method_state.safetensors", "log.jsonl"):
            assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), (name, fell)

    while len(fell) < int(os.environ.get("VLM_UNLEARN_KILLS", "3")):
        delay = chance.uniform(0.2, 1.0) * seconds
        process = subprocess.Popen(command(*arguments("killed")), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            found = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").glob("*"))
            fell.append(f"{delay:.2f} s: {found}")
        manifest = tmp_path / "killed" / "manifest.json"
        if manifest.exists() and json.loads(manifest.read_text())["finished"]:  # once more from the start
            compare()
            shutil.rmtree(tmp_path / "killed")
    done = run(*arguments("killed"))
    assert done.returncode == 0, (done.stderr, fell)
    compare()
    print(f"killed {len(fell)} times:", *fell, sep="\n")  # noqa: T201 (seen with -s)


@pytest.mark.parametrize("damage", ["cut weights", "no optimizer", "no state", "empty marker", "no number"])
def test_a_damaged_checkpoint_is_passed_over(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, damage: str
) -> None:
    """The older one is gone on from, to the same weights."""
    from vlm_unlearn.training.runner import run_recipe
    from vlm_unlearn.training.trainer import last_complete_checkpoint

    def stop_at_6(step: int, steps: int, parts: object) -> None:
        if step == 6:
            raise KeyboardInterrupt

    wanted = recipe(
        tiny_model, training_sets["harmful"], tmp_path / "run", "npo", training={"max_steps": 8, "save_steps": 2}
    )
    with pytest.raises(KeyboardInterrupt):
        run_recipe(wanted, stop_at_6)
    newest = last_complete_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert newest.name == "checkpoint-4"
    older = Path(shutil.copytree(newest, newest.with_name("checkpoint-3")))  # stands in for the one before
    (older / "complete.json").write_text(json.dumps({**json.loads((older / "complete.json").read_text()), "step": 3}))
    match damage:
        case "cut weights":
            os.truncate(newest / "trained.safetensors", 100)
        case "no optimizer":
            (newest / "optimizer.pt").unlink()
        case "no state":
            (newest / "trainer_state.json").write_text("")
        case "empty marker":
            (newest / "complete.json").write_text("")
        case "no number":
            (newest.with_name("checkpoint-foo")).mkdir()
            (newest.with_name("checkpoint-foo") / "complete.json").write_text("[]")
    found = last_complete_checkpoint(tmp_path / "run" / "checkpoints")
    assert found == (newest if damage == "no number" else older)
    again = run_recipe(wanted)
    whole = run_recipe(wanted.model_copy(update={"output": tmp_path / "whole"}))
    assert (again / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
