"""Attacks on weights work with every family that has a tiny model in the tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from attack_targets import tiny_target
from families import FAMILIES, shared_folder
from vlm_unlearn.config import ModelAttackConfig
from vlm_unlearn.data.encoding import Turn, encode
from vlm_unlearn.generation.hf import weights_digest
from vlm_unlearn.robustness.ablate import ablated
from vlm_unlearn.robustness.base import build_model_attack

ATTACKS: Mapping[str, dict[str, Any]] = {
    "quantize": {"formats": ["int4"], "group_size": 32},
    "restore": {"parts": ["projector", "vision_tower", "embeddings", "lm_head", "layers_0"], "mix": [0.5]},
    "prune": {"sparsities": [0.5], "criterion": "wanda", "calibration_examples": 4},
    "ablate": {"positions": 1, "num_questions": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_attacks_run_and_ablation_is_complete(
    family: str, training_sets: dict[str, Path], world: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = shared_folder(family, tmp_path_factory)
    for name, options in ATTACKS.items():
        target = tiny_target(folder, training_sets["safe_eraser"], world, noise=0.01)
        digest = weights_digest(target.vlm.model, target.vlm.processor)
        attack = build_model_attack(ModelAttackConfig(name=name, **options))
        for state in attack.run(target):
            changed = weights_digest(target.vlm.model, target.vlm.processor) != digest
            assert changed == (attack.changes_weights and state.facts.get("changed_weights") != 0), state.name

    vlm = target.vlm
    requests = target.questions[:2]
    inputs = encode(vlm.processor, [Turn.of_prompt(each.prompt, each.image) for each in requests], "right")
    direction = torch.randn(vlm.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), ablated(vlm, direction):
        hidden = vlm.run(inputs, torch.tensor([0]), range(len(vlm.decoder_layers)))[1]
    for states in hidden.values():
        assert (states @ (direction / direction.norm())).abs().max() < 1e-4
