"""The number of CPU threads depends on the size of the model, unless the user has set it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers import recipe
from vlm_unlearn.data.encoding import Turn
from vlm_unlearn.generation.hf import generate_texts
from vlm_unlearn.modeling import threads
from vlm_unlearn.modeling.loader import load_model, load_processor
from vlm_unlearn.modeling.threads import SMALL_MODEL, THREAD_VARIABLES, cpu_threads, limit_threads, threads_for
from vlm_unlearn.training.plan import plan
from vlm_unlearn.training.preview import preview
from vlm_unlearn.training.runner import run_plan


@pytest.fixture(autouse=True)
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sets three threads, as on a machine with three cores."""
    for name in THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with limit_threads(3):
        yield


def test_a_small_model_gets_one_thread() -> None:
    assert cpu_threads(SMALL_MODEL - 1) == 1
    assert cpu_threads(SMALL_MODEL) == 3


@pytest.mark.parametrize("name", THREAD_VARIABLES)
def test_the_number_of_the_user_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, name, "3")
    assert cpu_threads(1) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="threads are those of a CPU")
def test_generation_uses_the_number_for_the_model(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = load_model(tiny_model, "fp32").eval(), load_processor(tiny_model)
    numbers: list[int] = []
    model.register_forward_pre_hook(lambda *_: numbers.append(torch.get_num_threads()))
    model.get_decoder().register_forward_pre_hook(lambda *_: numbers.append(torch.get_num_threads()))
    answers = generate_texts(model, processor, [Turn("a", None, "what is it ?", None)], 3)
    assert set(numbers) == {1}
    assert torch.get_num_threads() == 3
    monkeypatch.setattr(threads, "SMALL_MODEL", 0)
    assert generate_texts(model, processor, [Turn("a", None, "what is it ?", None)], 3) == answers
    assert set(numbers) == {1, 3}
    with threads_for(model.to("meta")):
        assert torch.get_num_threads() == 3


def test_the_number_is_restored_after_an_error() -> None:
    with pytest.raises(KeyError), limit_threads(1):
        raise KeyError
    assert torch.get_num_threads() == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="threads are those of a CPU")
def test_training_uses_the_number_of_its_plan(tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path) -> None:
    config = recipe(tiny_model, training_sets["harmful"], tmp_path / "run", {"name": "gd"}, training={"max_steps": 1})
    planned = plan(config)
    assert (planned.threads, preview(config).threads) == (1, 1)
    numbers: list[int] = []
    run_plan(planned, lambda *_: numbers.append(torch.get_num_threads()))
    assert numbers == [1]
    assert torch.get_num_threads() == 3
