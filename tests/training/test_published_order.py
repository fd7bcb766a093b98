"""``paper_compat: full``: the order of samples, the texts and the schedule of the released code, and exact resume."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import published_model as tiny
from helpers import raises_code, recipe
from trained import RMU
from vlm_unlearn.config import MethodConfig
from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.data.encoding import Turn, encode_with_labels
from vlm_unlearn.data.published_text import safe_eraser_turn, safety_mirage_turn
from vlm_unlearn.losses import IGNORED
from vlm_unlearn.methods import METHODS, Method, build_method
from vlm_unlearn.modeling.loader import load_processor
from vlm_unlearn.records import Example
from vlm_unlearn.training.plan import plan
from vlm_unlearn.training.published_order import (
    BatchLayout,
    build_stream,
    count_steps,
    count_warmup_steps,
    grouped_order,
)
from vlm_unlearn.training.runner import run_recipe

ONE = BatchLayout(1, 1, 1)


def data_of(forget: int, retain: int, decouple: int = 0) -> UnlearningDataset:
    """A training set with numbered examples."""
    examples = {
        role: [Example(id=f"{role}-{number}", question="q", answer="a", pair_id=str(number)) for number in range(count)]
        for role, count in (("forget", forget), ("retain", retain), ("decouple", decouple))
        if count
    }
    return UnlearningDataset(examples, ["no", "never"], {})


def method_of(name: str, weight: float = 0.0, **options: Any) -> Method:
    return build_method(MethodConfig.model_validate({"name": name, "paper_compat": "full", **options}), weight)


def ids(items: Sequence[dict[Any, Example]], role: str) -> list[int | None]:
    """Returns the numbers of a role's examples, None where an item has none."""
    return [int(item[role].id.split("-")[1]) if role in item else None for item in items]


def items_of(data: UnlearningDataset, method: Method, layout: BatchLayout, steps: int, seed: int = 0) -> list[Any]:
    stream = build_stream(data, method, layout, steps, seed)
    return [stream[position] for position in range(len(stream))]


# SafeEraser


def test_safe_eraser_steps_with_what_is_left_of_an_epoch() -> None:
    """Five samples and four accumulation steps: three batches of the second step are empty, the first ones."""
    items = items_of(data_of(5, 3), method_of("gd"), BatchLayout(1, 4, 1), steps=4)
    epoch = [0, 1, 2, 3, None, None, None, 4]
    assert ids(items, "forget") == epoch * 2
    assert all(("retain" in item) == ("forget" in item) for item in items)


def test_safe_eraser_fills_the_last_batches_of_several_processes_from_the_beginning() -> None:
    """Seven samples in batches of two on two processes: the fourth batch lacks one."""
    items = items_of(data_of(7, 3), method_of("gd"), BatchLayout(2, 1, 2), steps=2)
    assert ids(items, "forget") == [0, 1, 2, 3, 4, 5, 6, 0]
    items = items_of(data_of(7, 3), method_of("gd"), BatchLayout(2, 1, 1), steps=4)
    assert ids(items, "forget") == [0, 1, 2, 3, 4, 5, 6, None]


def test_safe_eraser_draws_retain_examples_with_replacement_and_decouple_examples_with_their_index() -> None:
    items = items_of(data_of(40, 10, decouple=40), method_of("gd", 0.5), ONE, steps=400)
    retain = ids(items, "retain")
    assert retain == ids(items, "decouple")
    counts = Counter(retain)
    assert set(counts) == set(range(10))
    assert all(20 < count < 60 for count in counts.values())  # about 40
    assert any(first == second for first, second in pairwise(retain))


def test_safe_eraser_with_fewer_decouple_than_retain_examples_is_an_error() -> None:
    with raises_code("conflicting-settings", field="method.paper_compat"):
        build_stream(data_of(4, 5, decouple=4), method_of("po", 1.0), ONE, 1, 0)


def test_safe_eraser_rounds_its_warm_up() -> None:
    assert [count_warmup_steps(method_of(name), 0.06, 20) for name in ("po", "npo")] == [1, 2]


# Safety Mirage


def test_safety_mirage_counts_epochs_over_the_retain_set() -> None:
    """On VLGuard's 1,023 unsafe images and 2,000 retain records, with the numbers of eight GPUs."""
    data = data_of(1023, 2500)
    npo, rmu = method_of("npo"), method_of("rmu")
    assert count_steps(data, npo, BatchLayout(1, 1, 8), 1, None) == 250
    assert count_steps(data, npo, BatchLayout(8, 1, 8), 10, None) == 320
    assert count_steps(data, rmu, BatchLayout(1, 1, 8), 10, None) == 2500
    assert count_steps(data, rmu, BatchLayout(1, 1, 8), 10, 7) == 7


