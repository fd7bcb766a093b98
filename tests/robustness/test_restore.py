"""Partial restoration puts exactly the named parts back, and mixtures are linear."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from attack_targets import tiny_target
from vlm_unlearn.errors import UserError
from vlm_unlearn.robustness.base import AttackTarget
from vlm_unlearn.robustness.restore import Restore, RestoreOptions, _single_parts


@pytest.fixture
def target(tiny_model: Path, training_sets: dict[str, Path], world: Path) -> AttackTarget:
    return tiny_target(tiny_model, training_sets["safe_eraser"], world, noise=0.01)


def parameters(target: AttackTarget) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in target.vlm.model.named_parameters()}


def test_each_part_is_put_back_alone(target: AttackTarget) -> None:
    parts = ["projector", "vision_tower", "embeddings", "lm_head", "layers", "layers_0-1"]
    originals = parameters(target)
    base = dict(target.load_base().model.named_parameters())
    prefixes = {
        "projector": "model.multi_modal_projector.",
        "vision_tower": "model.vision_tower.",
        "embeddings": "model.language_model.embed_tokens.",
        "lm_head": "lm_head.",
        "layers_0": "model.language_model.layers.0.",
        "layers_1": "model.language_model.layers.1.",
        "layers_0-1": "model.language_model.layers.",
    }
    names = []
    for state in Restore(RestoreOptions(parts=parts, mix=[])).run(target):
        names.append(state.name)
        prefix = prefixes[state.name.removeprefix("restore/")]
        for name, parameter in target.vlm.model.named_parameters():
            assert torch.equal(parameter, base[name] if name.startswith(prefix) else originals[name]), name
        assert state.facts["changed_weights"] == pytest.approx(
            0 if state.name == "restore/vision_tower" else 1, abs=0.1
        )
    assert names == [f"restore/{part}" for part in prefixes]
    assert parameters(target).keys() == originals.keys()
    assert all(torch.equal(parameter, originals[name]) for name, parameter in parameters(target).items())


def test_mixtures_are_a_curve_from_the_model_to_its_base(target: AttackTarget) -> None:
    originals = parameters(target)
    base = dict(target.load_base().model.named_parameters())
    states = Restore(RestoreOptions(parts=[], mix=[1, 0.25, -0.5])).run(target)
    for share in (-0.5, 0.25, 1):
        state = next(states)
        assert (state.name, state.curve, state.step) == (f"restore/mix/{share:g}", "restore/mix", share)
        for name, parameter in target.vlm.model.named_parameters():
            torch.testing.assert_close(parameter, (1 - share) * originals[name] + share * base[name])
    assert all(torch.equal(parameter, base[name]) for name, parameter in target.vlm.model.named_parameters())


def test_tied_output_weights_are_restored_with_the_embeddings(target: AttackTarget) -> None:
    model = target.vlm.model
    model.lm_head.weight = model.get_input_embeddings().weight
    target_base = target.load_base()
    target_base.model.lm_head.weight = target_base.model.get_input_embeddings().weight
    tied = AttackTarget(**{**vars(target), "load_base": lambda: target_base})
    for state in Restore(RestoreOptions(parts=["embeddings", "lm_head"], mix=[])).run(tied):
        assert state.facts["changed_weights"] == pytest.approx(1, abs=0.1)
        assert torch.equal(model.lm_head.weight, target_base.model.lm_head.weight)


def test_quarters_are_ranges_of_layers() -> None:
    assert _single_parts(["quarters"], 32) == ["layers_0-7", "layers_8-15", "layers_16-23", "layers_24-31"]
    assert _single_parts(["quarters", "layers_2"], 3) == ["layers_0-0", "layers_1-1", "layers_2-2", "layers_2"]
    assert _single_parts(["layers", "layers_1"], 2) == ["layers_0", "layers_1"]


@pytest.mark.parametrize("part", ["layers_1-0", "layers_x", "head", ""])
def test_other_parts_are_rejected(part: str) -> None:
    with pytest.raises(ValueError, match="parts"):
        RestoreOptions(parts=[part])


def test_a_layer_must_exist(target: AttackTarget) -> None:
    with pytest.raises(UserError) as error:
        next(Restore(RestoreOptions(parts=["layers_1-2"])).run(target))
    assert (error.value.code, error.value.field) == ("out-of-range", "parts")


def test_the_base_model_must_have_the_same_weights(target: AttackTarget) -> None:
    base = target.load_base()
    del base.model.model.language_model.layers[1]
    other = AttackTarget(**{**vars(target), "load_base": lambda: base})
    with pytest.raises(UserError) as error:
        next(Restore().run(other))
    assert (error.value.code, error.value.field) == ("model-mismatch", "base")
