"""The same run writes the same bytes, whatever the processor was called with before it was saved."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import families
from helpers import recipe
from vlm_unlearn.data.encoding import Turn, encode, encode_with_labels
from vlm_unlearn.modeling.loader import load_processor
from vlm_unlearn.modeling.processors import save_processor
from vlm_unlearn.store import digest_file
from vlm_unlearn.training.runner import run_recipe

PICTURE = Path("picture.png")


def turns(folder: Path) -> list[Turn]:
    Image.new("RGB", (64, 48), (200, 30, 30)).save(folder / PICTURE)
    return [Turn(str(i), folder / PICTURE, "What is it? " * (i + 1), "A kite.") for i in range(2)]


USES: dict[str, Callable[[Any, Path], object]] = {
    "training": lambda processor, folder: encode_with_labels(processor, turns(folder), 2048),
    "generation": lambda processor, folder: encode(processor, turns(folder), "left"),
    "padding to a length": lambda processor, folder: processor.tokenizer("a", padding="max_length", max_length=9),
    "truncation": lambda processor, folder: processor.tokenizer("a b c d", truncation=True, max_length=3),
    "multiple": lambda processor, folder: processor.tokenizer(["a", "b c"], padding=True, pad_to_multiple_of=8),
}


def digests(folder: Path) -> dict[str, str]:
    return {file.name: digest_file(file) for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3"])
def test_saved_processor_does_not_depend_on_its_last_call(
    family: str, use: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = families.shared_folder(family, tmp_path_factory)
    save_processor(load_processor(folder), tmp_path / "fresh")
    processor = load_processor(folder)
    USES[use](processor, tmp_path)
    save_processor(processor, tmp_path / "used")
    assert digests(tmp_path / "used") == digests(tmp_path / "fresh")
    save_processor(load_processor(tmp_path / "used"), tmp_path / "again")
    assert digests(tmp_path / "again") == digests(tmp_path / "used")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_warm_caches_do_not_change_the_bytes_of_a_model(
    mode: str, tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLM_UNLEARN_CACHE", str(tmp_path / "cache"))
    written = []
    for _ in ("cold", "warm"):  # the references of npo and the image features
        model = run_recipe(
            recipe(
                tiny_model,
                training_sets["harmful"],
                tmp_path / "run",
                "npo",
                trainable={"mode": mode},
                training={"max_steps": 2, "feature_cache": "disk"},
            )
        )
        written.append(digests(model))
        shutil.rmtree(tmp_path / "run")
    assert written[0] == written[1]
