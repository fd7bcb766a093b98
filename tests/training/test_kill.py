"""A run that is killed at any point and started again ends with the weights of an uninterrupted run, bitwise."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from fork_server import ForkedProcess
from helpers import recipe, run, run_killing
from vlm_unlearn.training.checkpoints import last_complete_checkpoint
from vlm_unlearn.training.runner import run_recipe

STEPS = {"max_steps": 8, "save_steps": 2}


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("trainable", "defense"),
    [
        ("{}", "[]"),
        ("{mode: lora, lora: {r: 4, lora_dropout: 0.1}}", "[]"),
        ("{}", "[{name: lat, layers: [0, 1], steps: 2}, rs, {name: swa, start_step: 3, interval: 2}]"),
    ],
    ids=["full", "lora", "defended"],
)
def test_run_killed_at_each_stage_ends_with_the_same_weights(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, trainable: str, defense: str
) -> None:
    def arguments(name: str) -> list[object]:
        return [
            "train",
            "tiny/npo",
            f"model={tiny_model}",
            f"data={training_sets['harmful']}",
            f"output={tmp_path / name}",
            f"trainable={trainable}",
            f"defense={defense}",
            "training.max_steps=20",
            "training.per_device_train_batch_size=2",
            "training.save_steps=4",
        ]

    done = run(*arguments("uninterrupted"))
    assert done.returncode == 0, done.stderr
    run_folder = tmp_path / "killed"
    checkpoints = run_folder / "checkpoints"
    run_killing(
        arguments("killed"),
        [
            (run_folder / "manifest.json").exists,
            (checkpoints / "checkpoint-4").exists,  # most likely incomplete
            (checkpoints / "checkpoint-8" / "complete.json").exists,
            (checkpoints / "checkpoint-16" / "complete.json").exists,
        ],
    )
    weights = "model.safetensors" if trainable == "{}" else "adapter_model.safetensors"
    for name in (f"model/{weights}", "log.jsonl", "trainable.json"):
        assert (run_folder / name).read_bytes() == (tmp_path / "uninterrupted" / name).read_bytes(), name
    assert not checkpoints.exists()


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(900)
def test_run_killed_at_random_moments_ends_with_the_same_weights(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    """RMU with its control vector, a frozen copy, accumulation and prompt decoupling, from start-up to the last save.

    ``VLM_UNLEARN_KILLS=10`` kills ten times instead of three. ``VLM_UNLEARN_KILL_SEED`` sets the seed of the moments.
    """

    def arguments(name: str) -> list[object]:
        return [
            "train",
            "tiny/rmu",
            f"model={tiny_model}",
            f"data={training_sets['safe_eraser']}",
            f"output={tmp_path / name}",
            "prompt_decouple_weight=0.5",
            "training.max_steps=30",
            "training.per_device_train_batch_size=2",
            "training.gradient_accumulation_steps=2",
            "training.save_steps=3",
        ]

    started = time.monotonic()
    done = run(*arguments("uninterrupted"))
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    seed = int(os.environ.get("VLM_UNLEARN_KILL_SEED", "0"))
    generator = random.Random(seed)
    history = [f"seed {seed}"]  # shown if the test fails
    kills = 0

    def compare() -> None:
        for name in ("model/model.safetensors", "model/method_state.safetensors", "log.jsonl"):
            killed, uninterrupted = tmp_path / "killed" / name, tmp_path / "uninterrupted" / name
            assert killed.read_bytes() == uninterrupted.read_bytes(), (name, history)

    while kills < int(os.environ.get("VLM_UNLEARN_KILLS", "3")):
        delay = generator.uniform(0.05, 1.0) * seconds
        process = ForkedProcess(arguments("killed"))
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
            checkpoints = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").glob("*"))
            history.append(f"{delay:.2f} s: {checkpoints}")
        manifest = tmp_path / "killed" / "manifest.json"
        if manifest.exists() and json.loads(manifest.read_text())["finished"]:  # start over
            compare()
            shutil.rmtree(tmp_path / "killed")
    done = run(*arguments("killed"))
    assert done.returncode == 0, (done.stderr, history)
    compare()


@pytest.fixture(scope="module")
def interrupted_run(tiny_model: Path, training_sets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended at step 6 of 8, with checkpoint 4 and a copy of it as checkpoint 3. Copy it before use."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"

    def interrupt(step: int, steps: int, terms: object) -> None:
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(tiny_model, training_sets["harmful"], folder, "npo", training=STEPS), interrupt)
    newest = last_complete_checkpoint(folder / "checkpoints")
    assert newest is not None
    assert newest.name == "checkpoint-4"
    older = Path(shutil.copytree(newest, newest.with_name("checkpoint-3")))
    marker = json.loads((older / "complete.json").read_text())
    (older / "complete.json").write_text(json.dumps({**marker, "step": 3}))
    return folder


@pytest.fixture(scope="module")
def uninterrupted_weights(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> bytes:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    result = run_recipe(recipe(tiny_model, training_sets["harmful"], folder, "npo", training=STEPS))
    return (result / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage", ["truncated weights", "no optimizer", "empty state", "empty marker", "foreign marker"]
)
def test_run_with_a_damaged_checkpoint_resumes_from_the_older_one(
    damage: str,
    interrupted_run: Path,
    uninterrupted_weights: bytes,
    tiny_model: Path,
    training_sets: dict[str, Path],
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(interrupted_run, tmp_path / "run"))
    newest, older = folder / "checkpoints" / "checkpoint-4", folder / "checkpoints" / "checkpoint-3"
    match damage:
        case "truncated weights":
            os.truncate(newest / "trained.safetensors", 100)
        case "no optimizer":
            (newest / "optimizer.pt").unlink()
        case "empty state":
            (newest / "trainer_state.json").write_text("")
        case "empty marker":
            (newest / "complete.json").write_text("")
        case "foreign marker":
            newest.with_name("checkpoint-foo").mkdir()
            (newest.with_name("checkpoint-foo") / "complete.json").write_text("[]")
    expected = newest if damage == "foreign marker" else older
    assert last_complete_checkpoint(folder / "checkpoints") == expected
    result = run_recipe(recipe(tiny_model, training_sets["harmful"], folder, "npo", training=STEPS))
    assert (result / "model.safetensors").read_bytes() == uninterrupted_weights
