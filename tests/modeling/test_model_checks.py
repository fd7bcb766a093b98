"""Settings of a processor, of position embeddings and of tied weights are checked against the model, and named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import families
from helpers import raises_code, recipe
from vlm_unlearn.config import GenerationConfig
from vlm_unlearn.data.encoding import Turn, encode
from vlm_unlearn.generation.hf import HFBackend
from vlm_unlearn.modeling.loader import load_model, load_processor, model_skeleton
from vlm_unlearn.store import write_json
from vlm_unlearn.training.plan import plan

REMOVED = object()


@pytest.fixture
def copy(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    def copy_family(family: str) -> Path:
        return Path(shutil.copytree(families.shared_folder(family, tmp_path_factory), tmp_path / family))

    return copy_family


def change(file: Path, key: str, value: object) -> None:
    """Changes a setting of a JSON file, of which the parts of `key` are separated by dots."""
    content = json.loads(file.read_text())
    *path, name = key.split(".")
    section = content
    for part in path:
        section = section[part]
    if value is REMOVED:
        section.pop(name, None)
    else:
        section[name] = value
    write_json(file, content)


def settings_file(folder: Path, name: str) -> Path:
    files = [folder / "processor_config.json", folder / "preprocessor_config.json"]
    return next(file for file in files if file.is_file() and name in json.loads(file.read_text()))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_processors_of_all_families_pass(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = families.shared_folder(family, tmp_path_factory)
    load_processor(folder)
    model_skeleton(folder)


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("llava", "patch_size", None),
        ("llava", "patch_size", REMOVED),
        ("llava", "vision_feature_select_strategy", None),
        ("llava", "num_additional_image_tokens", REMOVED),
        ("llava_next", "patch_size", None),
        ("llava_next", "num_additional_image_tokens", REMOVED),
        ("llava_onevision", "vision_feature_select_strategy", None),
    ],
)
def test_missing_setting_is_taken_from_the_model(
    family: str, name: str, value: object, copy: Any, tmp_path: Path
) -> None:
    folder = copy(family)
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "a.png")
    turn = Turn("x", tmp_path / "a.png", "What?", None)
    expected = encode(load_processor(folder), [turn], "right")["input_ids"]
    change(settings_file(folder, name), name, value)
    processor = load_processor(folder)
    assert torch.equal(encode(processor, [turn], "right")["input_ids"], expected)
    processor.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "processor_config.json").read_text())[name] is not None


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("llava", "patch_size", 8),
        ("llava", "vision_feature_select_strategy", "full"),
        ("llava", "num_additional_image_tokens", 0),
        ("llava_next", "patch_size", 14),
        ("pixtral", "spatial_merge_size", 2),
        ("mistral3", "spatial_merge_size", 1),
        ("llava_onevision", "vision_feature_select_strategy", "default"),
        ("qwen2_5_vl", "merge_size", 1),
        ("qwen2_vl", "patch_size", 16),
        ("qwen3_vl", "temporal_patch_size", 1),
    ],
)
def test_setting_that_contradicts_the_model_is_an_error(family: str, name: str, value: object, copy: Any) -> None:
    folder = copy(family)
    change(settings_file(folder, name), name, value)
    with raises_code("processor-mismatch", file=folder, field=name):
        load_processor(folder)


@pytest.mark.parametrize(("family", "key"), [("llava", "image_token_index"), ("qwen2_5_vl", "image_token_id")])
def test_other_image_token_is_an_error(family: str, key: str, copy: Any) -> None:
    folder = copy(family)
    change(folder / "config.json", key, 7)
    with raises_code("processor-mismatch", file=folder, field="image_token"):
        load_processor(folder)


def test_train_and_evaluate_check_the_processor(copy: Any, training_sets: dict[str, Path], tmp_path: Path) -> None:
    folder = copy("llava")
    change(folder / "processor_config.json", "patch_size", 8)
    with raises_code("processor-mismatch", field="patch_size"):
        plan(recipe(folder, training_sets["harmful"], tmp_path / "run", "gd"))
    with raises_code("processor-mismatch", field="patch_size"):
        HFBackend(str(folder), GenerationConfig())._loaded  # noqa: B018


LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("family", "change_to", "field"),
    [
        ("llava", {"rope_theta": 5.0}, "rope_theta"),
        ("llava", {"rope_theta": -1}, "rope_theta"),
        ("llava", {"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta"),
        ("llava", {"rope_parameters": {"rope_type": "default", "rope_theta": "10000"}}, "rope_theta"),
        ("llava", {"rope_parameters": {"rope_type": "made_up", "rope_theta": 1.0}}, "rope_type"),
        ("llava", {"rope_parameters": [1]}, "rope_parameters"),
        ("llava", {"rope_scaling": "linear"}, "rope_scaling"),
        ("llava", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ("llava", {"rope_parameters": LINEAR, "rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling"),
        ("llava", {"rope_parameters": LINEAR | {"factor": 0}}, "factor"),
        (
            "qwen2_5_vl",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1]}},
            "mrope_section",
        ),
    ],
)
def test_wrong_position_embeddings_are_an_error(
    family: str, change_to: dict[str, object], field: str, copy: Any
) -> None:
    folder = copy(family)
    for key, value in change_to.items():
        change(folder / "config.json", f"text_config.{key}", value)
    for load in (model_skeleton, lambda folder: load_model(folder, "fp32")):
        with raises_code("invalid-model", field=field):
            load(folder)


@pytest.mark.parametrize(
    ("family", "change_to"),
    [
        ("llava", {"rope_theta": 10000.0}),
        ("llava", {"rope_theta": 10000.0, "rope_scaling": None}),
        ("llava", {"rope_parameters": REMOVED, "rope_theta": 7.0}),
        ("llava", {"rope_parameters": LINEAR, "rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("llava", {"rope_parameters": REMOVED, "rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}}),
        (
            "qwen2_5_vl",
            {"rope_parameters": REMOVED, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        ),
    ],
)
def test_position_embeddings_of_old_and_new_configs_load(family: str, change_to: dict[str, object], copy: Any) -> None:
    folder = copy(family)
    for key, value in change_to.items():
        change(folder / "config.json", f"text_config.{key}", value)
    model_skeleton(folder)


def test_tied_embeddings_that_differ_are_an_error(copy: Any) -> None:
    folder = copy("llava")
    change(folder / "config.json", "tie_word_embeddings", True)
    with raises_code("invalid-model", field="tie_word_embeddings"):
        load_model(folder, "fp32")


def test_missing_output_embeddings_name_the_setting(copy: Any) -> None:
    folder = copy("llava")
    tensors = load_file(folder / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith("lm_head.weight"))]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with raises_code("invalid-model", field="tie_word_embeddings"):
        load_model(folder, "fp32")


def test_tied_embeddings_that_are_equal_load(copy: Any) -> None:
    folder = copy("llava")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    head, embeddings = (next(n for n in tensors if n.endswith(e)) for e in ("lm_head.weight", "embed_tokens.weight"))
    tensors[head] = tensors[embeddings].clone()
    save_file(tensors, file, {"format": "pt"})
    change(folder / "config.json", "tie_word_embeddings", True)
    load_model(folder, "fp32")
