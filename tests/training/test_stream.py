"""The stream of training examples is a function of seed and position, with paired decouple examples."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

from vlm_unlearn.config import MethodConfig
from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.methods import build_method
from vlm_unlearn.training.stream import UnlearningStream


def stream(
    folder: Path, method: str, weight: float = 0.0, seed: int = 0, length: int = 60, group_by_image: bool | str = False
) -> UnlearningStream:
    return UnlearningStream(
        UnlearningDataset.from_folder(folder),
        build_method(MethodConfig(name=method), weight),
        length,
        seed,
        group_by_image,
    )


def test_each_epoch_contains_every_forget_example_once_in_a_new_order(training_sets: dict[str, Path]) -> None:
    examples = stream(training_sets["safe_eraser"], "npo")
    first, second = ([examples[i]["forget"].id for i in range(start, start + 24)] for start in (0, 24))
    assert sorted(first) == sorted(second)
    assert len(set(first)) == 24
    assert first != second


def test_stream_is_a_function_of_seed_and_position(training_sets: dict[str, Path]) -> None:
    first, second, other_seed = (stream(training_sets["safe_eraser"], "po", 1.0, seed) for seed in (3, 3, 4))
    assert [first[i] for i in range(60)] == [second[i] for i in reversed(range(60))][::-1]
    assert [first[i] for i in range(60)] != [other_seed[i] for i in range(60)]


def test_decouple_examples_are_paired_with_their_forget_examples(training_sets: dict[str, Path]) -> None:
    examples = stream(training_sets["safe_eraser"], "po", 1.0)
    for position in range(len(examples)):
        item = examples[position]
        assert item["decouple"].pair_id == item["forget"].pair_id
        assert item["decouple"].question == item["forget"].question


def test_po_trains_on_refusals_and_npo_on_original_answers(training_sets: dict[str, Path]) -> None:
    refusals = set(UnlearningDataset.from_folder(training_sets["safe_eraser"]).refusals)
    examples = stream(training_sets["safe_eraser"], "po")
    answers = {examples[i]["forget"].answer for i in range(60)}
    assert answers == refusals
    assert stream(training_sets["safe_eraser"], "npo")[0]["forget"].answer not in refusals


def test_group_by_image_retain_orders_only_the_retain_set(training_sets: dict[str, Path]) -> None:
    """The forget set has its usual order, and each epoch of the retain set still contains every example once."""
    folder = training_sets["safe_eraser"]
    usual, matched = stream(folder, "npo"), stream(folder, "npo", group_by_image="retain")
    assert [usual[i]["forget"] for i in range(60)] == [matched[i]["forget"] for i in range(60)]
    examples = UnlearningDataset.from_folder(folder)["retain"]
    for start in (0, len(examples)):
        epoch = [matched[i]["retain"].id for i in range(start, start + len(examples))]
        assert sorted(epoch) == sorted(example.id for example in examples)

    def common(items: UnlearningStream) -> int:
        return sum(items[i]["retain"].image == items[i]["forget"].image for i in range(len(examples)))

    forget_images = Counter(matched[i]["forget"].image for i in range(len(examples)))
    retain_images = Counter(example.image for example in examples)
    assert common(matched) == (forget_images & retain_images).total() > common(usual)
    backward = [matched[i] for i in reversed(range(60))][::-1]
    assert backward == [matched[i] for i in range(60)], "a function of seed and position"


def test_group_by_image_keeps_the_questions_of_an_image_together(training_sets: dict[str, Path]) -> None:
    """Each epoch contains every example once, grouped by image, and has its own order of images."""
    examples = stream(training_sets["safe_eraser"], "npo", group_by_image=True)
    epochs = [[examples[i]["forget"] for i in range(start, start + 24)] for start in (0, 24)]
    assert len({example.id for example in epochs[0]}) == 24
    orders = [list(dict.fromkeys(example.image for example in epoch)) for epoch in epochs]
    for epoch, order in zip(epochs, orders, strict=True):
        changes = sum(previous.image != example.image for previous, example in pairwise(epoch))
        assert changes == len(order) - 1
    assert orders[0] != orders[1]
    retain = [examples[i]["retain"].image for i in range(24)]
    assert list(dict.fromkeys(retain))[:3] == orders[0][:3]
