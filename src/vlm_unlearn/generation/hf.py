"""Answers from a transformers model, in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from vlm_unlearn.config import GenerationConfig
from vlm_unlearn.data.encoding import Processor, Turn, encode, move
from vlm_unlearn.generation.base import (
    GenerationRequest,
    OnResponses,
    build_requests,
    sampling_seed,
    split_into_batches,
)
from vlm_unlearn.generation.decoding import SeededSampling, neutral_generation_config
from vlm_unlearn.generation.sharing import Prefilled, prefill
from vlm_unlearn.models.loader import default_device, load_run_model, resolve_precision, run_digest, run_model_folder
from vlm_unlearn.records import Prompt, Response

CHUNK_TOKENS = 32  # tokens after which answers that have ended are looked for


class HFBackend:
    """A model folder, hub name, adapter folder or training run; loaded when the first question is asked.

    Raises:
        UserError: there is no such model.
    """

    def __init__(self, model: str, config: GenerationConfig) -> None:
        self._folder = run_model_folder(model)
        self._config = config
        self._precision = resolve_precision(config.precision)

    def identity(self) -> Mapping[str, object]:
        decided = ("backend", "max_new_tokens", "batch_size", "temperature", "top_p", "seed")
        generation = {
            **self._config.model_dump(include=set(decided)),
            "precision": self._precision,
            "batches": "by image",
        }
        return {"model": run_digest(self._folder), "generation": generation}

    @cached_property
    def _loaded(self) -> tuple[Any, Processor]:
        model, processor = load_run_model(self._folder, self._precision)
        model.to(default_device()).eval()
        return model, processor

    def make_batches(self, questions: Sequence[GenerationRequest]) -> list[list[GenerationRequest]]:
        return make_batches(questions, self._config.batch_size)

    def check_available(self) -> None:
        """The folder was looked at when this was made."""

    def run(self, batches: Iterable[Sequence[GenerationRequest]], on_answers: OnResponses) -> None:
        for batch in batches:
            on_answers(generate_batch(*self._loaded, batch, self._config))

    def run_one_by_one(self, questions: Sequence[GenerationRequest]) -> Iterator[Response]:
        for question in questions:
            yield from generate_batch(*self._loaded, [question], self._config)


def generate_responses(
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
        images, samples: as in `vlm_unlearn.generation.base.build_requests`.
    """
    return (
        generate_batch(model, processor, batch, config)
        for batch in make_batches(build_requests(prompts, images, samples or {}), config.batch_size)
    )


def make_batches(questions: Sequence[GenerationRequest], size: int) -> list[list[GenerationRequest]]:
    """Questions on one image together, and beside others of alike lengths, for less padding; with and without image apart, as mllama
    needs it.

    An image's questions are in one batch where they fit in; so are the samples of a prompt without an image. Ties keep their order.
    """
    found = []
    for has_image in (True, False):
        together: dict[object, list[GenerationRequest]] = {}
        for question in sorted(questions, key=_length):
            if (question.image is not None) == has_image:
                together.setdefault(question.image or question.prompt.id, []).append(question)
        batch: list[GenerationRequest] = []
        for part in (part for group in together.values() for part in split_into_batches(group, size)):
            if len(batch) + len(part) > size:
                found.append(batch)
                batch = []
            batch = batch + part
        found += [batch] if batch else []
    return found


def _length(question: GenerationRequest) -> int:
    return len(question.prompt.question.split())


def generate_batch(
    model: Any, processor: Processor, questions: Sequence[GenerationRequest], config: GenerationConfig
) -> list[Response]:
    """The answers of one batch."""
    turns = [Turn(question.prompt.id, question.image, question.prompt.question, None) for question in questions]
    drawing = None
    if config.temperature:
        seeds = [sampling_seed(config.seed, question) for question in questions]
        drawing = SeededSampling(seeds, config.temperature, config.top_p, model.device)
    return [
        Response(prompt_id=question.prompt.id, sample=question.sample, text=text, finish_reason=reason)
        for question, (text, reason) in zip(
            questions, generate_texts(model, processor, turns, config.max_new_tokens, drawing), strict=True
        )
    ]


@torch.no_grad()
def generate_texts(
    model: Any, processor: Processor, turns: Sequence[Turn], max_new_tokens: int, drawing: SeededSampling | None = None
) -> list[tuple[str, str]]:
    """What a model says to each of a batch of turns, and why it ended: ``stop`` or ``length``. Greedy without `drawing`.

    What turns begin with alike is run once, where the family can (`vlm_unlearn.generation.sharing`); turns that ask the same have one
    greedy answer, which is made once.

    Raises:
        UserError: a turn can't be encoded; it is named.
    """
    first: dict[Turn, Turn] = {}  # of the turns that ask the same
    for turn in turns:
        first.setdefault(replace(turn, id=""), turn)
    numbers = {asked: number for number, asked in enumerate(first)}
    which = [numbers[replace(turn, id="")] for turn in turns]
    distinct = list(first.values())
    rows = range(len(distinct)) if drawing is None else which
    prompts = prefill(model, processor, distinct, rows, max_new_tokens)
    if prompts is not None:
        new = _generate_in_chunks(model, prompts, max_new_tokens, drawing)
    else:
        inputs = move(
            encode(processor, [distinct[row] for row in rows], padding_side="left"), model.device, model.dtype
        )
        new = list(_generate(model, inputs, max_new_tokens, drawing))
    texts = processor.batch_decode(new, skip_special_tokens=True)
    closing = set(_eos_token_ids(model))
    said = [
        (text.strip(), "stop" if closing & set(tokens.tolist()) else "length")
        for text, tokens in zip(texts, new, strict=True)
    ]
    return [said[number] for number in which] if drawing is None else said


def _generate_in_chunks(
    model: Any, prompts: Prefilled, max_new_tokens: int, drawing: SeededSampling | None
) -> list[Tensor]:
    """The new tokens of each row. Every few tokens the rows that have ended are left out, so that they don't cost what the longest does."""
    found: list[list[Tensor]] = [[] for _ in prompts.ids]
    rows = torch.arange(len(prompts.ids))
    closing = torch.tensor(_eos_token_ids(model), dtype=torch.long, device=prompts.ids.device)
    for start in range(0, max_new_tokens, CHUNK_TOKENS):
        inputs: dict[str, Any] = {
            "input_ids": prompts.ids,
            "attention_mask": prompts.mask,
            "position_ids": prompts.positions,
        }
        new = _generate(
            model, inputs | {"past_key_values": prompts.cache}, min(CHUNK_TOKENS, max_new_tokens - start), drawing
        )
        for row, tokens in zip(rows.tolist(), new, strict=True):
            found[row].append(tokens)
        going = (~torch.isin(new, closing).any(dim=1)).nonzero()[:, 0]
        if not len(going):
            break
        prompts = prompts.append_tokens(new, going)
        rows = rows[going.cpu()]
        if drawing is not None:
            drawing.keep(going.tolist())
    return [torch.cat(parts) for parts in found]


def _generate(model: Any, inputs: Mapping[str, Any], max_new_tokens: int, drawing: SeededSampling | None) -> Tensor:
    """[B, N] new tokens, padding behind the end of an answer; N is less than the most where all have ended."""
    processors = LogitsProcessorList([] if drawing is None else [drawing])
    with neutral_generation_config(model):
        output: Tensor = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, logits_processor=processors
        )
    return output[:, inputs["input_ids"].shape[1] :]


def _eos_token_ids(model: Any) -> list[int]:
    """The tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]
