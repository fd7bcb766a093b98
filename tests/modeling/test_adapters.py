"""Adapters and weight files that do not match: each is rejected before it can answer as the base does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import families
from helpers import raises_code
from vlm_unlearn.errors import UserError
from vlm_unlearn.modeling.adapters import load_adapter
from vlm_unlearn.modeling.loader import load_model, load_processor, load_run_model, model_folder, run_model_folder
from vlm_unlearn.store import validate_model_files

TENSORS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.shared_folder("llava", tmp_path_factory)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose B matrices are not zero, and a trained projector."""
    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["multi_modal_projector"])
    model: Any = get_peft_model(load_model(base, "fp32"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    load_processor(base).save_pretrained(folder)
    return folder


def changed(adapter: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    shutil.copytree(adapter, folder)
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)
    return folder


def first(tensors: dict[str, Any], part: str) -> str:
    return min(key for key in tensors if part in key)


def rename_layer(tensors: dict[str, Any]) -> None:
    for key in [key for key in tensors if "layers.1." in key]:
        tensors[key.replace("layers.1.", "layers.7.")] = tensors.pop(key)


def drop_layer(tensors: dict[str, Any]) -> None:
    for key in [key for key in tensors if "layers.1." in key]:
        del tensors[key]


def rename_one(tensors: dict[str, Any]) -> None:
    key = first(tensors, "lora_A")
    tensors[key.replace("lora_A", "lora_a")] = tensors.pop(key)


def rename_all(tensors: dict[str, Any]) -> None:
    for key in list(tensors):
        tensors["other." + key] = tensors.pop(key)


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "one renamed": rename_one,
    "one missing": lambda tensors: tensors.pop(first(tensors, "lora_B")),
    "layer renamed": rename_layer,
    "layer missing": drop_layer,
    "all renamed": rename_all,
    "none": lambda tensors: tensors.clear(),
    "projector missing": lambda tensors: tensors.pop(first(tensors, "multi_modal_projector")),
    "extra tensor": lambda tensors: tensors.update(extra=torch.zeros(1)),
    "other shape": lambda tensors: tensors.update({first(tensors, "lora_A"): torch.zeros(3, 32)}),
}


def test_complete_adapter_changes_the_model(base: Path, adapter: Path) -> None:
    adapted, _ = load_run_model(run_model_folder(str(adapter)), "fp32")
    before = load_model(base, "fp32").state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in adapted.state_dict().items())


@pytest.mark.parametrize("change", CHANGES)
def test_adapter_that_does_not_match_is_rejected(adapter: Path, tmp_path: Path, change: str) -> None:
    folder = changed(adapter, tmp_path / "changed", CHANGES[change])
    with raises_code("adapter-mismatch", file=folder / TENSORS):
        load_run_model(run_model_folder(str(folder)), "fp32")


def test_adapter_without_weights_is_not_looked_up_on_a_hub(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from peft.utils import save_and_load

    def unreachable(*_: object, **__: object) -> None:
        raise AssertionError("a local path is looked up on the hub")

    for module in (huggingface_hub, save_and_load):
        for name in ("hf_hub_download", "file_exists", "snapshot_download"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, unreachable)
    shutil.copytree(adapter, tmp_path / "a")
    (tmp_path / "a" / TENSORS).unlink()
    with raises_code("invalid-model", file=tmp_path / "a"):
        run_model_folder(str(tmp_path / "a"))
    with raises_code("invalid-model", file=tmp_path / "a"):
        load_adapter(load_model(base, "fp32"), tmp_path / "a")
    with raises_code("model-not-found"):
        model_folder("models/of/nobody")


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "../model.safetensors", "/model.safetensors", "sub/model.safetensors", "gone.safetensors", 7],
)
def test_index_that_names_other_files_is_rejected(base: Path, tmp_path: Path, name: object) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (tmp_path / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": name}}))
    for check in (model_folder, run_model_folder):
        with raises_code("invalid-model", file=index, field="weight_map"):
            check(str(folder))
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert model_folder(str(folder)) == folder


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../model.safetensors", "other.safetensors"])
def test_config_that_names_other_weights_is_rejected(base: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "transformers_weights": name}))
    with raises_code("invalid-model", file=config, field="transformers_weights"):
        model_folder(str(folder))


@pytest.mark.parametrize("header", [b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0{", b"\x02\0\0\0\0\0\0\0[]"])
def test_broken_header_is_an_error(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / TENSORS).write_bytes(header)
    with pytest.raises(UserError) as caught:
        validate_model_files(tmp_path)
    assert caught.value.code in ("invalid-model", "adapter-mismatch")
