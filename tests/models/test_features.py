"""A frozen vision tower runs each image once, and nobody can tell from the numbers."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel

import families
from helpers import recipe
from vlm_unlearn.data.encoding import Turn, encode_with_labels
from vlm_unlearn.errors import UserError
from vlm_unlearn.models import features as module
from vlm_unlearn.models.features import FeatureCache, Features, cache_vision_features
from vlm_unlearn.models.layout import vision_tower
from vlm_unlearn.models.loader import load_model, load_processor
from vlm_unlearn.training import runner
from vlm_unlearn.training.plan import plan
from vlm_unlearn.training.runner import run_recipe

IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
VALUE = {"-2": torch.zeros(4, 8)}  # 128 bytes
ROOM = 4 * 128


@pytest.fixture
def tower() -> Any:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
    )
    return CLIPVisionModel(config).eval().requires_grad_(False)


@contextmanager
def counted(tower: Any) -> Iterator[list[int]]:
    """Collects how many images each call to the tower's first part has."""
    runs: list[int] = []
    hook = tower.embeddings.register_forward_hook(lambda _module, _inputs, output: runs.append(len(output)))
    yield runs
    hook.remove()


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("layers", [None, -2, -1, [-2, 1]])
def test_features_are_the_towers_own(tower: Any, layers: Any, on_disk: bool, tmp_path: Path) -> None:
    plain = copy.deepcopy(tower)
    cache_vision_features(tower, FeatureCache(2**20, tmp_path if on_disk else None))
    wanted = plain(IMAGES, output_hidden_states=layers)
    with counted(tower) as runs:
        for order in ([0, 1, 0], [1, 1], [0, 2, 1]):
            found = tower(IMAGES[order], output_hidden_states=layers, return_dict=True)
            if layers is None or layers == -1:
                assert found.last_hidden_state.equal(wanted.last_hidden_state[order])
            for layer in [layers] if isinstance(layers, int) else layers or []:
                assert found.hidden_states[layer].equal(wanted.hidden_states[layer][order])
    assert runs == [1, 1, 1]  # each image once, on its own


def test_what_decides_the_features_is_told_apart(tower: Any) -> None:
    cache_vision_features(tower, FeatureCache(2**20))
    with counted(tower) as runs:
        for image in (IMAGES[:1], IMAGES[1:2], IMAGES[:1].double(), IMAGES[:1].reshape(1, 3, 64, 16)):
            tower.to(image.dtype)(image, interpolate_pos_encoding=True)
        tower.float()(IMAGES[:1], output_hidden_states=-2)
        with torch.autocast("cpu", torch.bfloat16):
            tower(IMAGES[:1])
        assert runs == [1] * 6
        tower(IMAGES[:1])
    assert runs == [1] * 6


def test_a_step_runs_an_image_once_where_the_cache_has_no_room(tower: Any) -> None:
    cache_vision_features(tower, FeatureCache(1))
    with counted(tower) as runs:
        for numbers in ([0, 1], [0, 1], [2], [0]):
            tower(IMAGES[numbers], output_hidden_states=-2)
    assert runs == [1] * 4


def test_calls_of_another_kind_are_left_alone(tower: Any) -> None:
    cache_vision_features(tower, FeatureCache(2**20))
    with counted(tower) as runs:
        for _ in range(2):
            assert len(tower(IMAGES, output_hidden_states=True).hidden_states) == 4
    assert runs == [3, 3]


def test_in_training_mode_with_checkpointing(tower: Any) -> None:
    """As the trainer leaves it: the whole model in training mode and checkpointed, the tower frozen."""
    wanted = tower(IMAGES, output_hidden_states=-2).hidden_states[-2]
    cache_vision_features(tower, FeatureCache(2**20))
    tower.activation_checkpointing_enable({"use_reentrant": False})
    tower.train()
    for images in (IMAGES, IMAGES.clone().requires_grad_()):
        found = tower(images, output_hidden_states=-2).hidden_states[-2]
        assert found.equal(wanted)
        assert not found.requires_grad


