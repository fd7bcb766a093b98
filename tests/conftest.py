"""Shared fixtures. All data and models are created locally."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest

from answer_visits import visit  # noqa: F401  (fixtures for all tests)
from browser import browser  # noqa: F401

SHARED = Path(__file__).parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the files with the longest tests first, so that no process waits for another one at the end."""
    seconds: dict[Path, float] = {}
    for item in items:
        marker = item.get_closest_marker("timeout")
        if marker is not None:
            seconds[item.path] = max(seconds.get(item.path, 0.0), float(marker.args[0]))
    items.sort(key=lambda item: -seconds.get(item.path, 0.0))


def pytest_collection_finish() -> None:
    """Excludes the objects of all imports from garbage collection, a third of a second each time after a training."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A separate cache for the session, so that no test reads files of an earlier run.

    The processes of pytest-xdist share it, so that one of them trains the base models of the tiny world for all.
    """
    base = tmp_path_factory.getbasetemp()
    folder = base.parent / "cache" if "PYTEST_XDIST_WORKER" in os.environ else tmp_path_factory.mktemp("cache")
    folder.mkdir(exist_ok=True)
    os.environ["VLM_UNLEARN_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _command_tree_is_built_once() -> Iterator[None]:
    """Builds the parsers of ``vlm-unlearn`` once for all tests that run it in process. They take 40 ms to build."""
    import typer.main

    with patch("typer.main.get_command", functools.cache(typer.main.get_command)):
        yield


@pytest.fixture(scope="session")
def vlguard_test() -> Path:
    """The real VLGuard annotations, if they are available."""
    path = SHARED / "data" / "vlguard_test.json"
    if not path.exists():
        pytest.skip("needs the real VLGuard annotations (shared/data), which are not distributed with the project")
    return path


@pytest.fixture(scope="session")
def golden_pipeline() -> dict[str, object]:
    import json

    path = SHARED / "golden" / "data_pipeline.json"
    if not path.exists():
        pytest.skip("needs shared/golden/data_pipeline.json")
    return json.loads(path.read_text())


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny world in a small size."""
    from vlm_unlearn.worlds.tiny.world import WorldSize, write_world

    folder = tmp_path_factory.mktemp("world") / "world"
    write_world(folder, 0, WorldSize(train_images=2, test_images=1, general_images=2, train_records=1, val_records=1))
    return folder


@pytest.fixture(scope="session")
def training_sets(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The training sets of the small tiny world, by name."""
    from vlm_unlearn.data_tools.importers import import_safe_eraser, import_vlguard

    folder = tmp_path_factory.mktemp("training-sets")
    vlguard, eraser = world / "vlguard", world / "safe_eraser"
    general = world / "general" / "general.json"
    import_vlguard(
        vlguard / "train.json",
        vlguard / "train",
        folder / "harmful",
        vlguard / "harmful_answers.json",
        external=general,
    )
    import_vlguard(vlguard / "train.json", vlguard / "train", folder / "refusals", include_safe_image_unsafe=True)
    import_safe_eraser(eraser / "all_train.json", eraser, folder / "safe_eraser", eraser / "prompt.json")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA with random weights, whose vocabulary contains the words of the tiny world."""
    import torch

    from vlm_unlearn.worlds.tiny.lexicon import vocabulary
    from vlm_unlearn.worlds.tiny.llava import tiny_llava, tiny_processor

    folder = tmp_path_factory.mktemp("tiny-model")
    processor = tiny_processor(vocabulary())
    torch.manual_seed(0)
    tiny_llava(processor, width=32, vision_layers=1, layers=2).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def empty_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves plots as empty drawings. Drawing takes seconds, and tests/reporting does it."""
    from matplotlib.figure import Figure

    monkeypatch.setattr("vlm_unlearn.reporting.charts.matplotlib_charts.draw_chart", lambda chart: Figure())
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: Path(path).write_text("<svg/>"))
