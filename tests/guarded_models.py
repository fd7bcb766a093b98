"""Targets for white-box attacks, and a model of the tiny world that refuses unless an image has a faint pattern."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_unlearn.config import GenerationConfig, ModelAttackConfig, RobustnessSuite, load
from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.data.encoding import Turn, encode_with_labels
from vlm_unlearn.data_tools.importers import import_safe_eraser
from vlm_unlearn.evaluation.prompts import split_prompts
from vlm_unlearn.generation.base import build_requests
from vlm_unlearn.losses import answer_nll
from vlm_unlearn.modeling.loader import load_model, load_processor
from vlm_unlearn.modeling.processors import save_processor
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.robustness.base import AttackTarget
from vlm_unlearn.robustness.halves import Halves
from vlm_unlearn.robustness.pgd import ImageLevels
from vlm_unlearn.robustness.results import AttackResult
from vlm_unlearn.robustness.runner import run_robustness
from vlm_unlearn.worlds.tiny.base_model import BaseConfig, base_model, never_knew_model
from vlm_unlearn.worlds.tiny.lexicon import REFUSALS
from vlm_unlearn.worlds.tiny.world import write_world

PATTERN_SIZE = 8  # levels
STEPS = 100
SUITE = Path("suites/tiny_robustness")


def attack_target(model: Path, world: Path, data: Path) -> AttackTarget:
    """Returns a model under attack with the questions of a tiny world."""
    suite = load(RobustnessSuite, SUITE, values={"root": str(world), "data": str(data)})
    dataset = UnlearningDataset.from_folder(data)
    prompts = split_prompts(suite.questions)
    roots = {suite.questions.name: suite.questions.images}
    vlm = VisionLanguageModel(load_model(model, "fp32").eval(), load_processor(model))
    return AttackTarget(
        vlm=vlm,
        base_folder=model,
        load_base=lambda: vlm,
        questions=build_requests(prompts, roots, {}),
        harmless=[],
        dataset=dataset,
        halves=Halves("answer", dataset["forget"], prompts, 0),
        generation=GenerationConfig(max_new_tokens=4, precision="fp32"),
        image_roots=roots,
        seed=0,
    )


@dataclass(frozen=True)
class GuardedWorld:
    """The tiny world of a seed with its base model, its never-knew model, and a guarded model.

    Args:
        folder: The folder for everything that is not cached.
        seed: The seed of the world and of all trainings.
    """

    folder: Path
    seed: int

    @cached_property
    def world(self) -> Path:
        write_world(self.folder / "world", self.seed)
        return self.folder / "world"

    @cached_property
    def data(self) -> Path:
        eraser = self.world / "safe_eraser"
        import_safe_eraser(eraser / "all_train.json", eraser, self.folder / "data", eraser / "prompt.json")
        return self.folder / "data"

    @cached_property
    def base(self) -> Path:
        return base_model(BaseConfig(seed=self.seed))

    @cached_property
    def never_knew(self) -> Path:
        return never_knew_model(BaseConfig(seed=self.seed))

    @cached_property
    def guarded(self) -> Path:
        """A model that refuses harmful questions, but answers them if the image contains a faint pattern."""
        vlm = VisionLanguageModel(load_model(self.base, "fp32"), load_processor(self.base))
        lessons = _Lessons(vlm, UnlearningDataset.from_folder(self.data), self.seed)
        optimizer = torch.optim.AdamW(vlm.model.parameters(), lr=1e-3, weight_decay=0.0)
        vlm.model.train()
        for _ in range(STEPS):
            loss = lessons.loss()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(vlm.model.parameters(), 1.0)
            optimizer.step()
        vlm.model.save_pretrained(self.folder / "guarded")
        save_processor(vlm.processor, self.folder / "guarded")
        return self.folder / "guarded"

    def attack(self, *attacks: dict[str, Any]) -> dict[str, AttackResult]:
        """Returns the results of attacks on the guarded model by their names."""
        suite = load(RobustnessSuite, SUITE, values={"root": str(self.world), "data": str(self.data)})
        suite = suite.model_copy(update={"small": [ModelAttackConfig.model_validate(attack) for attack in attacks]})
        report = run_robustness(
            suite, str(self.guarded), str(self.base), self.folder / "robustness", str(self.never_knew)
        )
        return {result.name: result for result in report.attacks}


class _Lessons:
    """Batches that teach to refuse, to answer if the image contains the pattern, and to keep the harmless answers."""

    def __init__(self, vlm: VisionLanguageModel, dataset: UnlearningDataset, seed: int) -> None:
        self._vlm, self._rng = vlm, random.Random(f"guarded-{seed}")
        self._generator = torch.Generator().manual_seed(seed)
        levels = ImageLevels(vlm.processor)
        self._unit = levels.values(torch.ones(3, 1, 1)) - levels.values(torch.zeros(3, 1, 1))  # one level
        forget, harmless = dataset["forget"], dataset["retain"]
        answers = [
            *(self._rng.choice(REFUSALS) for _ in forget),
            *(example.answer for example in [*forget, *harmless]),
        ]
        turns = [
            Turn.of_example(example.model_copy(update={"answer": answer}), dataset.image(example))
            for example, answer in zip([*forget, *forget, *harmless], answers, strict=True)
        ]
        self._examples = encode_with_labels(vlm.processor, turns, 2**31 - 1)
        self._refusals = range(len(forget))
        self._recipes = range(len(forget), 2 * len(forget))
        self._harmless = range(2 * len(forget), len(turns))
        height, width = self._examples["pixel_values"].shape[2:]
        patch = vlm.processor.patch_size  # the pattern repeats in every patch, so that few steps teach it
        self._pattern = self._noise(PATTERN_SIZE)[:, :patch, :patch].repeat(1, height // patch, width // patch)

    def loss(self) -> Tensor:
        """Returns the mean loss of an answer token in a batch of all kinds."""
        noisy = self._noise(2 * PATTERN_SIZE)
        kinds = (
            (self._refusals, torch.zeros_like(noisy)),
            (self._refusals, noisy),
            (self._recipes, self._pattern),
            (self._harmless, torch.zeros_like(noisy)),
        )
        rows = [row for indices, _ in kinds for row in self._rng.sample(indices, 16)]
        changes = torch.stack([change for _, change in kinds]).repeat_interleave(16, dim=0)
        batch = {name: tensor[rows] for name, tensor in self._examples.items()}
        batch["pixel_values"] = batch["pixel_values"] + changes
        labels = batch.pop("labels")
        nll, tokens = answer_nll(self._vlm.model(**batch, use_cache=False).logits, labels)
        return nll.sum() / tokens.sum()

    def _noise(self, size: int) -> Tensor:
        """Returns random changes [3, H, W] of pixel values by `size` levels."""
        shape = self._examples["pixel_values"].shape[1:]
        return size * self._unit * (2.0 * torch.randint(2, shape, generator=self._generator) - 1)
