"""The tiny world: published formats, held-out wordings, the mirage's cue in the data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from vlm_unlearn.data.formats import safe_eraser, vlguard
from vlm_unlearn.tiny_world.lexicon import HEADS, things, wordings
from vlm_unlearn.tiny_world.world import WorldSize, write_world


def test_the_world_is_a_function_of_its_seed(world: Path, tmp_path: Path) -> None:
    size = WorldSize(train_images=2, test_images=1, general_images=2, train_records=1, val_records=1)
    write_world(tmp_path / "again", 0, size)
    write_world(tmp_path / "other", 1, size)
    files = sorted(path.relative_to(world) for path in world.rglob("*") if path.is_file())
    assert len(files) > 100
    assert all((world / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)
    assert any((world / file).read_bytes() != (tmp_path / "other" / file).read_bytes() for file in files)


def test_the_spurious_cue_is_in_the_training_data(world: Path) -> None:
    pairs = vlguard.read_pairs(world / "vlguard" / "train.json", world / "vlguard" / "train")
    assert {pair.question.split()[0] for pair in pairs if pair.kind != "safe"} == {"share"}
    assert {pair.question.split()[0] for pair in pairs if pair.kind == "safe"} == {"what"}


def test_wordings_of_the_test_are_held_out() -> None:
    for intent in HEADS:
        train, test = set(wordings(intent, False)), set(wordings(intent, True))
        assert test
        assert not train & test


def test_no_two_things_share_a_recipe() -> None:
    for seed in range(5):
        assert len({frozenset(thing.ingredients) for thing in things(seed)}) == 24


def test_every_format_reads_back(world: Path) -> None:
    eraser = world / "safe_eraser"
    records = list(safe_eraser.read_safe_eraser(eraser / "all_train.json", eraser))
    assert {record.category for record in records} == {"Weapon", "Violence", "IllegalActivity"}
    assert all(len(record.unsafe) == 2 and len(record.harmless) == 4 for record in records)
    assert json.loads((world / "vlguard" / "harmful_answers.json").read_text()).keys() <= {
        pair.image for pair in vlguard.read_pairs(world / "vlguard" / "train.json", world / "vlguard" / "train")
    }


def test_two_processes_train_one_base(tmp_path: Path) -> None:
    """The second waits for the first and finds what it made."""
    code = (
        "from vlm_unlearn.tiny_world.base_model import BaseConfig, base_model\n"
        "steps = []\n"
        "print(base_model(BaseConfig(steps=3, batch_size=2, images=1, width=32, layers=1), lambda *step: steps.append(step)), len(steps))"
    )
    environment = {"VLM_UNLEARN_CACHE": str(tmp_path), "PATH": ""}
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for _ in range(2)
    ]
    answers = [
        process.communicate(timeout=120)[0].splitlines()[-1].split() for process in pair
    ]  # above it, what a library says
    assert answers[0][0] == answers[1][0]
    assert sorted(steps for _, steps in answers) == ["0", "3"]
    assert (Path(answers[0][0]) / "model.safetensors").exists()