def test_npo_begins_both_sets_anew_when_the_smaller_is_used_up() -> None:
    method = method_of("npo", retain_npo_weight=1.0)
    items = items_of(data_of(3, 5), method, ONE, steps=12)
    forget, second, retain = (ids(items, role) for role in ("forget", "retain_reference", "retain"))
    assert [sorted(forget[start : start + 3]) for start in (0, 3, 6, 9)] == [[0, 1, 2]] * 4  # type: ignore[type-var]
    assert all(len(set(second[start : start + 3])) == 3 for start in (0, 3, 6, 9))
    assert sorted(retain[:5]) == sorted(retain[5:10]) == [0, 1, 2, 3, 4]  # type: ignore[type-var]
    assert second[:5] != retain[:5]
    without = items_of(data_of(3, 5), method_of("npo"), ONE, steps=6)
    assert all(item.keys() == {"forget", "retain"} for item in without)


def test_rmu_trains_nothing_after_the_first_epoch_unless_alpha_is_zero() -> None:
    items = items_of(data_of(3, 5), method_of("rmu"), ONE, steps=12)
    assert sorted(ids(items[:5], "retain_reference")) == [0, 1, 2, 3, 4]  # type: ignore[type-var]
    assert [bool(item) for item in items] == [True] * 5 + [False] * 7
    assert all(items_of(data_of(3, 5), method_of("rmu", alpha=0.0), ONE, steps=12))


def test_last_batch_of_a_pass_is_smaller_on_one_process() -> None:
    items = items_of(data_of(5, 6), method_of("npo"), BatchLayout(4, 1, 1), steps=4)
    forget, retain = ids(items, "forget"), ids(items, "retain")
    assert [number is None for number in forget] == [False] * 5 + [True] * 3 + [False] * 5 + [True] * 3
    assert [number is None for number in retain] == [False] * 6 + [True] * 2 + [False] * 6 + [True] * 2


def test_each_process_of_safety_mirage_draws_its_own_retain_records() -> None:
    """The released code draws without a seed, so that two processes may read one record in an epoch."""
    items = items_of(data_of(8, 40), method_of("npo"), BatchLayout(2, 1, 2), steps=10)
    retain = ids(items, "retain")
    assert all(number is not None for number in retain)
    assert 10 < len(set(retain)) < 40
    assert sorted(ids(items, "forget")[:8]) == list(range(8))  # type: ignore[type-var]


