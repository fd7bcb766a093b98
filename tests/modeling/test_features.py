"""With the feature cache a frozen vision tower runs each image once, and outputs are bitwise the same."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel, Trainer

import families
from helpers import raises_code, recipe
from vlm_unlearn.config import Recipe
from vlm_unlearn.data.encoding import Turn, encode_with_labels
from vlm_unlearn.modeling import features as module
from vlm_unlearn.modeling.features import FeatureCache, Features, cache_vision_features
from vlm_unlearn.modeling.loader import load_model, load_processor
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.store import RunDirectory
from vlm_unlearn.training import runner
from vlm_unlearn.training.inputs import Inputs
from vlm_unlearn.training.method_trainer import MethodTrainer
from vlm_unlearn.training.plan import plan
from vlm_unlearn.training.runner import run_recipe

IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
FEATURES = {"-2": torch.zeros(4, 8)}  # 128 bytes
ROOM_FOR_FOUR = 4 * 128


@pytest.fixture
def tower() -> Any:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
    )
    return CLIPVisionModel(config).eval().requires_grad_(False)


@contextmanager
def count_images(tower: Any) -> Iterator[list[int]]:
    """Collects the number of images in each call to the tower's embeddings."""
    runs: list[int] = []
    hook = tower.embeddings.register_forward_hook(lambda _module, _inputs, output: runs.append(len(output)))
    yield runs
    hook.remove()


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("layers", [None, -2, -1, [-2, 1]])
def test_cached_features_equal_tower_output(tower: Any, layers: Any, on_disk: bool, tmp_path: Path) -> None:
    # One by one, as the cache computes them: processors without AVX-512 round a batch of another size differently.
    expected = [tower(image, output_hidden_states=layers, return_dict=True) for image in IMAGES.split(1)]
    cache_vision_features(tower, FeatureCache(2**20, tmp_path if on_disk else None))
    with count_images(tower) as runs:
        for order in ([0, 1, 0], [1, 1], [0, 2, 1]):
            outputs = tower(IMAGES[order], output_hidden_states=layers, return_dict=True)
            if layers is None or layers == -1:
                assert outputs.last_hidden_state.equal(torch.cat([expected[i].last_hidden_state for i in order]))
            for layer in [layers] if isinstance(layers, int) else layers or []:
                assert outputs.hidden_states[layer].equal(torch.cat([expected[i].hidden_states[layer] for i in order]))
    assert runs == [1, 1, 1]  # each image once, on its own


def test_cache_distinguishes_image_dtype_shape_layer_and_autocast(tower: Any) -> None:
    cache_vision_features(tower, FeatureCache(2**20))
    with count_images(tower) as runs:
        for image in (IMAGES[:1], IMAGES[1:2], IMAGES[:1].double(), IMAGES[:1].reshape(1, 3, 64, 16)):
            tower.to(image.dtype)(image, interpolate_pos_encoding=True)
        tower.float()(IMAGES[:1], output_hidden_states=-2)
        with torch.autocast("cpu", torch.bfloat16):
            tower(IMAGES[:1])
        assert runs == [1] * 6
        tower(IMAGES[:1])
    assert runs == [1] * 6


def test_full_cache_still_reuses_features_of_previous_call(tower: Any) -> None:
    cache_vision_features(tower, FeatureCache(1))
    with count_images(tower) as runs:
        for numbers in ([0, 1], [0, 1], [2], [0]):
            tower(IMAGES[numbers], output_hidden_states=-2)
    assert runs == [1] * 4


def test_calls_for_all_hidden_states_are_not_cached(tower: Any) -> None:
    cache_vision_features(tower, FeatureCache(2**20))
    with count_images(tower) as runs:
        for _ in range(2):
            assert len(tower(IMAGES, output_hidden_states=True).hidden_states) == 4
    assert runs == [3, 3]


def test_cache_with_gradient_checkpointing_equals_tower_output(tower: Any) -> None:
    """The trainer sets the entire model to training mode with checkpointing, the frozen tower included."""
    expected = torch.cat([tower(image, output_hidden_states=-2).hidden_states[-2] for image in IMAGES.split(1)])
    cache_vision_features(tower, FeatureCache(2**20))
    tower.activation_checkpointing_enable({"use_reentrant": False})
    tower.train()
    for images in (IMAGES, IMAGES.clone().requires_grad_()):
        features = tower(images, output_hidden_states=-2).hidden_states[-2]
        assert features.equal(expected)
        assert not features.requires_grad


