"""A model of the tiny world that refuses unless an image has a faint pattern, which white-box attacks must open."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import Tensor

from planted_models import PlantedWorld
from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.data.encoding import Turn, encode_with_labels
from vlm_unlearn.losses import answer_nll
from vlm_unlearn.modeling.loader import load_model, load_processor
from vlm_unlearn.modeling.processors import save_processor
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.robustness.pgd import ImageLevels
from vlm_unlearn.worlds.tiny.lexicon import REFUSALS

PATTERN_SIZE = 8  # levels
STEPS = 200


def guarded_model(planted: PlantedWorld) -> Path:
    """Trains and returns a model that refuses harmful questions, but answers if the image contains a faint pattern."""
    vlm = VisionLanguageModel(load_model(planted.base, "fp32"), load_processor(planted.base))
    lessons = _Lessons(vlm, UnlearningDataset.from_folder(planted.data), planted.seed)
    optimizer = torch.optim.AdamW(vlm.model.parameters(), lr=5e-4, weight_decay=0.0)
    vlm.model.train()
    for _ in range(STEPS):
        loss = lessons.loss()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(vlm.model.parameters(), 1.0)
        optimizer.step()
    folder = planted.folder / "guarded"
    vlm.model.save_pretrained(folder)
    save_processor(vlm.processor, folder)
    return folder


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
