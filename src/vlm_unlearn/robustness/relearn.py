"""Relearning: fine-tuning on a few examples, and what comes back beyond them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from vlm_unlearn.config import Strict, TrainableConfig
from vlm_unlearn.config.base import Positive
from vlm_unlearn.data.encoding import Turn, move
from vlm_unlearn.data.encoding_cache import TurnEncoder
from vlm_unlearn.errors import UserError
from vlm_unlearn.losses import answer_nll
from vlm_unlearn.modeling.trainable import prepare_trainable
from vlm_unlearn.records import Example
from vlm_unlearn.robustness.base import AttackedState, AttackTarget, ModelAttack, register


class RelearnOptions(Strict):
    """Options of the attack `relearn`."""

    data: Literal["forget", "retain", "decouple"] = "forget"
    """The examples: of the first half of the forget set, or of a harmless set.

    The retain set tests whether any training undoes the unlearning. The decouple set has the form of the forget set and
    other content.
    """
    examples: Positive | Literal["all"] = 10
    """Number of examples."""
    steps: Annotated[list[Positive], Field(min_length=1, default_factory=lambda: [5, 20, 60])]
    """Numbers of steps after which the model is measured, in ascending order."""
    batch_size: Positive = 16
    """Examples per step. A smaller set is used completely in each step."""
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 3e-4
    """Learning rate of AdamW, without a schedule."""
    lora: bool = False
    """Whether to train LoRA adapters (r = 16) of the language model instead of all weights but the vision tower's."""


@register("relearn")
class Relearn(ModelAttack):
    """Fine-tunes the model on examples of the first half, and measures the harmful questions of the second half.

    What comes back there was hidden, not gone (Deeb and Roger 2024, arXiv 2410.08827). The first half is measured as
    ``.../first_half``: there, a model may simply learn again. Harmless examples show whether any
    training undoes the unlearning (Lucki et al. 2024, arXiv 2409.18025). They are the control of this attack.
    """

    options_type = RelearnOptions
    changes_weights = True

    def run(self, target: AttackTarget) -> Iterator[AttackedState]:
        """Trains, and yields the model after each number of steps in `steps`."""
        options: RelearnOptions = self.options
        examples = _select(target, options)
        name = f"relearn/{options.examples}" if options.data == "forget" else f"relearn/{options.data}"
        if options.lora:
            name += "/lora"
        first_half, second_half = (
            target.halves.first_groups(target.prompts),
            target.halves.second_groups(target.prompts),
        )
        trainer = _Trainer(target, examples, options)
        for step in sorted(set(options.steps)):
            loss = trainer.train_until(step)
            state = AttackedState(f"{name}/{step}", curve=name, step=step, facts={"loss": loss})
            if options.data != "forget":
                yield state
                continue
            yield replace(state, group_ids=second_half)
            yield replace(state, name=f"{state.name}/first_half", curve=f"{name}/first_half", group_ids=first_half)


def _select(target: AttackTarget, options: RelearnOptions) -> list[Example]:
    examples = list(target.examples(options.data))
    if options.data == "forget":
        examples = target.halves.first(examples)
    if not examples:
        raise UserError(
            f"the training set has no {options.data} set for the attack relearn.", code="no-records", field="data"
        )
    if options.examples == "all" or options.examples >= len(examples):
        return examples
    random.Random(f"relearn-{target.seed}").shuffle(examples)
    return target.halves.spread(examples, options.examples)


class _Trainer:
    """Trains a model with AdamW on a fixed set of examples."""

    def __init__(self, target: AttackTarget, examples: Sequence[Example], options: RelearnOptions) -> None:
        self._target = target
        self._examples = list(examples)
        self._size = min(options.batch_size, len(examples))
        self._rng = random.Random(f"relearn-batches-{target.seed}")
        self._queue: list[Example] = []
        self._encoder = TurnEncoder(target.vlm.processor, 2**31 - 1)
        self._step = 0
        self._loss = 0.0
        config = TrainableConfig(mode="lora" if options.lora else "full")
        self._model: Any = prepare_trainable(target.vlm, config).model
        parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)

    def train_until(self, step: int) -> float:
        """Trains up to a step and returns the last loss."""
        self._model.train()
        while self._step < step:
            self._loss = self._train_step()
            self._step += 1
        self._model.eval()
        return self._loss

    def _train_step(self) -> float:
        if len(self._queue) < self._size:
            self._queue += self._rng.sample(self._examples, len(self._examples))
        batch, self._queue = self._queue[: self._size], self._queue[self._size :]
        turns = [Turn.of_example(example, self._target.image(example)) for example in batch]
        encoded = move(self._encoder.encode_with_labels(turns), self._model.device, self._model.dtype)
        labels = encoded.pop("labels")
        nll, tokens = answer_nll(self._model(**encoded, use_cache=False).logits, labels)
        loss = nll.sum() / tokens.sum()
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        return float(loss.detach())
