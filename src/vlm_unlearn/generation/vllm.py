"""Generation with vLLM in this process (``pip install '.[vllm]'``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from vlm_unlearn.config import GenerationConfig
from vlm_unlearn.errors import UserError
from vlm_unlearn.generation.base import (
    BACKENDS,
    PROMPT_FIELDS,
    GenerationRequest,
    OnResponses,
    ResponseKey,
    failed_response,
    prompt_temperature,
    sampling_seed,
    split_into_batches,
)
from vlm_unlearn.generation.chat import ChatRequest
from vlm_unlearn.generation.openai_chat import CONTINUE_ANSWER
from vlm_unlearn.generation.server import stripped_answer
from vlm_unlearn.modeling.loader import read_config, resolve_precision, run_digest, run_model_folder
from vlm_unlearn.modeling.trial import check_processor_files
from vlm_unlearn.records import Response
from vlm_unlearn.store import RunDirectory

BATCH_SIZE_FACTOR = 16  # requests per call, as a multiple of batch_size: vLLM schedules best with many requests
# Errors about a request. Other errors concern the engine, unless it has answered another request.
INPUT_ERRORS = (ValueError, TypeError, LookupError, OSError, AssertionError)
ENGINE_ERRORS = ("EngineDeadError", "EngineGenerateError")  # the names of vLLM's errors after which nothing works
Conversation = tuple[GenerationRequest, list[dict[str, Any]]]  # a request and its messages
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@BACKENDS.register("vllm")
class VLLMBackend:
    """Generates with a model folder or hub name, using tensor parallelism over all GPUs visible to this process.

    A request that the engine rejects, such as one with a broken image or with an image of an extreme aspect ratio, gets
    a failed response. The others are generated without it.

    Raises:
        UserError: vLLM is not installed, the model does not exist, or it is an adapter.
    """

    prompt_fields = PROMPT_FIELDS

    def __init__(self, model: str, config: GenerationConfig) -> None:
        if find_spec("vllm") is None:
            raise UserError(
                "vLLM is not installed. Run pip install '.[vllm]', or use generation.backend=hf.",
                code="missing-package",
                field="generation.backend",
            )
        self._folder = run_model_folder(model)
        if (self._folder / "adapter_config.json").is_file():
            run = self._folder.parent if RunDirectory(self._folder.parent).exists() else model
            raise UserError(
                f"the vLLM backend cannot load adapters. Merge them first: vlm-unlearn export {run} --out DIR.",
                code="unsupported-setting",
                file=self._folder,
            )
        self._config = config
        self._has_generated = False  # whether the engine has answered a request
        self._precision = resolve_precision(config.precision)

    def identity(self) -> Mapping[str, object]:
        settings = ("backend", "max_new_tokens", "temperature", "top_p", "seed")
        generation = {**self._config.identity(*settings), "precision": self._precision}
        return {"model": run_digest(self._folder), "generation": {**generation, "vllm": _vllm_version()}}

    @cached_property
    def _engine(self) -> Any:
        from vllm import LLM

        check_processor_files(self._folder)
        return LLM(
            model=str(self._folder),
            dtype=DTYPES[self._precision],
            tensor_parallel_size=tensor_parallel_size(self._folder),
            limit_mm_per_prompt={"image": 1},
            seed=self._config.seed,
            generation_config="vllm",  # ignores the penalties, top-k and temperature of the model's own config
        )

    def make_batches(self, requests: Sequence[GenerationRequest]) -> list[list[GenerationRequest]]:
        return split_into_batches(requests, BATCH_SIZE_FACTOR * self._config.batch_size)

    def check_available(self) -> None:
        """Does nothing: the constructor has checked the model folder."""

    def run(self, batches: Iterable[Sequence[GenerationRequest]], on_responses: OnResponses) -> None:
        for batch in batches:
            on_responses(self._generate(batch))

    def run_one_by_one(self, requests: Sequence[GenerationRequest]) -> Iterator[Response]:
        for request in requests:
            yield from self._generate([request])

    def _generate(self, requests: Sequence[GenerationRequest]) -> list[Response]:
        """Returns the responses to one batch of requests, in their order.

        Raises:
            Exception: The engine has failed, or it rejects all requests for a reason that is not in the requests.
        """
        _ = self._engine  # loaded here, because its errors concern no request
        responses: dict[ResponseKey, Response] = {}
        conversations: list[Conversation] = []
        for request in requests:
            try:
                chat_request = ChatRequest.of_prompt(request.prompt.id, request.prompt, request.image)
                conversations.append((request, chat_request.messages()))
            except UserError as error:  # the image cannot be read
                responses[request.key] = failed_response(request, error)
        errors: list[Exception] = []
        for is_prefilled in (False, True):  # prefilled answers need other settings, which apply to a complete call
            group = [entry for entry in conversations if (entry[0].prompt.prefill is not None) == is_prefilled]
            responses |= {response.key: response for response in self._answer(group, errors)}
        unexplained = [error for error in errors if not isinstance(error, INPUT_ERRORS)]
        all_failed = len(unexplained) == len(conversations) > 1
        if unexplained and (all_failed or not self._has_generated):
            raise unexplained[0]
        return [responses[request.key] for request in requests]

    def _answer(self, conversations: Sequence[Conversation], errors: list[Exception]) -> list[Response]:
        """Returns the responses to conversations, and appends the errors of those that the engine rejects to `errors`.

        The engine checks all conversations before it generates. A rejected batch is halved until the rejected
        conversations are alone.
        """
        if not conversations:
            return []
        try:
            outputs = self._chat(conversations)
        except Exception as error:  # processors raise many types of errors
            if isinstance(error, torch.OutOfMemoryError | MemoryError) or type(error).__name__ in ENGINE_ERRORS:
                raise
            if len(conversations) == 1:
                errors.append(error)
                return [failed_response(conversations[0][0], error)]
            middle = len(conversations) // 2
            return [*self._answer(conversations[:middle], errors), *self._answer(conversations[middle:], errors)]
        self._has_generated = True
        return [
            Response(
                prompt_id=request.prompt.id,
                sample=request.sample,
                text=stripped_answer(output.outputs[0].text, request.prompt),
                finish_reason=output.outputs[0].finish_reason,
            )
            for (request, _), output in zip(conversations, outputs, strict=True)
        ]

    def _chat(self, conversations: Sequence[Conversation]) -> list[Any]:
        is_prefilled = conversations[0][0].prompt.prefill is not None
        outputs = self._engine.chat(
            [messages for _, messages in conversations],
            [self._sampling_params(request) for request, _ in conversations],
            use_tqdm=False,
            **(CONTINUE_ANSWER if is_prefilled else {}),
        )
        # After an error, earlier versions of vLLM also answer the requests that were queued before the rejected one.
        # Outputs have the order of the requests, so these come first.
        return list(outputs[-len(conversations) :])

    def _sampling_params(self, request: GenerationRequest) -> Any:
        from vllm import SamplingParams

        temperature = prompt_temperature(request.prompt, self._config)
        return SamplingParams(
            max_tokens=self._config.max_new_tokens,
            temperature=temperature,
            top_p=self._config.top_p if temperature else 1.0,
            seed=sampling_seed(self._config.seed, request) if temperature else None,
        )


def tensor_parallel_size(model_path: Path) -> int:
    """Returns the largest number of visible GPUs that evenly divides the model's attention heads."""
    num_gpus = max(1, torch.cuda.device_count())
    num_heads = int(getattr(read_config(model_path).get_text_config(), "num_attention_heads", 1))
    return next(count for count in range(num_gpus, 0, -1) if num_heads % count == 0)


def _vllm_version() -> str:
    try:
        return version("vllm")
    except PackageNotFoundError:
        return "unknown"
