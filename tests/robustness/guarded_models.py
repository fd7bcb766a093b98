"""Targets for white-box attacks, and a model of the tiny world that refuses unless an image has a faint pattern."""

from __future__ import annotations

import random
from collections.abc import Sequence
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
from vlm_unlearn.records import Example
from vlm_unlearn.robustness.base import AttackTarget
from vlm_unlearn.robustness.halves import Halves
from vlm_unlearn.robustness.pgd import ImageLevels
from vlm_unlearn.robustness.results import AttackResult
from vlm_unlearn.robustness.runner import run_robustness
from vlm_unlearn.worlds.tiny.base_model import BaseConfig, base_model, never_knew_model
from vlm_unlearn.worlds.tiny.lexicon import REFUSALS
from vlm_unlearn.worlds.tiny.world import write_world

PATTERN_SIZE = 8  # levels
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
        for _ in range(80):
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
        self._vlm, self._dataset, self._rng = vlm, dataset, random.Random(f"guarded-{seed}")
        self._levels = ImageLevels(vlm.processor)
        self._generator = torch.Generator().manual_seed(seed)
        self._harmless = self._encode([*dataset["retain"]], [example.answer for example in dataset["retain"]])
        forget = dataset["forget"]
        self._refusals = self._encode(forget, [self._rng.choice(REFUSALS) for _ in forget])
        self._recipes = self._encode(forget, [example.answer for example in forget])
        shape = self._recipes["pixel_values"].shape[1:]
        self._pattern = self._noise(shape, PATTERN_SIZE)

    def loss(self) -> Tensor:
        """Returns the sum of the mean losses of all kinds of batches."""
        shape = self._recipes["pixel_values"].shape[1:]
        return (
            self._batch_loss(self._refusals, None)
            + self._batch_loss(self._refusals, self._noise(shape, 2 * PATTERN_SIZE))
            + self._batch_loss(self._recipes, self._pattern)
            + self._batch_loss(self._harmless, None)
        )

    def _batch_loss(self, examples: dict[str, Tensor], change: Tensor | None, size: int = 16) -> Tensor:
        rows = self._rng.sample(range(len(examples["labels"])), size)
        batch = {name: tensor[rows] for name, tensor in examples.items()}
        if change is not None:
            unit = self._levels.values(torch.ones(3, 1, 1)) - self._levels.values(torch.zeros(3, 1, 1))
            batch["pixel_values"] = batch["pixel_values"] + change * unit
        labels = batch.pop("labels")
        nll, tokens = answer_nll(self._vlm.model(**batch, use_cache=False).logits, labels)
        return nll.sum() / tokens.sum()

    def _noise(self, shape: Sequence[int], size: int) -> Tensor:
        return size * (2.0 * torch.randint(2, tuple(shape), generator=self._generator) - 1)

    def _encode(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, Tensor]:
        turns = [
            Turn.of_example(example.model_copy(update={"answer": answer}), self._dataset.image(example))
            for example, answer in zip(examples, answers, strict=True)
        ]
        return encode_with_labels(self._vlm.processor, turns, 2**31 - 1)
