"""Model folders that describe gigantic models, images or adapters: an error before anything of that size is built."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import families
from helpers import raises_code
from vlm_unlearn.modeling import size_limits, trial
from vlm_unlearn.modeling.adapters import load_adapter
from vlm_unlearn.modeling.loader import (
    build_skeleton,
    load_model,
    load_processor,
    model_folder,
    model_skeleton,
    read_config,
)
from vlm_unlearn.store import write_json

Copy = Callable[[str], Path]


@pytest.fixture
def copy(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Copy:
    def copy_family(family: str) -> Path:
        return Path(shutil.copytree(families.shared_folder(family, tmp_path_factory), tmp_path / family))

    return copy_family


def change(file: Path, key: str, value: object) -> None:
    content = json.loads(file.read_text())
    *path, name = key.split(".")
    section = content
    for part in path:
        section = section[part]
    section[name] = value
    write_json(file, content)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llava", "text_config.num_hidden_layers", 10**6),
        ("llava", "text_config.num_hidden_layers", 10**12),
        ("llava", "vision_config.num_hidden_layers", 10**6),
        ("qwen2_5_vl", "vision_config.depth", 10**6),
        ("llava", "num_labels", 10**9),
    ],
)
def test_million_layers_are_an_error(family: str, key: str, value: int, copy: Copy) -> None:
    folder = copy(family)
    change(folder / "config.json", key, value)
    for load in (read_config, load_processor, lambda path: load_model(path, "fp32")):
        with raises_code("invalid-model", file=folder / "config.json", field=key):
            load(folder)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("key", ["text_config.num_hidden_layers", "vision_config.num_hidden_layers"])
def test_more_layers_than_weight_files_can_fill_are_an_error(
    key: str, copy: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(size_limits, "MAX_MODULES", 1000)
    folder = copy("llava")
    model_skeleton(folder)
    change(folder / "config.json", key, 25_000)
    for build in (model_skeleton, lambda path: build_skeleton(read_config(path), "a model")):
        with raises_code("invalid-model"):
            build(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("text_config.hidden_size", 10**9),
        ("text_config.vocab_size", 10**12),
        ("text_config.vocab_size", 10**30),
        ("vision_config.image_size", 10**6),
    ],
)
@pytest.mark.parametrize("quantized", [False, True])
def test_gigantic_weights_are_an_error(key: str, value: int, quantized: bool, copy: Copy) -> None:
    folder = copy("llava")
    change(folder / "config.json", key, value)
    if quantized:
        change(folder / "config.json", "quantization_config", {"quant_method": "gptq", "bits": 4})
    with raises_code("invalid-model", file=folder):
        model_skeleton(folder)


def test_gigantic_buffer_is_an_error() -> None:
    model = torch.nn.Module()
    with torch.device("meta"):
        model.register_buffer("table", torch.empty(1 << 29))
    with raises_code("invalid-model"):
        size_limits.validate_buffers(model, "a model")


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("llava", "size", {"shortest_edge": 10**6}),
        ("llava", "crop_size", {"height": 20_000, "width": 20_000}),
        ("llava_next", "image_grid_pinpoints", [[32_000, 32_000]]),
        ("qwen2_5_vl", "size", {"shortest_edge": 10**8, "longest_edge": 10**9}),
        ("idefics3", "size", {"longest_edge": 10**5}),
        ("internvl", "max_patches", 10**6),
        ("mllama", "max_image_tiles", 10**6),
    ],
)
def test_gigantic_image_is_an_error(family: str, field: str, value: object, copy: Copy) -> None:
    folder = copy(family)
    file = folder / "processor_config.json"
    nested = "image_processor" in json.loads(file.read_text())
    change(
        file if nested else folder / "preprocessor_config.json", f"image_processor.{field}" if nested else field, value
    )
    with raises_code("invalid-model", file=folder) as caught:
        load_processor(folder)
    assert str(caught.value.field).split(".")[0] == field


@pytest.mark.parametrize(
    ("family", "key"),
    [("gemma3", "image_seq_length"), ("instructblip", "num_query_tokens"), ("llava_onevision", "num_image_tokens")],
)
def test_million_image_tokens_are_an_error(family: str, key: str, copy: Copy) -> None:
    folder = copy(family)
    change(folder / "processor_config.json", key, 10**8)
    with raises_code("invalid-model", file=folder / "processor_config.json", field=key):
        load_processor(folder)


def test_long_list_of_a_processor_is_an_error(copy: Copy) -> None:
    folder = copy("llava_next")
    change(folder / "processor_config.json", "image_processor.image_grid_pinpoints", [[32, 64]] * 20_000)
    with raises_code("invalid-model", field="image_processor.image_grid_pinpoints"):
        load_processor(folder)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("length", "header"),
    [
        (2**62, b"{}"),
        (30_000_000, b"{" + b" " * 29_999_998 + b"}"),
        (None, b'{"a": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4000000000000]}}'),
        (None, b'{"a": ' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}"),
    ],
)
def test_lying_header_of_weights_is_an_error(length: int | None, header: bytes, copy: Copy) -> None:
    folder = copy("llava")
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header)
    with raises_code("invalid-model", file=file):
        model_folder(str(folder))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    model: Any = load_model(families.shared_folder("llava", tmp_path_factory), "fp32")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["multi_modal_projector"])
    get_peft_model(model, config).save_pretrained(folder)
    return folder


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("target_modules", r"((\w|\.)+)+!", "resource-limit"),
        ("target_modules", r"((\w+)\.?)+!", "resource-limit"),
        ("exclude_modules", r"((\w+)\.?)+!", "resource-limit"),
        ("modules_to_save", [r"((\w+)\.?)+!"], "resource-limit"),
        ("rank_pattern", {r"((\w+)\.?)+!": 2}, "resource-limit"),
        ("alpha_pattern", {r"((\w+)\.?)+!": 2}, "resource-limit"),
        ("layers_pattern", [r"((\w+)\.?)+!"], "resource-limit"),
        ("r", 10**8, "adapter-mismatch"),
        ("target_modules", [f"q{number}" for number in range(20_000)], "adapter-mismatch"),
        ("layer_replication", [[0, 10**9]], "adapter-mismatch"),
        ("init_lora_weights", "pissa_niter_1000000000", "adapter-mismatch"),
    ],
)
def test_endless_adapter_config_is_an_error(
    field: str,
    value: object,
    code: str,
    adapter: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trial, "PATTERN_SECONDS", 2.0)
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    change(folder / "adapter_config.json", field, value)
    model = load_model(families.shared_folder("llava", tmp_path_factory), "fp32")
    with raises_code(code, file=folder / "adapter_config.json", field=field):
        load_adapter(model, folder)
