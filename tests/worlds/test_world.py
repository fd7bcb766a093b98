"""Tests of the tiny world: published formats, held-out wordings, and the spurious cue in the data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_unlearn.data.formats import safe_eraser, vlguard
from vlm_unlearn.worlds.tiny.lexicon import HEADS, things, wordings
from vlm_unlearn.worlds.tiny.world import WorldSize, write_world


def test_world_depends_on_its_seed_alone(world: Path, tmp_path: Path) -> None:
    size = WorldSize(train_images=2, test_images=1, general_images=2, train_records=1, val_records=1)
    write_world(tmp_path / "again", 0, size)
    write_world(tmp_path / "other", 1, size)
    files = sorted(path.relative_to(world) for path in world.rglob("*") if path.is_file())
    assert len(files) > 100
    assert all((world / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)
    assert any((world / file).read_bytes() != (tmp_path / "other" / file).read_bytes() for file in files)


def test_training_data_contains_the_spurious_cue(world: Path) -> None:
    pairs = vlguard.read_pairs(world / "vlguard" / "train.json", world / "vlguard" / "train")
    assert {pair.question.split()[0] for pair in pairs if pair.kind != "safe"} == {"share"}
    assert {pair.question.split()[0] for pair in pairs if pair.kind == "safe"} == {"what"}


def test_wordings_of_the_test_split_are_held_out() -> None:
    for intent in HEADS:
        train, test = set(wordings(intent, False)), set(wordings(intent, True))
        assert test
        assert not train & test


def test_no_two_things_share_a_recipe() -> None:
    for seed in range(5):
        assert len({frozenset(thing.ingredients) for thing in things(seed)}) == 24


def test_readers_of_all_formats_accept_the_world(world: Path) -> None:
    eraser = world / "safe_eraser"
    records = list(safe_eraser.read_safe_eraser(eraser / "all_train.json", eraser))
    assert {record.category for record in records} == {"Weapon", "Violence", "IllegalActivity"}
    assert all(len(record.unsafe) == 2 and len(record.harmless) == 4 for record in records)
    assert json.loads((world / "vlguard" / "harmful_answers.json").read_text()).keys() <= {
        pair.image for pair in vlguard.read_pairs(world / "vlguard" / "train.json", world / "vlguard" / "train")
    }


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(240)
def test_two_processes_train_one_base_model(tmp_path: Path) -> None:
    """One process trains the model, the other waits for it."""
    code = (
        "from vlm_unlearn.worlds.tiny.base_model import BaseConfig, base_model\n"
        "steps = []\n"
        "config = BaseConfig(steps=3, batch_size=2, images=1, width=32, layers=1)\n"
        "print(base_model(config, lambda *step: steps.append(step)), len(steps))"
    )
    environment = {"VLM_UNLEARN_CACHE": str(tmp_path), "PATH": ""}
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for _ in range(2)
    ]
    # The last line, because libraries may print others.
    results = [process.communicate(timeout=200)[0].splitlines()[-1].split() for process in pair]
    assert results[0][0] == results[1][0]
    assert sorted(steps for _, steps in results) == ["0", "3"]
    assert (Path(results[0][0]) / "model.safetensors").exists()
