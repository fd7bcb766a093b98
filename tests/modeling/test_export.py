"""Exported folders have the files and keys that older programs read, and killed exports leave nothing for good."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import families
from helpers import recipe
from vlm_unlearn.data.encoding import Turn, encode
from vlm_unlearn.modeling.export import export_run, remove_leftovers
from vlm_unlearn.modeling.loader import load_model, load_processor
from vlm_unlearn.modeling.older_readers import AUXILIARY_FILES, add_older_forms
from vlm_unlearn.modeling.processors import save_processor
from vlm_unlearn.store import write_json
from vlm_unlearn.training.runner import run_recipe

# The keys of config.json that transformers 4 reads, by family. transformers 5 writes all of them as rope_parameters.
OLDER_KEYS: dict[str, dict[str, object]] = {
    "llava": {"rope_theta": 10000.0, "rope_scaling": None},
    "qwen2_5_vl": {
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 3, 3]},
    },
    "gemma3": {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "rope_scaling": None},
    "mllama": {"rope_scaling": {"rope_type": "default"}},
}


def read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def save_again(source: Path, folder: Path) -> tuple[Any, Any]:
    """Writes a model folder as an export does, and returns model and processor."""
    model, processor = load_model(source, "fp32"), load_processor(source)
    model.save_pretrained(folder)
    save_processor(processor, folder)
    add_older_forms(folder, processor, source)
    return model, processor


@pytest.mark.parametrize("family", families.FAMILIES)
def test_older_forms_do_not_change_the_model(
    family: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source, folder = families.shared_folder(family, tmp_path_factory), tmp_path / "exported"
    model, processor = save_again(source, folder)
    assert not {file.name for file in source.iterdir()} - {file.name for file in folder.iterdir()}
    image_processor = read(folder / "preprocessor_config.json")
    assert not image_processor["image_processor_type"].endswith("Pil")
    assert image_processor["processor_class"] == type(processor).__name__
    tokenizer_config = read(folder / "tokenizer_config.json")
    assert tokenizer_config["tokenizer_class"] != "TokenizersBackend"  # unknown to transformers 4
    assert isinstance(tokenizer_config["extra_special_tokens"], dict)  # which reads no list
    text_config = read(folder / "config.json").get("text_config", {})
    for key, value in OLDER_KEYS.get(family, {}).items():
        assert text_config[key] == value

    loaded, loaded_processor = load_model(folder, "fp32"), load_processor(folder)
    assert loaded_processor.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert set(loaded_processor.tokenizer.all_special_tokens) == set(processor.tokenizer.all_special_tokens)
    Image.new("RGB", (64, 48), (200, 30, 30)).save(tmp_path / "a.png")
    turn = Turn("x", tmp_path / "a.png", "What is it?", "A kite.")
    inputs, again = encode(processor, [turn], "right"), encode(loaded_processor, [turn], "right")
    assert inputs.keys() == again.keys()
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, loaded(**again).logits)


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
        {"rope_type": "dynamic", "rope_theta": 7.0, "factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda parameters: parameters["rope_type"],
)
def test_scaled_position_embeddings_are_written_in_both_forms(
    parameters: dict[str, Any], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = Path(shutil.copytree(families.shared_folder("llava", tmp_path_factory), tmp_path / "source"))
    config = read(source / "config.json")
    config["text_config"]["rope_parameters"] = parameters
    write_json(source / "config.json", config)
    model, _ = save_again(source, tmp_path / "exported")
    text_config = read(tmp_path / "exported" / "config.json")["text_config"]
    assert text_config["rope_theta"] == parameters["rope_theta"]
    scaling = {name: value for name, value in parameters.items() if name != "rope_theta"}
    assert text_config["rope_scaling"] == scaling
    loaded: Any = load_model(tmp_path / "exported", "fp32")
    assert loaded.config.text_config.rope_parameters == model.config.text_config.rope_parameters


@pytest.mark.parametrize("name", AUXILIARY_FILES)
def test_auxiliary_files_of_the_base_are_kept(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    processor = load_processor(families.shared_folder("llava", tmp_path_factory))
    base, folder = tmp_path / "base", tmp_path / "exported"
    base.mkdir()
    (base / name).write_text("{}")
    for file in ("config.json", "tokenizer_config.json"):
        folder.mkdir(exist_ok=True)
        write_json(folder / file, {})
    add_older_forms(folder, processor, base)
    assert (folder / name).read_text() == "{}"


@pytest.fixture(scope="module")
def run(tiny_model: Path, training_sets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    lora = {"mode": "lora", "lora": {"r": 2}}
    run_recipe(recipe(tiny_model, training_sets["harmful"], folder, "gd", trainable=lora, training={"max_steps": 2}))
    return folder


def test_export_keeps_the_settings_of_the_image_processor(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    folder = export_run(run, tmp_path / "exported", "auto", "card")
    settings = read(folder / "preprocessor_config.json")
    expected = json.loads(json.dumps(load_processor(tiny_model).image_processor.to_dict()))
    assert {name: settings[name] for name in expected if name != "image_processor_type"} == {
        name: value for name, value in expected.items() if name != "image_processor_type"
    }
    assert read(folder / "config.json")["text_config"]["rope_theta"] > 0


def test_next_export_deletes_what_a_killed_one_left(run: Path, tmp_path: Path) -> None:
    killed = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    running = os.getpid()
    left = tmp_path / f".exported.{'a' * 12}.{killed.pid}.part"
    other = tmp_path / f".other.{'b' * 12}.{killed.pid}.part"
    in_use = tmp_path / f".exported.{'c' * 12}.{running}.part"
    foreign = tmp_path / ".exported.part"
    for folder in (left, other, in_use, foreign):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"x" * 100)
    remove_leftovers(tmp_path)
    assert left.exists()  # its process is alive
    killed.kill()  # without waiting for it: it is a zombie
    time.sleep(0.2)
    export_run(run, tmp_path / "exported", "auto", "card")
    killed.wait()
    assert {path.name for path in tmp_path.iterdir()} == {"exported", in_use.name, foreign.name}


def test_folders_of_earlier_releases_are_deleted_after_a_day(tmp_path: Path) -> None:
    new, old = (tmp_path / f".exported.{letter * 12}.part" for letter in "ab")
    for folder in (new, old):
        folder.mkdir()
    os.utime(old, (time.time() - 100_000,) * 2)
    remove_leftovers(tmp_path)
    assert new.exists()
    assert not old.exists()
