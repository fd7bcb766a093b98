"""GPUs of workers, and trainings of several processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpers import raises_code
from helpers import recipe as tiny_recipe
from vlm_unlearn.errors import RunError
from vlm_unlearn.store import RunDirectory
from vlm_unlearn.sweeps.launch import Launcher, claim_gpus, visible_gpus


def test_workers_on_one_machine_get_different_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    with claim_gpus(2) as first:
        assert list(first) == ["4", "5"]
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")  # as another worker sees it
        with claim_gpus(1) as second:
            assert list(second) == ["7"]
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
            with raises_code("missing-gpu", field="--gpus-per-trial"), claim_gpus(1):
                pass
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    with claim_gpus(3) as all_gpus:
        assert list(all_gpus) == ["4", "5", "7"]


def test_machine_without_gpus_needs_no_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []
    with claim_gpus(4) as claimed:
        assert list(claimed) == []


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(600)
def test_training_runs_as_several_processes(tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_model, training_sets["harmful"], tmp_path / "run", "npo", training={"max_steps": 2})
    Launcher(2).train(recipe, tmp_path)
    run = RunDirectory(tmp_path / "run")
    assert run.is_finished
    assert run.read_manifest()["identity"]["processes"] == 2
    broken = recipe.model_copy(update={"data": tmp_path / "none", "output": tmp_path / "broken"})
    with pytest.raises(RunError) as caught:
        Launcher(2).train(broken, tmp_path)
    assert caught.value.code == "training-failed"
