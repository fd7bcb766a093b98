"""Loading models and processors: tied weights, video processors without torchvision, and invalid files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import families
from helpers import raises_code
from vlm_unlearn.data.encoding import Turn, encode, render
from vlm_unlearn.data.processor_call import Processor
from vlm_unlearn.modeling.loader import load_model, load_processor, model_skeleton

WITH_VIDEOS = ["qwen2_5_vl", "qwen3_vl", "llava_onevision", "smolvlm", "internvl"]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_tied_weights_are_not_missing(family: str, tmp_path: Path) -> None:
    families.build(family, tmp_path / "tied", tied=True)
    model: Any = load_model(tmp_path / "tied", "fp32")
    if family != "mllama":  # its embeddings have eight rows more than its head, so transformers never ties them
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path / "saved")
    reloaded: Any = load_model(tmp_path / "saved", "fp32")
    assert torch.equal(reloaded.get_output_embeddings().weight, model.get_output_embeddings().weight)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_flex_attention_is_for_the_language_model_only(
    family: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model: Any = load_model(families.shared_folder(family, tmp_path_factory), "fp32", "flex_attention")
    assert model.config.get_text_config()._attn_implementation == "flex_attention"
    assert model.config.vision_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", WITH_VIDEOS)
@pytest.mark.parametrize("location", ["separate file", "nested", "none"])
def test_settings_of_video_processor_are_saved_unchanged(
    family: str, location: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shutil.copytree(families.shared_folder(family, tmp_path_factory), tmp_path / "hub")
    separate, nested = tmp_path / "hub" / "video_preprocessor_config.json", tmp_path / "hub" / "processor_config.json"
    settings = json.loads(separate.read_text())
    if location != "separate file":
        separate.unlink()
    if location == "nested":
        nested.write_text(json.dumps(json.loads(nested.read_text()) | {"video_processor": settings}))
    if location == "none":  # transformers falls back to the image processor's file
        settings = json.loads((tmp_path / "hub" / "preprocessor_config.json").read_text())
    for source, target in (("hub", "once"), ("once", "twice")):
        load_processor(tmp_path / source).save_pretrained(tmp_path / target)
        saved = json.loads((tmp_path / target / "processor_config.json").read_text())
        assert saved["processor_class"] == type(load_processor(tmp_path / "hub")).__name__
        assert saved["video_processor"] == settings


@pytest.mark.parametrize("family", WITH_VIDEOS)
def test_processor_class_is_plain_with_torchvision(
    family: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchvision is not a dependency of the tests. The calls that would be made are checked instead."""
    from transformers import AutoProcessor

    from vlm_unlearn.modeling import processors

    folder = families.shared_folder(family, tmp_path_factory)
    stub = load_processor(folder)
    calls: list[dict[str, object]] = []

    def from_pretrained(folder: str, **arguments: object) -> Processor:
        calls.append({"folder": folder, **arguments})
        return stub

    monkeypatch.setattr(processors, "is_torchvision_available", lambda: True)
    monkeypatch.setattr(AutoProcessor, "from_pretrained", from_pretrained)
    processor = load_processor(folder)
    # Without backend="pil", which video processors do not support.
    assert calls == [{"folder": str(folder), "trust_remote_code": False}]
    assert type(processor.image_processor).__name__.endswith("Pil")


@pytest.mark.parametrize("placeholder", ["<video>", "<IMG_CONTEXT>"])
def test_placeholder_in_text_is_neutralized(
    placeholder: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    processor = load_processor(families.shared_folder("internvl", tmp_path_factory))
    Image.new("RGB", (64, 48)).save(tmp_path / "image.png")
    turn = Turn("x", tmp_path / "image.png", f"What of {placeholder}?", "A cat.")
    usual = Turn("x", tmp_path / "image.png", "What of it?", "A cat.")
    counts = [
        int((encode(processor, [item], "right")["input_ids"] == processor.image_token_id).sum())
        for item in (turn, usual)
    ]
    assert counts[0] == counts[1]
    assert f"< {placeholder[1:]}" in render(processor, turn).text


@pytest.mark.parametrize(
    "change", [{"text_config": None}, {"text_config": {"model_type": "llama"}}, {"vision_config": None}]
)
def test_config_far_larger_than_weights_raises(change: dict[str, object], tmp_path: Path) -> None:
    families.build("llava", tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    for load in (model_skeleton, lambda folder: load_model(folder, "fp32")):
        with raises_code("invalid-model", file=tmp_path) as caught:
            load(tmp_path)
        assert "text_config" in str(caught.value)
