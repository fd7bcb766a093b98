"""What a step trains on is a function of seed and position; decouple samples are paired."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from vlm_unlearn.config import MethodConfig
from vlm_unlearn.data.training_set import read_training_set
from vlm_unlearn.methods import build_method
from vlm_unlearn.training.stream import UnlearningStream


def stream(
    folder: Path, method: str, weight: float = 0.0, seed: int = 0, length: int = 60, by_image: bool = False
) -> UnlearningStream:
    return UnlearningStream(
        read_training_set(folder), build_method(MethodConfig(name=method), weight), length, seed, by_image
    )


def test_each_pass_sees_every_forget_example_once(training_sets: dict[str, Path]) -> None:
    found = stream(training_sets["safe_eraser"], "npo")
    first, second = ([found[i]["forget"].id for i in range(start, start + 24)] for start in (0, 24))
    assert sorted(first) == sorted(second)
    assert len(set(first)) == 24
    assert first != second


def test_it_is_a_function_of_seed_and_position(training_sets: dict[str, Path]) -> None:
    one, again, other = (stream(training_sets["safe_eraser"], "po", 1.0, seed) for seed in (3, 3, 4))
    assert [one[i] for i in range(60)] == [again[i] for i in reversed(range(60))][::-1]
    assert [one[i] for i in range(60)] != [other[i] for i in range(60)]


def test_decouple_samples_belong_to_their_forget_samples(training_sets: dict[str, Path]) -> None:
    found = stream(training_sets["safe_eraser"], "po", 1.0)
    for position in range(len(found)):
        item = found[position]
        assert item["decouple"].pair_id == item["forget"].pair_id
        assert item["decouple"].question == item["forget"].question


def test_po_answers_with_refusals_and_npo_with_what_is_given(training_sets: dict[str, Path]) -> None:
    refusals = set(read_training_set(training_sets["safe_eraser"]).refusals)
    answers = {stream(training_sets["safe_eraser"], "po")[i]["forget"].answer for i in range(60)}
    assert answers == refusals
    assert stream(training_sets["safe_eraser"], "npo")[0]["forget"].answer not in refusals


def test_by_image_keeps_an_image_s_questions_together(training_sets: dict[str, Path]) -> None:
    """In each pass every example still comes once, each image's in one row, and the next pass has the images in another order."""
    found = stream(training_sets["safe_eraser"], "npo", by_image=True)
    passes = [[found[i]["forget"] for i in range(start, start + 24)] for start in (0, 24)]
    assert len({example.id for example in passes[0]}) == 24
    orders = [list(dict.fromkeys(example.image for example in one)) for one in passes]
    for one, order in zip(passes, orders, strict=True):
        changes = sum(before.image != after.image for before, after in pairwise(one))
        assert changes == len(order) - 1
    assert orders[0] != orders[1]
    retain = [found[i]["retain"].image for i in range(24)]
    assert list(dict.fromkeys(retain))[:3] == orders[0][:3]