@pytest.mark.parametrize("family", ["llava", "llava_next", "gemma3", "internvl", "idefics3", "mllama"])
def test_every_family_says_the_same(family: str, tmp_path: Path) -> None:
    families.build(family, tmp_path / "model")
    model, processor = load_model(tmp_path / "model", "fp32").eval(), load_processor(tmp_path / "model")
    turns = []
    for number, size in enumerate(((64, 48), (30, 70), (64, 48))):
        Image.new("RGB", size, (90 * (number % 2), 120, 30)).save(tmp_path / f"{number}.png")
        turns.append(Turn(str(number), tmp_path / f"{number}.png", "what is this ?", "a cat ."))
    batch = encode_with_labels(processor, turns, 2048)
    with torch.no_grad():
        wanted = model(**batch).logits
        cache_vision_features(vision_tower(model), FeatureCache(2**20))
        for _ in range(2):
            torch.testing.assert_close(model(**batch).logits, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_a_run_asks_for_stays(on_disk: bool, tmp_path: Path) -> None:
    """Epochs ask for all images in turn: as many are found in each as there is room for."""
    cache = FeatureCache(ROOM, tmp_path if on_disk else None)
    for _ in range(2):
        found = []
        for key in "abcdef":
            if cache.get(key) is None:
                cache.put(key, VALUE)
            else:
                found.append(key)
    assert found == ["a", "b", "c", "d"]
    cache.put("large", {"-2": torch.zeros(ROOM)})
    assert cache.get("large") is None
    if on_disk:
        assert sorted(file.stem for file in tmp_path.iterdir()) == ["a", "b", "c", "d"]


def test_older_files_make_room(tmp_path: Path) -> None:
    for number, key in enumerate("abcd"):
        FeatureCache(2**20, tmp_path).put(key, VALUE)
        os.utime(tmp_path / f"{key}.safetensors", (number, number))
    size = (tmp_path / "a.safetensors").stat().st_size
    cache = FeatureCache(4 * size, tmp_path)
    assert cache.get("a") is not None
    assert cache.get("e") is None
    cache.put("e", VALUE)
    assert sorted(file.stem for file in tmp_path.iterdir()) == ["a", "c", "d", "e"]


def test_a_smaller_limit_makes_room_at_once(tmp_path: Path) -> None:
    for number, key in enumerate("abcd"):
        FeatureCache(2**20, tmp_path).put(key, VALUE)
        os.utime(tmp_path / f"{key}.safetensors", (number, number))
    assert FeatureCache(2**20, tmp_path).get("a") is not None  # used again, so it stays
    size = (tmp_path / "a.safetensors").stat().st_size
    FeatureCache(2 * size, tmp_path)
    assert sorted(file.stem for file in tmp_path.iterdir()) == ["a", "d"]


def test_files_that_are_torn_gone_or_another_process_s(tmp_path: Path) -> None:
    cache, other = FeatureCache(2**20, tmp_path), FeatureCache(2**20, tmp_path)
    value: Features = {"-2": torch.arange(32.0).reshape(4, 8)}
    file = tmp_path / "a.safetensors"
    for harm in (lambda: os.truncate(file, file.stat().st_size - 40), lambda: os.truncate(file, 0), file.unlink):
        cache.put("a", value)
        harm()
        assert cache.get("a") is None
        cache.put("a", value)
        assert cache.get("a")["-2"].equal(value["-2"])  # type: ignore[index]
    assert other.get("a")["-2"].equal(value["-2"])  # type: ignore[index]


def test_a_full_disk_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = FeatureCache(2**20, tmp_path)

    def full(_features: Features, part: Path) -> None:
        part.write_bytes(b"begun")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    cache.put("a", VALUE)
    assert cache.get("a") is None
    assert not list(tmp_path.iterdir())


def test_a_file_that_goes_while_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors opens a file twice; what torch says when it is gone at the second time is no OSError."""
    cache = FeatureCache(2**20, tmp_path)
    cache.put("a", VALUE)

    def gone(file: Path) -> Features:
        file.unlink()
        return {"-2": torch.from_file(str(file), size=1)}

    with monkeypatch.context() as during:
        during.setattr(module, "load_file", gone)
        assert cache.get("a") is None
    cache.put("a", VALUE)
    assert cache.get("a") is not None


def test_a_folder_that_can_only_be_read_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in "ab":
        FeatureCache(2**20, tmp_path).put(key, VALUE)

    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise PermissionError("not yours")  # tests may run as root, who may do anything

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(module, "save_file", refuse)
    cache = FeatureCache(1, tmp_path)
    assert cache.get("a") is not None
    cache.put("c", {"-2": torch.zeros(1, 0)})
    assert sorted(file.stem for file in tmp_path.iterdir()) == ["a", "b"]


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(
        UserError, match=r"cache/features: no features can be kept there \(Not a directory\); let VLM_U"
    ):
        FeatureCache(2**20, tmp_path / "cache" / "features")


def test_what_a_killed_writer_left_goes(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, of_another = tmp_path / f".a.{dead.pid}.part", tmp_path / f".b.{os.getppid()}.part"
    for part in (left, of_another):
        part.write_bytes(b"begun")
    FeatureCache(2**20, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [of_another.name]


def test_training_gives_the_same_weights(tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path) -> None:
    """Also with the features that a run before has left on disk."""
    trained = []
    for kept in ("off", "memory", "disk", "disk"):
        wanted = {"feature_cache": kept, "feature_cache_gb": 1, "gradient_checkpointing": True}
        output = tmp_path / str(len(trained))
        trained.append(run_recipe(recipe(tiny_model, training_sets["harmful"], output, "npo", training=wanted)))
    without, *with_features = (load_file(model / "model.safetensors") for model in trained)
    assert all(found[name].equal(without[name]) for found in with_features for name in without)


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, True),
        ({"training": {"feature_cache": "off"}}, False),
        ({"trainable": {"vision_tower": True}}, False),
    ],
)
def test_a_tower_that_trains_is_left_alone(
    tiny_model: Path,
    training_sets: dict[str, Path],
    tmp_path: Path,
    changes: dict[str, Any],
    kept: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[object] = []
    monkeypatch.setattr(runner, "cache_vision_features", lambda tower, _cache: given.append(tower))
    run_recipe(recipe(tiny_model, training_sets["harmful"], tmp_path / "run", "ga", **changes))
    assert bool(given) == kept


def test_a_projector_in_the_tower_keeps_the_cache_out(
    training_sets: dict[str, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    families.build("qwen2_5_vl", tmp_path / "model")
    planned = plan(recipe(tmp_path / "model", training_sets["harmful"], tmp_path / "run", "ga"))
    given: list[object] = []
    monkeypatch.setattr(runner, "cache_vision_features", lambda tower, _cache: given.append(tower))
    runner._keep_features(planned, load_model(tmp_path / "model", "fp32"))
    assert not given, "its features would stand still while the projector trains"
