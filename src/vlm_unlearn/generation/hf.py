"""Answers from a transformers model, in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessorList

from vlm_unlearn.config import GenerationConfig
from vlm_unlearn.data.batching import Processor, Turn, encode, move
from vlm_unlearn.generation.base import OnAnswers, Question, answer_seed, ask, cut_up
from vlm_unlearn.generation.decoding import SeededSampling, plain_settings
from vlm_unlearn.models.loading import device, load_run_model, resolve_precision, run_digest, run_model_folder
from vlm_unlearn.records import Prompt, Response


class HFBackend:
    """A model folder, hub name, adapter folder or training run; loaded when the first question is asked.

    Raises:
        RequestError: there is no such model.
    """

    def __init__(self, model: str, config: GenerationConfig) -> None:
        self._folder = run_model_folder(model)
        self._config = config
        self._precision = resolve_precision(config.precision)

    def identity(self) -> Mapping[str, object]:
        decided = ("backend", "max_new_tokens", "batch_size", "temperature", "top_p", "seed")
        generation = {**self._config.model_dump(include=set(decided)), "precision": self._precision}
        return {"model": run_digest(self._folder), "generation": generation}

    @cached_property
    def _loaded(self) -> tuple[Any, Processor]:
        model, processor = load_run_model(self._folder, self._precision)
        model.to(device()).eval()
        return model, processor

    def batches(self, questions: Sequence[Question]) -> list[list[Question]]:
        return batches(questions, self._config.batch_size)

    def look(self) -> None:
        """The folder was looked at when this was made."""

    def run(self, batches: Iterable[Sequence[Question]], on_answers: OnAnswers) -> None:
        for batch in batches:
            on_answers(answer(*self._loaded, batch, self._config))

    def one_by_one(self, questions: Sequence[Question]) -> Iterator[Response]:
        for question in questions:
            yield from answer(*self._loaded, [question], self._config)


def answers(
    model: Any,
    processor: Processor,
    prompts: Sequence[Prompt],
    images: Mapping[str, Path],
    config: GenerationConfig,
    samples: Mapping[str, int] | None = None,
) -> Iterator[list[Response]]:
    """The answers to all prompts, a batch at a time, kept in no file.

    Args:
        model: an image-text-to-text model, on its device, in eval mode.
        images, samples: as in `vlm_unlearn.generation.base.ask`.
    """
    return (answer(model, processor, batch, config) for batch in batches(ask(prompts, images, samples or {}), config.batch_size))


def batches(questions: Sequence[Question], size: int) -> list[list[Question]]:
    """Questions of alike lengths together, for less padding; with and without image apart, as mllama needs it. Ties keep their order."""
    found = []
    for has_image in (True, False):
        alike = [question for question in questions if (question.image is not None) == has_image]
        alike.sort(key=lambda question: len(question.prompt.question.split()))
        found += cut_up(alike, size)
    return found


def answer(model: Any, processor: Processor, questions: Sequence[Question], config: GenerationConfig) -> list[Response]:
    """The answers of one batch."""
    turns = [Turn(question.prompt.id, question.image, question.prompt.question, None) for question in questions]
    drawing = None
    if config.temperature:
        seeds = [answer_seed(config.seed, question) for question in questions]
        drawing = SeededSampling(seeds, config.temperature, config.top_p, model.device)
    return [
        Response(prompt_id=question.prompt.id, sample=question.sample, text=text, finish_reason=reason)
        for question, (text, reason) in zip(questions, complete(model, processor, turns, config.max_new_tokens, drawing), strict=True)
    ]


@torch.no_grad()
def complete(
    model: Any, processor: Processor, turns: Sequence[Turn], max_new_tokens: int, drawing: SeededSampling | None = None
) -> list[tuple[str, str]]:
    """What a model says to each of a batch of turns, and why it ended: ``stop`` or ``length``. Greedy without `drawing`.

    Raises:
        RequestError: a turn can't be encoded; it is named.
    """
    inputs = move(encode(processor, turns, padding_side="left"), model.device, model.dtype)
    processors = LogitsProcessorList([] if drawing is None else [drawing])
    with plain_settings(model):
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, logits_processor=processors)
    new = output[:, inputs["input_ids"].shape[1] :]
    ends = model.generation_config.eos_token_id
    closing = set(ends if isinstance(ends, list) else [ends])
    texts = processor.batch_decode(new, skip_special_tokens=True)
    return [(text.strip(), "stop" if closing & set(tokens.tolist()) else "length") for text, tokens in zip(texts, new, strict=True)]