@pytest.mark.parametrize("layout", [BatchLayout(4, 1, 1), BatchLayout(2, 1, 4), BatchLayout(3, 2, 2)])
def test_grouped_order_has_batches_of_one_modality_and_balanced_lengths(layout: BatchLayout) -> None:
    draw = random.Random(0)
    lengths = [draw.randrange(1, 40) for _ in range(101)] + [-draw.randrange(1, 40) for _ in range(50)]
    order = grouped_order(lengths, layout, random.Random(1))
    assert sorted(order) == list(range(151))
    size = layout.samples_per_step
    groups = [order[start : start + size] for start in range(0, 151, size)]
    complete = groups[: 101 // size + 50 // size]
    assert all(len({lengths[index] > 0 for index in group}) == 1 for group in complete)
    assert {lengths[group[0]] > 0 for group in complete} == {True, False}
    chunk = layout.batch_size
    for group in complete:
        sums = [sum(abs(lengths[index]) for index in group[start : start + chunk]) for start in range(0, size, chunk)]
        assert max(sums) - min(sums) <= 40
    assert grouped_order(lengths, layout, random.Random(2)) != order


@pytest.mark.parametrize("method", [method_of("po"), method_of("gd", 0.5), method_of("npo", retain_npo_weight=1.0)])
def test_stream_is_a_function_of_seed_and_position(method: Method) -> None:
    data, layout = data_of(7, 6, decouple=7), BatchLayout(2, 2, 2)
    first, second, other_seed = (build_stream(data, method, layout, 9, seed) for seed in (3, 3, 4))
    positions = range(len(first))
    assert [first[i] for i in positions] == [second[i] for i in reversed(positions)][::-1]
    assert [first[i] for i in positions] != [other_seed[i] for i in positions]


# Texts


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_processor(tiny.write_hf_model(tmp_path_factory.mktemp("model")), "pad")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("image") / "image.png"
    tiny.write_image(file)
    return file


def encoded_text(processor: Any, turn: Turn) -> tuple[str, str]:
    """Returns the text of a turn with one image token, and the text with labels."""
    batch = encode_with_labels(processor, [turn], 2048)
    tokens = processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    labels = [token for token in batch["labels"][0].tolist() if token != IGNORED]
    spelled = "".join(tokens).replace("<image>" * 4, "<image>")
    return spelled, "".join(processor.tokenizer.convert_ids_to_tokens(labels))


def test_text_of_safe_eraser_is_capitalized_and_has_no_end_token(processor: Any, image: Path) -> None:
    turn = safe_eraser_turn(Turn("x", image, "what Is THIS?", "it is McDonald. "), processor)
    text, labeled = encoded_text(processor, turn)
    assert text.startswith("<s>\u2581A\u2581chat\u2581between\u2581a\u2581curious\u2581human")
    assert text.endswith(
        "USER:\u2581<image>\u2581<0x0A>What\u2581is\u2581this?\u2581ASSISTANT:\u2581It\u2581is\u2581mcdonald.\u2581"
    )
    assert labeled == "\u2581It\u2581is\u2581mcdonald.\u2581"


def test_labels_of_safe_eraser_start_a_token_early_after_a_question_that_ends_in_a_blank(
    processor: Any, image: Path
) -> None:
    turn = safe_eraser_turn(Turn("x", image, "What? ", "A cat."), processor)
    assert encoded_text(processor, turn)[1] == ":\u2581A\u2581cat."


def test_text_of_safety_mirage_has_rounds_and_end_tokens(processor: Any, image: Path) -> None:
    turn = Turn("x", image, "And this?", "A dog", history=((" What is this? ", "A cat."),))
    text, labeled = encoded_text(processor, safety_mirage_turn(turn, processor))
    assert (
        "the\u2581user's\u2581questions.\u2581USER:\u2581<image>\u2581<0x0A>What\u2581is\u2581this?\u2581ASSISTANT:"
        in text
    )
    assert text.endswith("A\u2581cat.</s>\u2581USER:\u2581And\u2581this?\u2581ASSISTANT:\u2581A\u2581dog</s>")
    assert labeled == "\u2581A\u2581cat.</s>\u2581A\u2581dog</s>"


@pytest.mark.parametrize("published", [safe_eraser_turn, safety_mirage_turn])
def test_published_texts_contain_no_tokens_of_the_data(processor: Any, image: Path, published: Any) -> None:
    turn = published(Turn("x", image, "Is <image> this?", "A</s> cat."), processor)
    text, _ = encoded_text(processor, turn)
    assert text.count("<image>") == 1
    assert "A</s>" not in text
    with raises_code("empty-answer", record='"x"'):
        published(Turn("x", image, "What?", " "), processor)


# Errors and resume


@pytest.mark.parametrize(
    ("name", "weight", "options"),
    [
        ("simnpo", 0.0, {}),
        ("mixed_sft", 0.0, {}),
        ("npo", 0.5, {}),
        ("rmu", 0.5, {}),
        ("npo", 0.0, {"refusal_weight": 1}),
        ("gd", 0.0, {"max_nll": 5.0}),
    ],
)
def test_method_without_released_code_is_rejected(name: str, weight: float, options: dict[str, Any]) -> None:
    with raises_code("unsupported-setting", field="method.paper_compat"):
        method_of(name, weight, **options)


def test_methods_with_released_code() -> None:
    codes = {name: method.published_code for name, method in METHODS.built_in_items() if method.published_code}
    assert codes == dict.fromkeys(("ga", "gd", "kl", "po"), "safe_eraser") | dict.fromkeys(
        ("npo", "rmu"), "safety_mirage"
    )


@pytest.mark.parametrize(
    "changes", [{"defense": "sam"}, {"training": {"group_by_image": True}}], ids=["defense", "order"]
)
def test_settings_that_released_code_does_not_have_are_rejected(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    method = {"name": "gd", "paper_compat": "full"}
    with raises_code("conflicting-settings"):
        plan(recipe(tiny_model, training_sets["safe_eraser"], tmp_path / "run", method, **changes))
    assert not (tmp_path / "run").exists()


class InterruptedRunError(Exception):
    pass


@pytest.mark.parametrize(
    ("method", "data", "weight"),
    [
        ({"name": "kl"}, "safe_eraser", 0.0),
        ({"name": "po"}, "safe_eraser", 0.0),
        ({"name": "npo", "retain_npo_weight": 1.0}, "harmful", 0.0),
        ({**RMU, "alpha": 1.0}, "harmful", 0.0),
    ],
    ids=["kl", "po", "npo", "rmu"],
)
def test_interrupted_run_resumes_to_the_bit(
    tiny_model: Path, training_sets: dict[str, Path], tmp_path: Path, method: dict[str, Any], data: str, weight: float
) -> None:
    """Over the end of an epoch, with a step of fewer batches or without any."""
    retain = len(UnlearningDataset.from_folder(training_sets[data])["retain"])
    size = math.ceil(retain / 3)  # three batches of Safety Mirage's passes
    training = {"max_steps": 6, "per_device_train_batch_size": size, "gradient_accumulation_steps": 1, "save_steps": 1}
    if data == "safe_eraser":
        training |= {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5}

    def run(folder: str, stop: int | None = None) -> Path:
        def on_step(step: int, steps: int, terms: object) -> None:
            if step == stop:
                raise InterruptedRunError

        options = {**method, "paper_compat": "full"}
        changes = {"training": training, "prompt_decouple_weight": weight}
        return run_recipe(recipe(tiny_model, training_sets[data], tmp_path / folder, options, **changes), on_step)

    for step in (2, 4):
        with pytest.raises(InterruptedRunError):
            run("interrupted", step)
    models = [run("interrupted"), run("uninterrupted")]
    assert (models[0] / "model.safetensors").read_bytes() == (models[1] / "model.safetensors").read_bytes()
    logs = [(tmp_path / folder / "log.jsonl").read_text().splitlines() for folder in ("interrupted", "uninterrupted")]
    assert logs[0] == logs[1]
    losses = [json.loads(line)["loss"] for line in logs[0]]
    assert [loss != 0 for loss in losses] == [True] * 3 + [method["name"] != "rmu"] * 3
