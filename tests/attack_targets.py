"""Targets of attacks on a model, for tests on a tiny model with random weights."""

from __future__ import annotations

from pathlib import Path

import torch

from vlm_unlearn.config import RobustnessSuite, load
from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.evaluation.prompts import split_prompts
from vlm_unlearn.generation.base import build_requests
from vlm_unlearn.modeling.loader import load_model, load_processor
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.robustness.base import AttackTarget
from vlm_unlearn.robustness.halves import Halves


def tiny_suite(world: Path) -> RobustnessSuite:
    """Returns the shipped suite of the tiny world, without attacks."""
    suite = load(RobustnessSuite, Path("suites/tiny_robustness"), values={"root": str(world)})
    return suite.model_copy(update={"small": [], "full": []})


def tiny_target(model: Path, data: Path, world: Path, noise: float = 0.0) -> AttackTarget:
    """Returns a model as a target, whose base model is itself without the noise.

    Args:
        model: The model folder.
        data: The training set.
        world: The tiny world.
        noise: Standard deviation of the noise that is added to all weights but the vision tower's.
    """
    suite = tiny_suite(world)
    vlm = VisionLanguageModel(load_model(model, "fp32"), load_processor(model))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in vlm.model.named_parameters():
        if vlm.component(name) != "vision tower":
            parameter.data += noise * torch.randn(parameter.shape, generator=generator)
    assert suite.harmless is not None
    harmful, harmless = split_prompts(suite.questions), split_prompts(suite.harmless)
    roots = {split.name: split.images for split in (suite.questions, suite.harmless)}
    dataset = UnlearningDataset.from_folder(data)
    return AttackTarget(
        vlm=vlm,
        base_folder=model,
        load_base=lambda: VisionLanguageModel(load_model(model, "fp32"), load_processor(model)),
        questions=build_requests(harmful, roots, {}),
        harmless=build_requests(harmless, roots, {}),
        dataset=dataset,
        halves=Halves(suite.halves, dataset["forget"], harmful, 0),
        generation=suite.generation,
        image_roots=roots,
        seed=0,
    )
