"""Exported folders have the keys that transformers 4 reads, and transformers 5 loads the same model from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import families
from vlm_unlearn.data.encoding import Turn, encode
from vlm_unlearn.modeling.loader import load_model, load_processor
from vlm_unlearn.modeling.older_readers import add_older_forms
from vlm_unlearn.modeling.processors import save_processor
from vlm_unlearn.store import write_json

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
    add_older_forms(folder)
    return model, processor


@pytest.mark.parametrize("family", families.FAMILIES)
def test_older_forms_do_not_change_the_model(
    family: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source, folder = families.shared_folder(family, tmp_path_factory), tmp_path / "exported"
    model, processor = save_again(source, folder)
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
