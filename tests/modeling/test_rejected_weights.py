"""train, evaluate, export and compare reject adapters with wrong tensors and indexes that name other files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finished_runs import ANSWER, REFUSAL, make_run
from helpers import error_code, raises_code, recipe, run_in_process
from vlm_unlearn.config import GenerationConfig
from vlm_unlearn.evaluation.comparison import compare_runs
from vlm_unlearn.generation.hf import HFBackend
from vlm_unlearn.modeling.adapters import sort_adapter_config
from vlm_unlearn.modeling.loader import model_folder
from vlm_unlearn.store import RunDirectory, write_json
from vlm_unlearn.training.plan import plan
from vlm_unlearn.training.runner import run_recipe

WEIGHTS, INDEX = "adapter_model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def trained(tiny_model: Path, training_sets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    lora = {"mode": "lora", "lora": {"r": 2, "target_modules": ["q_proj", "v_proj"]}}
    run_recipe(recipe(tiny_model, training_sets["harmful"], folder, "gd", trainable=lora, training={"max_steps": 3}))
    return folder


def first(tensors: dict[str, Any], part: str) -> str:
    return min(name for name in tensors if part in name)


def rename(part: str, old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def edit(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if part in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return edit


def remove(part: str) -> Callable[[dict[str, Any]], None]:
    def edit(tensors: dict[str, Any]) -> None:
        del tensors[first(tensors, part)]

    return edit


EDITS = {
    "one missing": remove("lora_B"),
    "one of the projector missing": remove("multi_modal_projector"),
    "projector renamed": rename("multi_modal_projector", "linear", "dense"),
    "layer renamed in both matrices": rename("layers.1.", "layers.1.", "layers.7."),
}


def compared(run: Path, folder: Path) -> dict[str, Path]:
    """Returns graded evaluations of a base model and of the run."""
    return {
        "base": make_run(folder / "base", lambda prompt: ANSWER),
        "run": make_run(folder / "npo", lambda prompt: REFUSAL, model=str(run)),
    }


@pytest.mark.parametrize("name", EDITS)
def test_adapter_with_wrong_tensors_is_rejected(
    name: str, trained: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    runs = compared(run, tmp_path)
    compare_runs(runs)
    tensors = load_file(run / "model" / WEIGHTS)
    EDITS[name](tensors)
    save_file(tensors, run / "model" / WEIGHTS)
    with raises_code("adapter-mismatch"):
        HFBackend(str(run), GenerationConfig())
    with raises_code("adapter-mismatch"):
        compare_runs(runs)
    done = run_in_process("export", run, "--out", tmp_path / "exported")
    assert (done.returncode, error_code(done)) == (2, "adapter-mismatch")
    assert not (tmp_path / "exported").exists()
    with raises_code("invalid-model"):  # an adapter is no base model
        plan(recipe(run / "model", training_sets["harmful"], tmp_path / "again", "gd"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../outside.safetensors"])
def test_index_that_names_another_file_is_rejected(
    name: str, trained: Path, tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    run = RunDirectory(shutil.copytree(trained, tmp_path / "run"))
    shutil.rmtree(run.model)
    shutil.copytree(tiny_model, run.model)
    runs = compared(run.path, tmp_path)
    compare_runs(runs)
    torch.save({"x": torch.ones(1)}, run.model / "pytorch_model.bin")
    shutil.copy(tiny_model / "model.safetensors", run.path / "outside.safetensors")
    write_json(run.model / INDEX, {"weight_map": {"x": name}})
    with raises_code("invalid-model", file=run.model / INDEX):
        plan(recipe(run.model, training_sets["harmful"], tmp_path / "again", "gd"))
    with raises_code("invalid-model", file=run.model / INDEX):
        HFBackend(str(run.path), GenerationConfig())
    with raises_code("invalid-model", file=run.model / INDEX):
        compare_runs(runs)
    done = run_in_process("export", run.path, "--out", tmp_path / "exported")
    assert (done.returncode, error_code(done)) == (2, "invalid-model")


def test_adapter_next_to_a_model_is_rejected(trained: Path, tiny_model: Path, tmp_path: Path) -> None:
    both = Path(shutil.copytree(tiny_model, tmp_path / "both"))
    for name in ("adapter_config.json", WEIGHTS):
        shutil.copy(trained / "model" / name, both / name)
    with raises_code("invalid-model", file=both):
        model_folder(str(both))


def test_names_in_the_config_of_adapters_are_sorted(tmp_path: Path) -> None:
    """PEFT writes sets, whose order differs between processes."""
    for names in (["v_proj", "q_proj"], ["q_proj", "v_proj"]):
        write_json(tmp_path / "adapter_config.json", {"target_modules": names, "modules_to_save": None, "r": 2})
        sort_adapter_config(tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config == {"target_modules": ["q_proj", "v_proj"], "modules_to_save": None, "r": 2}
