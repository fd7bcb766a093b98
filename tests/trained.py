"""Helpers for tests of training: single optimizer steps on a tiny model, and comparisons."""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vlm_unlearn.config import MethodConfig, TrainableConfig
from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.data.encoding import Batch
from vlm_unlearn.methods import METHODS, Method, Role, build_method
from vlm_unlearn.modeling.loader import load_model, load_processor
from vlm_unlearn.modeling.trainable import prepare_trainable
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.training.passes import Passes, group_micro_batches
from vlm_unlearn.training.references import Reference
from vlm_unlearn.training.setup import prepare_method
from vlm_unlearn.training.step import ModelStep, count_tokens
from vlm_unlearn.training.stream import UnlearningCollator, UnlearningStream

METHOD_CONFIGS: dict[str, dict[str, Any]] = {
    name: {"name": name, **method.tiny_options} for name, method in METHODS.built_in_items()
}
RMU, RR = METHOD_CONFIGS["rmu"], METHOD_CONFIGS["rr"]


def weights(folder: Path) -> dict[str, Tensor]:
    """Returns the weights of a model that is saved in one file."""
    return load_file(folder / "model.safetensors")


def changed_names(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> set[str]:
    """Returns the names of the weights that differ."""
    assert left.keys() == right.keys()
    return {name for name in left if not torch.equal(left[name], right[name])}


def max_difference(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Returns the largest absolute difference between two sets of weights or gradients."""
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def relative_difference(left: Mapping[str, Tensor], right: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """Returns the norm of the difference between two trained sets of weights, divided by the norm of their change.

    Adam amplifies rounding where gradients are nearly zero, and processors round differently. Single weights therefore
    differ by more than the whole.
    """
    assert left.keys() == right.keys()
    difference, change = (
        sum(float((left[name] - other[name]).double().square().sum()) for name in left) ** 0.5
        for other in (right, start)
    )
    return difference / change


@functools.cache
def _load_once(folder: Path) -> tuple[Any, Any]:
    """Returns the model and processor of a folder that no test changes."""
    return load_model(folder, "fp32"), load_processor(folder)


@functools.cache
def _read_once(data: Path) -> UnlearningDataset:
    return UnlearningDataset.from_folder(data)


@dataclass
class StepResult:
    """The values of one optimizer step."""

    terms: dict[str, float]  # mean over the micro-batches
    gradients: dict[str, Tensor]


class StepScene:
    """A tiny model, a method and a training set, to compute single optimizer steps as the trainer does.

    Args:
        model_folder: The tiny model.
        data: The training set, or its folder.
        method: A method config.
        weight: The weight of prompt decoupling.
        trainable: The trainable parameters.
    """

    def __init__(
        self,
        model_folder: Path,
        data: Path | UnlearningDataset,
        method: object,
        weight: float = 0.0,
        trainable: Mapping[str, object] | None = None,
    ) -> None:
        config = {"name": method} if isinstance(method, str) else method
        self.method: Method = build_method(MethodConfig.model_validate(config), weight)
        self.training_set = data if isinstance(data, UnlearningDataset) else _read_once(data)
        model, self.processor = _load_once(model_folder)
        torch.manual_seed(0)
        self.model: Any = prepare_trainable(
            VisionLanguageModel(copy.deepcopy(model)), TrainableConfig.model_validate(trainable or {})
        ).model
        prepare_method(self.method, VisionLanguageModel(self.model), 0)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def perturb(self) -> None:
        """Moves the model away from the reference model, where some terms have a zero or undefined gradient."""
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.trainable_parameters().values():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))

    def stream(self, length: int) -> UnlearningStream:
        return UnlearningStream(self.training_set, self.method, length, seed=0)

    def collator(self) -> UnlearningCollator:
        return UnlearningCollator(self.processor, self.training_set, self.method, 2048)

    def micro_batches(self, rows: int, count: int = 1) -> list[dict[Role, Batch]]:
        """Returns `count` micro-batches with `rows` samples per role, from the start of the stream."""
        stream = self.stream(rows * count)
        collator = self.collator()
        batches = []
        for start in range(0, rows * count, rows):
            batch = collator([stream[position] for position in range(start, start + rows)])
            assert isinstance(batch, dict)
            batches.append(batch)
        return batches

    def step(
        self,
        micro_batches: Sequence[Mapping[Role, Batch]],
        reference: Reference | None,
        progress: float = 0.25,
        max_tokens: int = 0,
    ) -> StepResult:
        """Runs the forward and backward passes of one optimizer step, a quarter through the run by default.

        Args:
            micro_batches: All micro-batches of the step.
            reference: The reference model.
            progress: The fraction of the run that is complete.
            max_tokens: The number of tokens up to which micro-batches run together, 0 one by one.
        """
        self.model.train()
        self.model.zero_grad()
        totals = None
        if not self.method.paper_compat:
            counts = [count_tokens(batches) for batches in micro_batches]
            totals = {key: sum(count[key] for count in counts) / len(counts) for key in counts[0]}
        terms: dict[str, float] = defaultdict(float)
        torch.manual_seed(0)  # of dropout
        vlm, active = VisionLanguageModel(self.model), self.method.active_roles(progress)
        for group in group_micro_batches(micro_batches, max_tokens):
            passes = Passes(vlm, group, self.method, reference, active_roles=active, max_tokens=max_tokens or None)
            outputs = [self.method.loss(ModelStep(passes, number, totals, progress)) for number in range(len(group))]
            total = torch.stack([output.total for output in outputs]).sum()
            assert total.isfinite()
            (total / len(micro_batches)).backward()
            for output in outputs:
                for name, value in output.terms.items():
                    terms[name] += value.item() / len(micro_batches)
        gradients = {
            name: value.grad.clone() for name, value in self.model.named_parameters() if value.grad is not None
        }
        return StepResult(dict(terms), gradients)
