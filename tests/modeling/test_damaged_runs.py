"""The commands train, evaluate, export and compare reject a run whose weights are damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finished_runs import ANSWER, REFUSAL, make_run
from helpers import error_code, run_in_process
from vlm_unlearn.store import write_json

WEIGHTS = "adapter_model.safetensors"
TRAINING = ("training.max_steps=2", "training.per_device_train_batch_size=4", "training.warmup_ratio=0")
LORA = ("trainable.mode=lora", "trainable.lora.r=2", "trainable.lora.target_modules=[q_proj]")


@pytest.fixture(scope="module")
def trained(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A function that returns the folder of a finished run by its mode. `train` runs again in the same folder."""
    folder = tmp_path_factory.mktemp("trained")
    runs: dict[str, Path] = {}

    def run(mode: str) -> Path:
        if mode not in runs:
            runs[mode] = folder / mode
            assert run_in_process(*train_command(runs[mode], tiny_model, training_sets)).returncode == 0
        return runs[mode]

    return run


def train_command(run: Path, model: Path, training_sets: dict[str, Path]) -> tuple[object, ...]:
    keys = (f"model={model}", f"data={training_sets['harmful']}", f"output={run}")
    return ("train", "tiny/gd", *keys, *TRAINING, *(LORA if run.name == "lora" else ()))


def edit_tensors(model: Path, edit: Callable[[dict[str, Any], str], object]) -> None:
    tensors = load_file(model / WEIGHTS)
    edit(tensors, min(name for name in tensors if "lora_B" in name))
    save_file(tensors, model / WEIGHTS)


def rename_tensor(model: Path) -> None:
    edit_tensors(model, lambda tensors, name: tensors.update({f"{name}_old": tensors.pop(name)}))


def remove_tensor(model: Path) -> None:
    edit_tensors(model, lambda tensors, name: tensors.pop(name))


def name_a_pickle(model: Path) -> None:
    torch.save({"x": torch.ones(1)}, model / "pytorch_model.bin")
    write_json(model / "model.safetensors.index.json", {"weight_map": {"x": "pytorch_model.bin"}})


FAULTS = {
    "one renamed tensor": (rename_tensor, "lora", "adapter-mismatch"),
    "one missing tensor": (remove_tensor, "lora", "adapter-mismatch"),
    "an index that names a pickle": (name_a_pickle, "full", "invalid-model"),
}


@pytest.mark.parametrize("command", ["train", "train from it", "evaluate", "export", "compare"])
@pytest.mark.parametrize("fault", FAULTS)
def test_command_rejects_damaged_weights(
    fault: str,
    command: str,
    trained: Callable[[str], Path],
    tiny_model: Path,
    training_sets: dict[str, Path],
    world: Path,
    tmp_path: Path,
) -> None:
    damage, mode, code = FAULTS[fault]
    run = Path(shutil.copytree(trained(mode), tmp_path / mode))
    out = tmp_path / "out"
    commands: dict[str, tuple[object, ...]] = {
        "train": train_command(run, tiny_model, training_sets),
        "train from it": train_command(out, run / "model", training_sets),
        "evaluate": ("evaluate", "suites/tiny", f"model={run}", f"root={world}", "--out", out),
        "export": ("export", run, "--out", out),
        "compare": (
            "compare",
            make_run(tmp_path / "base", lambda prompt: ANSWER),
            make_run(tmp_path / "unlearned", lambda prompt: REFUSAL, model=str(run)),
        ),
    }
    if command in ("train", "compare"):  # the others take long, and other tests run them
        assert run_in_process(*commands[command]).returncode == 0
    damage(run / "model")
    done = run_in_process(*commands[command])
    if command == "train from it" and mode == "lora":
        code = "invalid-model"  # an adapter is no base model
    assert (done.returncode, error_code(done)) == (2, code)
    assert done.stdout == ""
    assert not out.exists() or not any(out.iterdir())
