"""Adapters whose tensors are missing, renamed or of another shape are errors, and no hub is asked for a local path."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finished_runs import ANSWER, REFUSAL, make_run
from helpers import error_code, raises_code, recipe, run_in_process
from vlm_unlearn.config import GenerationConfig
from vlm_unlearn.evaluation.comparison import compare_runs
from vlm_unlearn.generation.hf import HFBackend
from vlm_unlearn.modeling import loader
from vlm_unlearn.modeling.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_MODEL_FILE, check_local_model
from vlm_unlearn.modeling.loader import load_model, load_run_model, model_folder, run_model_folder
from vlm_unlearn.store import write_json
from vlm_unlearn.training.plan import plan
from vlm_unlearn.training.runner import run_recipe

Tensors = dict[str, torch.Tensor]


def first(tensors: Tensors, part: str) -> str:
    return min(name for name in tensors if part in name)


def rename(part: str, old: str, new: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        name = first(tensors, part)
        tensors[name.replace(old, new)] = tensors.pop(name)

    return edit


def remove(part: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        del tensors[first(tensors, part)]

    return edit


def rename_all(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[name.replace("base_model.model.", "base_model.")] = tensors.pop(name)


def add(tensors: Tensors) -> None:
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.ones(2, 32)


def transpose(tensors: Tensors) -> None:
    name = first(tensors, "lora_A")
    tensors[name] = tensors[name].T.contiguous()


def empty(tensors: Tensors) -> None:
    tensors.clear()


EDITS: dict[str, Callable[[Tensors], None]] = {
    "one renamed": rename("lora_B", "self_attn", "attention"),
    "one with another suffix": rename("lora_A", ".weight", ".weights"),
    "one missing": remove("lora_B"),
    "projector missing": remove("multi_modal_projector"),
    "projector renamed": rename("multi_modal_projector", "linear", "dense"),
    "layer out of range": rename("layers.1.", "layers.1.", "layers.7."),
    "all renamed": rename_all,
    "one too many": add,
    "other shape": transpose,
    "no tensor": empty,
}


@pytest.fixture(scope="module")
def trained(tiny_model: Path, training_sets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    lora = {"mode": "lora", "lora": {"r": 2, "target_modules": ["q_proj", "v_proj"]}}
    run_recipe(recipe(tiny_model, training_sets["harmful"], folder, "gd", trainable=lora, training={"max_steps": 3}))
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def edit_tensors(model: Path, edit: Callable[[Tensors], None]) -> None:
    tensors = load_file(model / ADAPTER_WEIGHTS)
    edit(tensors)
    save_file(tensors, model / ADAPTER_WEIGHTS)


def forget_saved_tensors(model: Path) -> None:
    """Makes the adapter look like one of another program, which does not list its tensors."""
    content = json.loads((model / BASE_MODEL_FILE).read_text())
    del content["tensors"]
    write_json(model / BASE_MODEL_FILE, content)


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "not listed"])
@pytest.mark.parametrize("name", EDITS)
def test_adapter_with_wrong_tensors_is_an_error(name: str, listed: bool, run: Path) -> None:
    edit_tensors(run / "model", EDITS[name])
    if not listed:
        forget_saved_tensors(run / "model")
    with raises_code("invalid-adapter", file=run / "model" / ADAPTER_WEIGHTS):
        run_model_folder(str(run))
    with raises_code("invalid-adapter", file=run / "model" / ADAPTER_WEIGHTS):  # of a folder that changed meanwhile
        load_run_model(run / "model", "fp32")


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "not listed"])
def test_complete_adapter_loads_with_its_changes(listed: bool, run: Path, tiny_model: Path) -> None:
    if not listed:
        forget_saved_tensors(run / "model")
    merged = load_run_model(run_model_folder(str(run)), "fp32")[0].state_dict()
    base = load_model(tiny_model, "fp32").state_dict()
    assert merged.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert any("multi_modal_projector" in name for name in changed)
    assert any("q_proj" in name for name in changed)
    check_local_model(str(run))


@pytest.mark.parametrize(
    "change", [{"r": 3}, {"target_modules": ["q_proj"]}, {"target_modules": ["nothing"]}, {"peft_type": "MADE_UP"}]
)
def test_config_that_does_not_fit_the_tensors_is_an_error(change: dict[str, object], run: Path) -> None:
    forget_saved_tensors(run / "model")
    file = run / "model" / ADAPTER_CONFIG
    write_json(file, json.loads(file.read_text()) | change)
    with raises_code("invalid-adapter"):
        run_model_folder(str(run))


@pytest.mark.parametrize("damage", ["missing", "pickle only", "broken"])
def test_adapter_without_safetensors_is_an_error_and_no_hub_is_asked(
    damage: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("the hub was asked")

    for name in ("hf_hub_download", "file_exists"):
        monkeypatch.setattr(f"peft.utils.save_and_load.{name}", fail)
    file = run / "model" / ADAPTER_WEIGHTS
    if damage == "broken":
        file.write_bytes(file.read_bytes()[:100])
    else:
        file.unlink()
    if damage == "pickle only":
        torch.save({}, run / "model" / "adapter_model.bin")
    for load in (lambda: run_model_folder(str(run)), lambda: load_run_model(run / "model", "fp32")):
        with raises_code("invalid-model" if damage == "broken" else "invalid-adapter"):
            load()


@pytest.mark.parametrize("name", ["runs/base/model", "./base", "/nothing/here", "~/nothing", "a\\b", ".."])
def test_path_of_a_missing_model_is_not_looked_up_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    assert loader.find_local_model(name) is None
    with raises_code("invalid-model" if name == ".." else "model-not-found"):
        model_folder(name)


def test_adapter_next_to_a_model_is_an_error(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    both = shutil.copytree(tiny_model, tmp_path / "both")
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        shutil.copy(run / "model" / name, both / name)
    with raises_code("invalid-model", file=both):
        model_folder(str(both))


@pytest.mark.parametrize("name", ["one renamed", "one missing"])
def test_train_evaluate_export_and_compare_reject_a_wrong_tensor(
    name: str, run: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    edit_tensors(run / "model", EDITS[name])
    with raises_code("invalid-adapter"):
        HFBackend(str(run), GenerationConfig())
    done = run_in_process("export", run, "--out", tmp_path / "exported")
    assert (done.returncode, error_code(done)) == (2, "invalid-adapter")
    assert not (tmp_path / "exported").exists()
    with raises_code("invalid-model"):  # an adapter is no base model
        plan(recipe(run / "model", training_sets["harmful"], tmp_path / "again", "gd"))
    runs = {
        "base": make_run(tmp_path / "base", lambda prompt: ANSWER),
        "run": make_run(tmp_path / "npo", lambda prompt: REFUSAL, model=str(run)),
    }
    with raises_code("invalid-adapter"):
        compare_runs(runs)
