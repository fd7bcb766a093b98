"""Pruning removes the weights that each criterion ranks lowest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from attack_targets import tiny_target
from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.data.encoding import Turn, encode
from vlm_unlearn.errors import UserError
from vlm_unlearn.records import Example
from vlm_unlearn.robustness.base import AttackTarget
from vlm_unlearn.robustness.prune import Prune, PruneOptions, _input_norms, prune


def with_examples(target: AttackTarget, **examples: Sequence[Example]) -> AttackTarget:
    dataset = UnlearningDataset(examples, [], {}, target.dataset.folder, target.dataset.image_roots)
    return AttackTarget(**{**vars(target), "dataset": dataset})


def test_magnitude_removes_the_smallest_weights_of_the_layer() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, 6.0]])
    prune(weight, 0.5)
    assert weight.tolist() == [[0, 0, 0], [-4, 5, 6]]


def test_wanda_removes_the_smallest_products_of_each_output() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, 6.0]])
    prune(weight, 0.4, torch.tensor([10.0, 1.0, 1.0]))  # products 10, 2, 3 and 40, 5, 6
    assert weight.tolist() == [[1, 0, 3], [-4, 0, 6]]


@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
def test_sparsities_are_states_in_ascending_order(
    criterion: str, tiny_model: Path, training_sets: dict[str, Path], world: Path
) -> None:
    target = tiny_target(tiny_model, training_sets["safe_eraser"], world)
    layers = target.vlm.decoder_linears()
    others = {name: parameter.clone() for name, parameter in target.vlm.model.named_parameters()}
    options = PruneOptions.model_validate(
        {"criterion": criterion, "sparsities": [0.5, 0.25], "calibration_examples": 8, "batch_size": 4}
    )
    states = Prune(options).run(target)
    curve = {"magnitude": "prune", "wanda": "prune/wanda"}[criterion]
    removed: dict[str, torch.Tensor] = {}
    for sparsity in (0.25, 0.5):
        state = next(states)
        assert (state.name, state.curve, state.step) == (f"{curve}/{sparsity}", curve, sparsity)
        for name, layer in layers.items():
            zeros = layer.weight == 0
            assert zeros.float().mean() == sparsity
            assert zeros[removed[name]].all() if removed.get(name) is not None else True
            removed[name] = zeros
    for name, parameter in target.vlm.model.named_parameters():
        if name.removesuffix(".weight") not in layers:
            assert torch.equal(parameter, others[name])


def test_norms_of_inputs_do_not_count_padding(tiny_model: Path, training_sets: dict[str, Path], world: Path) -> None:
    target = tiny_target(tiny_model, training_sets["safe_eraser"], world)
    layers = target.vlm.decoder_linears()
    examples = target.examples("retain")[:6]
    turns = [Turn.of_example(example, target.image(example)) for example in examples]
    assert len({encode(target.vlm.processor, [turn], "right")["input_ids"].shape for turn in turns}) > 1
    small = with_examples(target, retain=examples)
    padded, single = (_input_norms(small, layers, PruneOptions(batch_size=size)) for size in (6, 1))
    for name in layers:
        torch.testing.assert_close(padded[name], single[name])


def test_wanda_needs_a_retain_set(tiny_model: Path, training_sets: dict[str, Path], world: Path) -> None:
    target = tiny_target(tiny_model, training_sets["safe_eraser"], world)
    without = with_examples(target, forget=target.examples("forget"))
    with pytest.raises(UserError) as error:
        next(Prune(PruneOptions(criterion="wanda")).run(without))
    assert error.value.code == "no-records"
