"""White-box attacks and probes work with every family, or name the family as unsupported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attack_targets import tiny_target
from families import FAMILIES, shared_folder
from vlm_unlearn.config import ModelAttackConfig
from vlm_unlearn.errors import UserError
from vlm_unlearn.generation.hf import generate_batch, weights_digest
from vlm_unlearn.robustness.base import build_model_attack

ATTACKS: Mapping[str, dict[str, Any]] = {
    "pgd": {"epsilons": [4], "steps": 2, "universal_steps": 2},
    "soft_prompt": {"vectors": 2, "steps": [2], "batch_size": 4},
    "probe": {"batch_size": 4},
}

# Their processors make crops, tiles or patches of an image.
WITHOUT_PGD = {
    *("llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mllama", "idefics3", "smolvlm"),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_attacks_run_and_answers_are_generated(
    family: str, training_sets: dict[str, Path], world: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = shared_folder(family, tmp_path_factory)
    target = tiny_target(folder, training_sets["safe_eraser"], world)
    target = replace(target, generation=target.generation.model_copy(update={"max_new_tokens": 3}))
    processor, digest = target.vlm.processor, weights_digest(target.vlm.model, target.vlm.processor)
    names, errors = [], []
    for name, options in ATTACKS.items():
        try:
            for state in build_model_attack(ModelAttackConfig(name=name, **options)).run(target):
                names.append(state.name)
                if state.scores is None:
                    requests = (target.questions if state.requests is None else state.requests)[:3]
                    responses = generate_batch(target.vlm.model, target.vlm.processor, requests, target.generation)
                    assert all(response.error is None for response in responses)
        except UserError as error:
            errors.append((name, error.code))
        assert target.vlm.processor is processor
    assert weights_digest(target.vlm.model, target.vlm.processor) == digest
    assert {"soft_prompt/2", "probe/likelihood", "probe/linear/0", "probe/logit_lens/0"} <= set(names)
    assert errors == ([("pgd", "unsupported-family")] if family in WITHOUT_PGD else [])
    assert ({"pgd/4", "pgd/universal/16", "pgd/random/16"} <= set(names)) == (family not in WITHOUT_PGD)
