"""Training data from a folder and from memory gives equal batches and equal weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from PIL import Image
from torch.utils.data import DataLoader

from helpers import raises_code, recipe
from trained import RMU, StepScene, changed_names, weights
from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.records import Example
from vlm_unlearn.training.plan import plan
from vlm_unlearn.training.runner import run_plan, run_recipe

COLUMNS = ("id", "question", "answer", "category", "pair_id", "source")


def image_file(data: UnlearningDataset, example: Example) -> Path:
    file = data.image(example)
    assert isinstance(file, Path)
    return file


def row(example: Example, **changes: Any) -> dict[str, Any]:
    return {name: getattr(example, name) for name in COLUMNS} | changes


def with_pil_images(data: UnlearningDataset) -> UnlearningDataset:
    """A DatasetDict with one split per role and a decoded image column."""
    return UnlearningDataset.from_any(
        DatasetDict(
            {
                role: Dataset.from_list(
                    [row(example, image=Image.open(image_file(data, example)).copy()) for example in examples]
                )
                for role, examples in data.items()
            }
        )
    )


def with_bytes(data: UnlearningDataset) -> UnlearningDataset:
    """A Dataset with a role column and the bytes of the files."""
    rows = [
        row(example, role=role, image=image_file(data, example).read_bytes())
        for role, examples in data.items()
        for example in examples
    ]
    return UnlearningDataset.from_any(Dataset.from_list(rows))


def with_messages(data: UnlearningDataset) -> UnlearningDataset:
    """Rows with messages and images, as in TRL."""

    def chat(example: Example) -> dict[str, Any]:
        messages = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": example.question}]},
            {"role": "assistant", "content": [{"type": "text", "text": example.answer}]},
        ]
        images = [Image.open(image_file(data, example))]
        return {"id": example.id, "pair_id": example.pair_id, "messages": messages, "images": images}

    return UnlearningDataset.from_any({role: [chat(example) for example in data[role]] for role in data})


FORMS: Sequence[Callable[[UnlearningDataset], UnlearningDataset]] = (with_pil_images, with_bytes, with_messages)


def assert_equal_batches(left: Sequence[Mapping[str, Any]], right: Sequence[Mapping[str, Any]]) -> None:
    assert len(left) == len(right)
    for left_roles, right_roles in zip(left, right, strict=True):
        assert left_roles.keys() == right_roles.keys()
        for role, batch in left_roles.items():
            other = right_roles[role]
            assert batch.keys() == other.keys()
            for name in batch.keys() - {"images"}:
                assert torch.equal(batch[name], other[name]), name
            # Keys of images differ between files and memory, but group the same rows.
            assert torch.equal(*(keys[:, None] == keys[None, :] for keys in (batch["images"], other["images"])))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("name", "method", "weight"), [("harmful", "dpo", 0.0), ("harmful", RMU, 0.0), ("safe_eraser", "po", 1.0)]
)
def test_batches_from_memory_equal_those_from_a_folder(
    tiny_model: Path,
    training_sets: dict[str, Path],
    form: Callable[[UnlearningDataset], UnlearningDataset],
    name: str,
    method: object,
    weight: float,
) -> None:
    folder = StepScene(tiny_model, training_sets[name], method, weight)
    data = UnlearningDataset.from_folder(training_sets[name])
    memory = form(data)
    memory.refusals = data.refusals
    scene = StepScene(tiny_model, memory, method, weight)
    assert_equal_batches(folder.micro_batches(4, 3), scene.micro_batches(4, 3))


@pytest.mark.parametrize("form", FORMS)
def test_weights_from_memory_equal_those_from_a_folder(
    tiny_model: Path,
    training_sets: dict[str, Path],
    tmp_path: Path,
    form: Callable[[UnlearningDataset], UnlearningDataset],
) -> None:
    config = recipe(tiny_model, training_sets["harmful"], tmp_path / "run", "npo")
    planned = plan(config)
    memory = form(planned.training_set)
    planned = dataclasses.replace(planned, training_set=memory, data_digest=memory.fingerprint())
    trained = weights(run_plan(planned))
    folder = run_recipe(config.model_copy(update={"output": tmp_path / "folder"}))
    assert changed_names(trained, weights(folder)) == set()
    assert changed_names(trained, weights(tiny_model))


@pytest.mark.parametrize(
    ("form", "start"),
    [
        *((form, "fork") for form in FORMS),
        *(
            pytest.param(form, "spawn", marks=[pytest.mark.slow, pytest.mark.multiprocess])
            for form in (with_pil_images, with_messages)
        ),
    ],
)
def test_worker_processes_load_the_same_batches(
    tiny_model: Path,
    training_sets: dict[str, Path],
    form: Callable[[UnlearningDataset], UnlearningDataset],
    start: str,
) -> None:
    scene = StepScene(tiny_model, form(UnlearningDataset.from_folder(training_sets["safe_eraser"])), "npo")
    collator = scene.collator()
    batches = DataLoader(
        scene.stream(16), batch_size=4, num_workers=1, collate_fn=collator, multiprocessing_context=start
    )
    assert_equal_batches(list(batches), scene.micro_batches(4, 4))


def test_error_of_a_worker_names_the_record(tiny_model: Path, training_sets: dict[str, Path]) -> None:
    content = (training_sets["safe_eraser"] / "dataset.json").read_bytes()
    rows = [{"question": "what ?", "answer": "it .", "image": content, "role": role} for role in ("forget", "retain")]
    scene = StepScene(tiny_model, UnlearningDataset.from_any(Dataset.from_list(rows)), "gd")
    (error,) = DataLoader(scene.stream(1), num_workers=1, collate_fn=scene.collator())
    with raises_code("invalid-image", record='"forget-1"'):
        raise error
    with raises_code("invalid-image", record='"forget-1"'):
        scene.collator().check_lengths()


def test_group_by_image_groups_rows_with_the_same_content(tiny_model: Path, training_sets: dict[str, Path]) -> None:
    data = UnlearningDataset.from_folder(training_sets["safe_eraser"])
    scene = StepScene(tiny_model, with_bytes(data), "npo")
    stream = type(scene.stream(1))(scene.training_set, scene.method, 24, seed=0, group_by_image=True)
    images = [stream[position]["forget"].image for position in range(24)]
    changes = sum(left != right for left, right in pairwise(images))
    assert changes == len(set(images)) - 1 < 23
