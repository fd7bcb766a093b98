"""Processors, configs and weights that contradict each other: completed from the config, or rejected with the key."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import families
from helpers import raises_code
from vlm_unlearn.modeling.loader import load_model, load_processor, model_skeleton


def copied(family: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shutil.copytree(families.shared_folder(family, tmp_path_factory), folder)
    return folder


def edit(file: Path, changes: dict[str, Any], removed: tuple[str, ...] = ()) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if key not in removed}))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_matching_folder_loads(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = families.shared_folder(family, tmp_path_factory)
    load_processor(folder)
    model_skeleton(folder)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("key", ["patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"])
@pytest.mark.parametrize("change", ["null", "missing"])
def test_missing_setting_comes_from_the_config(
    family: str, key: str, change: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = copied(family, tmp_path / "m", tmp_path_factory)
    right = getattr(load_processor(folder), key)
    edit(folder / "processor_config.json", {key: None}, (key,) if change == "missing" else ())
    assert getattr(load_processor(folder), key) == right


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llava", "patch_size", 7),
        ("llava", "num_additional_image_tokens", 0),
        ("llava_next", "num_additional_image_tokens", 3),
        ("llava", "vision_feature_select_strategy", "full"),
        ("llava_next", "patch_size", 14),
    ],
)
def test_setting_that_contradicts_the_config_is_named(
    family: str, key: str, value: object, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = copied(family, tmp_path / "m", tmp_path_factory)
    edit(folder / "processor_config.json", {key: value})
    with raises_code("processor-mismatch", file=folder, field=key):
        load_processor(folder)


@pytest.mark.parametrize(("key", "value"), [("patch_size", 14), ("merge_size", 1), ("temporal_patch_size", 1)])
def test_patches_of_qwen_that_contradict_the_config_are_named(
    key: str, value: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = copied("qwen2_5_vl", tmp_path / "m", tmp_path_factory)
    for name in ("preprocessor_config.json", "processor_config.json"):
        content = json.loads((folder / name).read_text())
        settings = content.get("image_processor", content)
        settings[key] = value
        (folder / name).write_text(json.dumps(content))
    with raises_code("processor-mismatch", file=folder, field=key):
        load_processor(folder)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_other_image_token_is_named(family: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = copied(family, tmp_path / "m", tmp_path_factory)
    name = "image_token_id" if "image_token_id" in json.loads((folder / "config.json").read_text()) else None
    edit(folder / "config.json", {name or "image_token_index": 1})
    with raises_code("processor-mismatch", file=folder, field="image_token"):
        load_processor(folder)


@pytest.mark.parametrize(
    ("family", "parameters", "key"),
    [
        ("llava", {"rope_type": "yam", "rope_theta": 1e4}, "rope_type"),
        ("llava", {"rope_type": "linear", "factor": -2.0, "rope_theta": 1e4}, "factor"),
        ("llava", {"rope_type": "default", "rope_theta": 0}, "rope_theta"),
        ("llava", {"rope_type": "default", "rope_theta": "10000"}, "rope_theta"),
        ("qwen2_5_vl", {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1]}, "mrope_section"),
        ("qwen2_5_vl", {"rope_type": "default", "rope_theta": 1e4, "mrope_section": ["a"]}, "mrope_section"),
    ],
)
def test_invalid_rope_setting_is_named(
    family: str, parameters: dict[str, Any], key: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = copied(family, tmp_path / "m", tmp_path_factory)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rope_parameters"] = parameters
    (folder / "config.json").write_text(json.dumps(config))
    with raises_code("invalid-model", file=folder) as caught:
        model_skeleton(folder)
    assert key in str(caught.value) or caught.value.field == key  # some are found by transformers


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_head_that_the_config_ties_to_other_embeddings_is_named(
    family: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    families.build(family, tmp_path, tied=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    embeddings = next(value for name, value in tensors.items() if name.endswith("embed_tokens.weight"))
    save_file({**tensors, "lm_head.weight": embeddings.clone()}, file, metadata={"format": "pt"})
    load_model(tmp_path, "fp32")
    save_file({**tensors, "lm_head.weight": embeddings + 1}, file, metadata={"format": "pt"})
    with raises_code("invalid-model", file=tmp_path, field="tie_word_embeddings"):
        load_model(tmp_path, "fp32")


def test_missing_head_names_the_key(tmp_path: Path) -> None:
    families.build("llava", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: value for name, value in load_file(file).items() if not name.endswith("lm_head.weight")}
    save_file(tensors, file, metadata={"format": "pt"})
    with raises_code("invalid-model", file=tmp_path, field="tie_word_embeddings"):
        load_model(tmp_path, "fp32")