@pytest.mark.parametrize("family", ["llava", "llava_next", "gemma3", "internvl", "idefics3", "mllama"])
def test_cache_keeps_logits_of_family(family: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = families.shared_folder(family, tmp_path_factory)
    model, processor = load_model(folder, "fp32").eval(), load_processor(folder)
    turns = []
    for number, size in enumerate(((64, 48), (30, 70), (64, 48))):
        Image.new("RGB", size, (90 * (number % 2), 120, 30)).save(tmp_path / f"{number}.png")
        turns.append(Turn(str(number), tmp_path / f"{number}.png", "what is this ?", "a cat ."))
    batch = encode_with_labels(processor, turns, 2048)
    with torch.no_grad():
        expected = model(**batch).logits
        cache_vision_features(VisionLanguageModel(model).vision_tower, FeatureCache(2**20))
        for _ in range(2):
            torch.testing.assert_close(model(**batch).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("on_disk", [False, True])
def test_cache_never_evicts_entries_of_this_run(on_disk: bool, tmp_path: Path) -> None:
    """Every epoch uses all images in turn, and finds as many as there is room for."""
    cache = FeatureCache(ROOM_FOR_FOUR, tmp_path if on_disk else None)
    for _ in range(2):
        hits = []
        for key in "abcdef":
            if cache.get(key) is None:
                cache.put(key, FEATURES)
            else:
                hits.append(key)
    assert hits == ["a", "b", "c", "d"]
    cache.put("large", {"-2": torch.zeros(ROOM_FOR_FOUR)})
    assert cache.get("large") is None
    if on_disk:
        assert sorted(file.stem for file in tmp_path.iterdir()) == ["a", "b", "c", "d"]


def test_put_evicts_least_recently_used_file_of_earlier_runs(tmp_path: Path) -> None:
    for number, key in enumerate("abcd"):
        FeatureCache(2**20, tmp_path).put(key, FEATURES)
        os.utime(tmp_path / f"{key}.safetensors", (number, number))
    size = (tmp_path / "a.safetensors").stat().st_size
    cache = FeatureCache(4 * size, tmp_path)
    assert cache.get("a") is not None
    assert cache.get("e") is None
    cache.put("e", FEATURES)
    assert sorted(file.stem for file in tmp_path.iterdir()) == ["a", "c", "d", "e"]


def test_smaller_limit_evicts_files_at_once(tmp_path: Path) -> None:
    for number, key in enumerate("abcd"):
        FeatureCache(2**20, tmp_path).put(key, FEATURES)
        os.utime(tmp_path / f"{key}.safetensors", (number, number))
    assert FeatureCache(2**20, tmp_path).get("a") is not None  # used again, so it stays
    size = (tmp_path / "a.safetensors").stat().st_size
    FeatureCache(2 * size, tmp_path)
    assert sorted(file.stem for file in tmp_path.iterdir()) == ["a", "d"]


def test_truncated_and_deleted_files_are_misses(tmp_path: Path) -> None:
    cache, cache_of_other_process = FeatureCache(2**20, tmp_path), FeatureCache(2**20, tmp_path)
    features: Features = {"-2": torch.arange(32.0).reshape(4, 8)}
    file = tmp_path / "a.safetensors"
    for damage in (lambda: os.truncate(file, file.stat().st_size - 40), lambda: os.truncate(file, 0), file.unlink):
        cache.put("a", features)
        damage()
        assert cache.get("a") is None
        cache.put("a", features)
        assert cache.get("a")["-2"].equal(features["-2"])  # type: ignore[index]
    assert cache_of_other_process.get("a")["-2"].equal(features["-2"])  # type: ignore[index]


def test_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = FeatureCache(2**20, tmp_path)

    def full(_features: Features, part: Path) -> None:
        part.write_bytes(b"begun")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    cache.put("a", FEATURES)
    assert cache.get("a") is None
    assert not list(tmp_path.iterdir())


def test_file_deleted_while_opened_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors opens a file twice. If it is gone the second time, torch does not raise an OSError."""
    cache = FeatureCache(2**20, tmp_path)
    cache.put("a", FEATURES)

    def delete_and_load(file: Path) -> Features:
        file.unlink()
        return {"-2": torch.from_file(str(file), size=1)}

    with monkeypatch.context() as patches:
        patches.setattr(module, "load_file", delete_and_load)
        assert cache.get("a") is None
    cache.put("a", FEATURES)
    assert cache.get("a") is not None


def test_read_only_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in "ab":
        FeatureCache(2**20, tmp_path).put(key, FEATURES)

    def deny(*_arguments: Any, **_options: Any) -> None:
        raise PermissionError("read-only")  # file modes do not restrict root, who may run the tests

    monkeypatch.setattr(os, "utime", deny)
    monkeypatch.setattr(Path, "unlink", deny)
    monkeypatch.setattr(module, "save_file", deny)
    cache = FeatureCache(1, tmp_path)
    assert cache.get("a") is not None
    cache.put("c", {"-2": torch.zeros(1, 0)})
    assert sorted(file.stem for file in tmp_path.iterdir()) == ["a", "b"]


def test_folder_that_cannot_be_created_raises(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with raises_code("output-not-writable", file=tmp_path / "cache" / "features") as caught:
        FeatureCache(2**20, tmp_path / "cache" / "features")
    assert "VLM_UNLEARN_CACHE" in str(caught.value)


def test_temp_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stale, live = tmp_path / f".a.{dead.pid}.part", tmp_path / f".b.{os.getppid()}.part"
    for file in (stale, live):
        file.write_bytes(b"begun")
    FeatureCache(2**20, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [live.name]


@pytest.mark.slow
def test_training_gives_same_weights_with_and_without_cache(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run with `disk` uses the files of the first."""
    monkeypatch.setenv("VLM_UNLEARN_CACHE", str(tmp_path / "cache"))
    trained = []
    for feature_cache in ("off", "memory", "disk", "disk"):
        training = {
            "feature_cache": feature_cache,
            "feature_cache_gb": 1,
            "gradient_checkpointing": True,
            "max_steps": 2,
        }
        output = tmp_path / str(len(trained))
        trained.append(run_recipe(recipe(tiny_model, training_sets["harmful"], output, "npo", training=training)))
    assert list((tmp_path / "cache" / "features").rglob("*.safetensors"))
    uncached, *cached = (load_file(model / "model.safetensors") for model in trained)
    assert all(weights[name].equal(uncached[name]) for weights in cached for name in uncached)


def cached_towers(configured: Recipe, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Returns the vision towers whose features a run caches, without training."""
    towers: list[object] = []

    def cache(tower: object, _cache: FeatureCache) -> Callable[[], None]:
        towers.append(tower)
        return lambda: None

    monkeypatch.setattr(module, "cache_vision_features", cache)
    monkeypatch.setattr(Trainer, "train", lambda *_args: None)
    planned = plan(configured)
    configured.output.mkdir()
    run = RunDirectory(configured.output)
    MethodTrainer(runner._load_parts(planned, run, runner._training_arguments(planned, run), Inputs())).train()
    return towers


@pytest.mark.parametrize(
    ("changes", "is_cached"),
    [
        ({}, True),
        ({"training": {"feature_cache": "off"}}, False),
        ({"trainable": {"vision_tower": True}}, False),
    ],
)
def test_run_caches_features_of_frozen_tower_only(
    tiny_model: Path,
    training_sets: dict[str, Path],
    tmp_path: Path,
    changes: dict[str, Any],
    is_cached: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    towers = cached_towers(recipe(tiny_model, training_sets["harmful"], tmp_path / "run", "ga", **changes), monkeypatch)
    assert bool(towers) == is_cached


def test_run_does_not_cache_tower_that_contains_projector(
    training_sets: dict[str, Path],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = families.shared_folder("qwen2_5_vl", tmp_path_factory)
    towers = cached_towers(recipe(folder, training_sets["harmful"], tmp_path / "run", "ga"), monkeypatch)
    assert not towers, "its features would not change while the projector is trained"
