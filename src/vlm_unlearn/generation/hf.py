"""Generation with a transformers model in this process, in batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LogitsProcessorList

from vlm_unlearn.config import GenerationConfig
from vlm_unlearn.data.encoding import Turn, encode, move
from vlm_unlearn.data.processor_call import Processor, panics_as_errors
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.generation.base import (
    BACKENDS,
    PROMPT_FIELDS,
    GenerationRequest,
    OnResponses,
    build_requests,
    prompt_temperature,
    sampling_seed,
    split_into_batches,
)
from vlm_unlearn.generation.continuous import generate_continuously
from vlm_unlearn.generation.decoding import SeededSampling, neutral_generation_config
from vlm_unlearn.generation.sharing import PrefixSharingError
from vlm_unlearn.modeling.attention import without_cudnn_attention
from vlm_unlearn.modeling.loader import default_device, load_run_model, resolve_precision, run_digest, run_model_folder
from vlm_unlearn.modeling.structure import get_base_model
from vlm_unlearn.modeling.threads import threads_for
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.records import Prompt, Response

GROUP_BATCHES = 8  # batches that are generated together, so that prompts can follow ended ones


class ModelBackend:
    """Generates with a model in memory, on its device and in its dtype.

    Args:
        model: An image-text-to-text model of transformers, a PEFT model of one, or either wrapped in DDP. Each process
            generates on its own.
        processor: The model's processor.
        config: The generation settings. `backend` and `precision` are not used.
    """

    prompt_fields = PROMPT_FIELDS

    def __init__(self, model: nn.Module, processor: Processor, config: GenerationConfig) -> None:
        self._model: Any = model.module if isinstance(model, DistributedDataParallel) else model
        self._processor = processor
        self._config = config

    @cached_property
    def _digest(self) -> str:
        return weights_digest(self._model, self._processor)

    def identity(self) -> Mapping[str, object]:
        """Returns the digest of the weights, which takes one pass over them, and the generation settings."""
        precision = str(self._model.dtype).removeprefix("torch.")
        return {"model": self._digest, "generation": _generation_identity(self._config, precision)}

    def make_batches(self, requests: Sequence[GenerationRequest]) -> list[list[GenerationRequest]]:
        return make_batches(requests, self._config.batch_size)

    def check_available(self) -> None:
        """Does nothing: the model is in memory."""

    def run(self, batches: Iterable[Sequence[GenerationRequest]], on_responses: OnResponses) -> None:
        with evaluation_mode(self._model):
            for batch in batches:
                on_responses(generate_batch(self._model, self._processor, batch, self._config))

    def run_one_by_one(self, requests: Sequence[GenerationRequest]) -> Iterator[Response]:
        for request in requests:
            with evaluation_mode(self._model):
                responses = generate_batch(self._model, self._processor, [request], self._config)
            yield from responses


@BACKENDS.register("hf")
class HFBackend:
    """Generates with a model folder, hub name, adapter folder or training run, loaded at the first request.

    Args:
        model: The model.
        config: The generation settings.
        loaded: The model of the folder in the precision of `config`, on its device, and its processor, if they are in
            memory already.

    Raises:
        UserError: The model does not exist.
    """

    prompt_fields = PROMPT_FIELDS

    def __init__(self, model: str, config: GenerationConfig, loaded: tuple[nn.Module, Processor] | None = None) -> None:
        self._folder = run_model_folder(model)
        self._config = config
        self._in_memory = loaded
        self._precision = resolve_precision(config.precision)

    def identity(self) -> Mapping[str, object]:
        return {
            "model": run_digest(self._folder),
            "generation": _generation_identity(self._config, self._precision),
        }

    @cached_property
    def _loaded(self) -> ModelBackend:
        if self._in_memory is not None:
            return ModelBackend(*self._in_memory, self._config)
        model, processor = load_run_model(self._folder, self._precision)
        model.to(default_device()).eval()
        return ModelBackend(model, processor, self._config)

    def make_batches(self, requests: Sequence[GenerationRequest]) -> list[list[GenerationRequest]]:
        return make_batches(requests, self._config.batch_size)

    def check_available(self) -> None:
        """Does nothing: the constructor has checked the model folder."""

    def run(self, batches: Iterable[Sequence[GenerationRequest]], on_responses: OnResponses) -> None:
        first = next(iterator := iter(batches), None)
        if first is not None:  # nothing to generate needs no model
            self._loaded.run(chain([first], iterator), on_responses)

    def run_one_by_one(self, requests: Sequence[GenerationRequest]) -> Iterator[Response]:
        if requests:
            yield from self._loaded.run_one_by_one(requests)


def _generation_identity(config: GenerationConfig, precision: str) -> dict[str, object]:
    settings = ("backend", "max_new_tokens", "batch_size", "temperature", "top_p", "seed")
    return {**config.identity(*settings), "precision": precision, "batches": "continuous"}


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Sets all modules to eval mode during the block, and then each to the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def weights_digest(model: nn.Module, processor: Processor) -> str:
    """Returns the SHA-256 of a model in memory: its weights, buffers and config, and the processor's settings.

    It differs from the digest of a model folder with the same weights, which covers the bytes of files.
    """
    config = getattr(get_base_model(model), "config", None)
    templates = [getattr(processor, "chat_template", None), str(getattr(processor, "image_processor", None))]
    adapters = [
        (name, module.active_adapters, module.disable_adapters, module.merged)
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    ]
    digest = hashlib.sha256(str([str(config), *templates, adapters]).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def generate_responses(
    model: Any,
    processor: Processor,
    prompts: Sequence[Prompt],
    images: Mapping[str, Path],
    config: GenerationConfig,
    samples: Mapping[str, int] | None = None,
) -> Iterator[list[Response]]:
    """Yields the responses to all prompts, one batch at a time, without writing a file.

    Args:
        model: An image-text-to-text model, on its device, in eval mode.
        processor: The model's processor.
        prompts: The prompts to respond to.
        images: The image folder of each prompt set, by `Prompt.set`.
        config: The generation settings.
        samples: The number of responses per prompt, by `Prompt.set`. The default is 1.
    """
    return (
        generate_batch(model, processor, batch, config)
        for batch in make_batches(
            build_requests(prompts, images, samples or {}, config.image_loader), config.batch_size
        )
    )


def make_batches(requests: Sequence[GenerationRequest], size: int) -> list[list[GenerationRequest]]:
    """Splits requests into groups that share images and need little padding, for `generate_batch`.

    A group has up to `GROUP_BATCHES` times `size` requests, of which `size` run at once. Small sets have four groups or
    more, so that several processes can share them.

    Requests about one image are in the same group if they fit, and so are the samples of a prompt without an image.
    Requests of similar length come next to each other, and the order of ties is kept. Requests with and without an
    image are in separate groups because mllama cannot mix them.
    """
    limit = min(max(len(requests) // 4, size), GROUP_BATCHES * size)
    batches = []
    for has_image in (True, False):
        groups: dict[object, list[GenerationRequest]] = {}
        for request in sorted(requests, key=_num_words):
            if (request.image is not None) == has_image:
                groups.setdefault(request.image or request.prompt.id, []).append(request)
        batch: list[GenerationRequest] = []
        for chunk in (chunk for group in groups.values() for chunk in split_into_batches(group, limit)):
            if len(batch) + len(chunk) > limit:
                batches.append(batch)
                batch = []
            batch = batch + chunk
        batches += [batch] if batch else []
    return batches


def _num_words(request: GenerationRequest) -> int:
    """Returns the number of words of a prompt, with the earlier rounds, the system message and the prefill."""
    prompt = request.prompt
    rounds = [text for turn in prompt.history for text in (turn.question, turn.answer)]
    return sum(len(text.split()) for text in (prompt.system or "", *rounds, prompt.question, prompt.prefill or ""))


def generate_batch(
    model: Any, processor: Processor, requests: Sequence[GenerationRequest], config: GenerationConfig
) -> list[Response]:
    """Returns the responses to requests, in their order. At most `config.batch_size` run at once.

    A request that the processor rejects, such as one with a broken image or with an image of an extreme aspect ratio,
    gets a failed response. The others are generated without it.
    """
    try:
        return _generate_batch(model, processor, requests, config)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # processors raise many types of errors
        failed = {request.key: response for request in requests if (response := _rejected(processor, request))}
        if not failed:
            raise
    encodable = [request for request in requests if request.key not in failed]
    responses = _generate_batch(model, processor, encodable, config) if encodable else []
    by_key = failed | {response.key: response for response in responses}
    return [by_key[request.key] for request in requests]


def _rejected(processor: Processor, request: GenerationRequest) -> Response | None:
    """Returns a failed response to a request that cannot be encoded, or None."""
    reason = rejection(processor, Turn.of_prompt(request.prompt, request.image))
    if reason is None:
        return None
    image = f" of the image {quoted(request.prompt.image)}" if request.prompt.image is not None else ""
    message = f"the processor rejects the question{image}: {reason}"
    return Response(prompt_id=request.prompt.id, sample=request.sample, error=message)


def rejection(processor: Processor, turn: Turn) -> str | None:
    """Returns why a processor rejects a question and its image, or None if it can encode them."""
    try:
        encode(processor, [turn], "left")
    except Exception as error:  # processors raise many types of errors
        return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {quoted(error, 300)}"
    return None


def _generate_batch(
    model: Any, processor: Processor, requests: Sequence[GenerationRequest], config: GenerationConfig
) -> list[Response]:
    """Generates the responses to requests. Those with different temperatures run one after the other."""
    by_temperature: dict[float, list[GenerationRequest]] = {}
    for request in requests:
        by_temperature.setdefault(prompt_temperature(request.prompt, config), []).append(request)
    responses = {
        response.key: response
        for temperature, group in by_temperature.items()
        for response in _generate_at(temperature, model, processor, group, config)
    }
    return [responses[request.key] for request in requests]


def _generate_at(
    temperature: float,
    model: Any,
    processor: Processor,
    requests: Sequence[GenerationRequest],
    config: GenerationConfig,
) -> list[Response]:
    turns = [Turn.of_prompt(request.prompt, request.image) for request in requests]
    sampler = None
    if temperature:
        seeds = [sampling_seed(config.seed, request) for request in requests]
        sampler = SeededSampling(seeds, temperature, config.top_p, model.device)
    texts = generate_texts(model, processor, turns, config.max_new_tokens, sampler, config.batch_size)
    return [
        Response(prompt_id=request.prompt.id, sample=request.sample, text=text, finish_reason=finish_reason)
        for request, (text, finish_reason) in zip(requests, texts, strict=True)
    ]


@panics_as_errors()
@torch.no_grad()
@without_cudnn_attention()
def generate_texts(
    model: Any,
    processor: Processor,
    turns: Sequence[Turn],
    max_new_tokens: int,
    sampler: SeededSampling | None = None,
    batch_size: int | None = None,
) -> list[tuple[str, str]]:
    """Generates a continuation of each turn and returns ``(text, finish_reason)``.

    The text of a turn with a `prefill` follows the prefill. It keeps the space between the two.

    Common prefixes run once if the model family allows it (`vlm_unlearn.generation.sharing`). Turns that differ in
    nothing but their id have the same greedy continuation, which is generated once.

    Args:
        model: An image-text-to-text model, on its device, in eval mode.
        processor: The model's processor.
        turns: B turns without an answer.
        max_new_tokens: The maximum number of generated tokens.
        sampler: Samples the tokens, with one random stream per turn. The default is greedy decoding.
        batch_size: The maximum number of rows that run at once. The default is the number of turns.

    Returns:
        One pair per turn. The finish reason is ``stop`` or ``length``.

    Raises:
        UserError: A turn cannot be encoded. The error contains its id.
    """
    distinct: dict[Turn, Turn] = {}  # content (the turn without its id) -> the first turn that has it
    for turn in turns:
        distinct.setdefault(replace(turn, id=""), turn)
    indices = {content: index for index, content in enumerate(distinct)}
    turn_indices = [indices[replace(turn, id="")] for turn in turns]
    distinct_turns = list(distinct.values())
    row_indices = range(len(distinct_turns)) if sampler is None else turn_indices
    size = batch_size or len(row_indices)
    eos_token_ids = set(_eos_token_ids(model))
    with threads_for(model):
        try:
            answers, last_tokens = generate_continuously(
                VisionLanguageModel(model, processor),
                distinct_turns,
                row_indices,
                max_new_tokens,
                size,
                eos_token_ids,
                sampler,
            )
        except PrefixSharingError:
            answers, last_tokens = [], []
            for rows in split_into_batches(range(len(row_indices)), size):
                batch = encode(processor, [distinct_turns[row_indices[row]] for row in rows], padding_side="left")
                last_tokens += batch["input_ids"][:, -1].tolist()
                row_sampler = None if sampler is None else sampler.select_rows(rows)
                inputs = move(batch, model.device, model.dtype)
                answers += _generate(model, inputs, max_new_tokens, row_sampler).tolist()
    new_tokens = [torch.tensor(answer, dtype=torch.long) for answer in answers]
    texts = processor.batch_decode(new_tokens, skip_special_tokens=True)
    outputs = []
    for row, (index, text, tokens) in enumerate(zip(row_indices, texts, new_tokens, strict=True)):
        if distinct_turns[index].prefill is None:
            text = text.strip()
        else:
            text = _continuation(processor, torch.tensor([last_tokens[row]]), tokens)
        outputs.append((text, "stop" if eos_token_ids & set(tokens.tolist()) else "length"))
    return [outputs[index] for index in turn_indices] if sampler is None else outputs


def _continuation(processor: Processor, last_tokens: Tensor, new_tokens: Tensor) -> str:
    """Returns the text of new tokens after the last token of a prefill, with the space between the two.

    Many tokenizers drop the space in front of the first token of a text. They keep it behind another token.
    """
    rows = [last_tokens, torch.cat([last_tokens, new_tokens]), new_tokens]
    prefix, text, alone = map(str, processor.batch_decode(rows, skip_special_tokens=True))
    return (text.removeprefix(prefix) if text.startswith(prefix) else alone).rstrip()


def _generate(model: Any, inputs: Mapping[str, Any], max_new_tokens: int, sampler: SeededSampling | None) -> Tensor:
    """Returns the new tokens [B, N], padded after the end of each answer. N is smaller if all answers have ended."""
    processors = LogitsProcessorList([] if sampler is None else [sampler])
    with neutral_generation_config(model):
        output: Tensor = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, logits_processor=processors
        )
    return output[:, inputs["input_ids"].shape[1] :]


def _eos_token_ids(model: Any) -> list[int]:
    """Returns the token ids that end an answer."""
    ids = model.generation_config.eos_token_id
    return ids if isinstance(ids, list) else [] if ids is None else [ids]
