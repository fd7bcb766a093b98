"""The weight files of a model folder: only safetensors files inside it, all of them in its digest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finished_runs import ANSWER, REFUSAL, make_run
from helpers import error_code, raises_code, recipe, run_in_process
from vlm_unlearn.config import GenerationConfig
from vlm_unlearn.evaluation.comparison import compare_runs
from vlm_unlearn.generation.hf import HFBackend
from vlm_unlearn.modeling.loader import load_model, model_folder
from vlm_unlearn.store import RunDirectory, digest_model, tensor_shapes, weight_files, write_json
from vlm_unlearn.training.plan import plan
from vlm_unlearn.training.runner import run_recipe

INDEX = "model.safetensors.index.json"


def write_shards(model: Path, folder: Path, names: tuple[str, str] = ("one.safetensors", "two.safetensors")) -> Path:
    """Copies a model with its weights in two files and an index."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, file in enumerate(names):
        (folder / file).parent.mkdir(exist_ok=True)
        shard = {name: tensor for index, (name, tensor) in enumerate(sorted(tensors.items())) if index % 2 == number}
        save_file(shard, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})
    return folder


def name_in_index(folder: Path, name: object) -> None:
    """Lets the index name another file for its first tensor."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][min(index["weight_map"])] = name
    write_json(folder / INDEX, index)


@pytest.fixture
def sharded(tiny_model: Path, tmp_path: Path) -> Path:
    return write_shards(tiny_model, tmp_path / "sharded")


@pytest.mark.parametrize("names", [("one.safetensors", "two.safetensors"), ("one.safetensors", "sub/two.safetensors")])
def test_shards_load_and_each_is_in_the_digest(names: tuple[str, str], tiny_model: Path, tmp_path: Path) -> None:
    folder = write_shards(tiny_model, tmp_path / "sharded", names)
    assert model_folder(str(folder)) == folder
    assert weight_files(folder) == [folder / name for name in names]
    expected, loaded = load_model(tiny_model, "fp32").state_dict(), load_model(folder, "fp32").state_dict()
    assert all(torch.equal(expected[name], loaded[name]) for name in expected)
    for name in names:
        before = digest_model(folder)
        tensors = load_file(folder / name)
        tensors[min(tensors)] += 1
        save_file(tensors, folder / name, {"format": "pt"})
        assert digest_model(folder) != before


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "../outside.safetensors",
        "sub/../../outside.safetensors",
        "/etc/outside.safetensors",
        "C:\\outside.safetensors",
        "..\\outside.safetensors",
        "link/outside.safetensors",
        "model.safetensors.bin",
        "model.safetensors\0.bin",
        "",
        7,
        None,
        ["one.safetensors"],
    ],
)
def test_index_that_names_another_kind_of_file_or_a_path_outside_is_an_error(
    name: object, sharded: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (sharded / "link").symlink_to(tmp_path / "elsewhere")
    for target in (tmp_path, tmp_path / "elsewhere"):
        shutil.copy(sharded / "one.safetensors", target / "outside.safetensors")
    torch.save({"x": torch.ones(1)}, sharded / "pytorch_model.bin")
    name_in_index(sharded, name)
    for read in (weight_files, digest_model, lambda folder: model_folder(str(folder))):
        with raises_code("unsafe-weights", file=sharded / INDEX):
            read(sharded)


def test_index_is_checked_next_to_complete_weights(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    write_json(folder / INDEX, {"weight_map": {"x": "pytorch_model.bin"}})
    with raises_code("unsafe-weights"):
        model_folder(str(folder))


def test_pickle_under_a_safe_name_is_an_error(sharded: Path) -> None:
    torch.save({"x": torch.ones(1)}, sharded / "one.safetensors")
    with raises_code("invalid-model", file=sharded / "one.safetensors"):
        model_folder(str(sharded))


def test_missing_shard_is_an_error(sharded: Path) -> None:
    (sharded / "two.safetensors").unlink()
    with raises_code("invalid-model", file=sharded / INDEX):
        model_folder(str(sharded))


@pytest.mark.parametrize("content", [[], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": "x.safetensors"}])
def test_index_without_a_weight_map_is_an_error(content: object, sharded: Path) -> None:
    write_json(sharded / INDEX, content)
    with raises_code("invalid-model", file=sharded / INDEX, field="weight_map"):
        model_folder(str(sharded))


def test_links_to_files_outside_are_allowed_as_in_the_cache_of_the_hub(sharded: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / "abc"
    blob.parent.mkdir()
    shutil.move(sharded / "one.safetensors", blob)
    (sharded / "one.safetensors").symlink_to(blob)
    assert model_folder(str(sharded)) == sharded


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("../outside.safetensors", "unsafe-weights"),
        ("adapter_model.bin", "unsafe-weights"),
        ("other.safetensors", "invalid-model"),
        ("other.safetensors.index.json", "invalid-model"),
        ("one.safetensors", None),
        (INDEX, None),
    ],
)
def test_weights_that_the_config_names_are_checked(name: str, code: str | None, sharded: Path) -> None:
    file = sharded / "config.json"
    write_json(file, json.loads(file.read_text()) | {"transformers_weights": name})
    if code is None:
        assert weight_files(sharded)[0] == sharded / "one.safetensors"
        return
    with raises_code(code, file=file):
        model_folder(str(sharded))


def test_tensor_shapes_are_read_without_tensors(sharded: Path) -> None:
    tensors = load_file(sharded / "one.safetensors")
    assert tensor_shapes(sharded / "one.safetensors") == {name: list(tensors[name].shape) for name in tensors}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../outside.safetensors"])
def test_train_evaluate_export_and_compare_reject_an_index(
    name: str, sharded: Path, training_sets: dict[str, Path], tmp_path: Path
) -> None:
    full = {"mode": "full", "layers": [1], "projector": False}
    run = RunDirectory(tmp_path / "run")
    run_recipe(recipe(sharded, training_sets["harmful"], run.path, "gd", trainable=full, training={"max_steps": 1}))
    shutil.rmtree(run.model)
    shutil.copytree(sharded, run.model)
    torch.save({"x": torch.ones(1)}, run.model / "pytorch_model.bin")
    name_in_index(run.model, name)
    with raises_code("unsafe-weights"):
        plan(recipe(run.model, training_sets["harmful"], tmp_path / "again", "gd"))
    with raises_code("unsafe-weights"):
        HFBackend(str(run.path), GenerationConfig())
    done = run_in_process("export", run.path, "--out", tmp_path / "exported")
    assert (done.returncode, error_code(done)) == (2, "unsafe-weights")
    runs = {
        "base": make_run(tmp_path / "base", lambda prompt: ANSWER),
        "run": make_run(tmp_path / "npo", lambda prompt: REFUSAL, model=str(run.path)),
    }
    with raises_code("unsafe-weights"):
        compare_runs(runs)
