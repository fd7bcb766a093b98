"""Exported folders: the files that older readers use, bytes that do not depend on the past, and no leftovers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

import families
from vlm_unlearn.modeling import export
from vlm_unlearn.modeling.loader import load_processor
from vlm_unlearn.modeling.processors import save_processor

USES: dict[str, Callable[[Any], object]] = {
    "padded": lambda tokenizer: tokenizer(["a", "b c d"], padding=True),
    "padded to 16": lambda tokenizer: tokenizer(["a"], padding="max_length", max_length=16),
    "padded on the left": lambda tokenizer: tokenizer(["a", "b c d"], padding=True, padding_side="left"),
    "truncated": lambda tokenizer: tokenizer(["a b c d"], truncation=True, max_length=2),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_saved_processor_does_not_depend_on_its_use(
    family: str, use: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    processor = load_processor(families.shared_folder(family, tmp_path_factory))
    save_processor(processor, tmp_path / "before")
    USES[use](processor.tokenizer)
    save_processor(processor, tmp_path / "after")
    for file in (tmp_path / "before").iterdir():
        assert file.read_bytes() == (tmp_path / "after" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("family", families.FAMILIES)
def test_saved_processor_has_the_files_of_older_readers(
    family: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    processor = load_processor(families.shared_folder(family, tmp_path_factory))
    save_processor(processor, tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert settings["image_processor_type"] == processor.image_processor.to_dict()["image_processor_type"]
    assert settings["processor_class"]
    assert load_processor(tmp_path).image_processor.to_dict() == processor.image_processor.to_dict()


def test_leftovers_of_killed_exports_are_removed(tmp_path: Path) -> None:
    killed, running = tmp_path / ".out.0123456789ab.part", tmp_path / ".out.ba9876543210.part"
    others = [tmp_path / ".out2.0123456789ab.part", tmp_path / ".out.mine.part", tmp_path / "out"]
    for folder in (killed, running, *others):
        folder.mkdir()
        Path(f"{folder}.lock").touch()
    with FileLock(f"{running}.lock"):
        export._remove_leftovers(tmp_path, ".out.")
    assert not killed.exists()
    assert not Path(f"{killed}.lock").exists()
    assert running.is_dir()
    assert all(folder.is_dir() for folder in others)
