"""Generation with vLLM in this process (``pip install '.[vllm]'``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlm_unlearn.config import GenerationConfig
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.generation.base import BACKENDS, GenerationRequest, OnResponses, sampling_seed, split_into_batches
from vlm_unlearn.generation.chat import ChatRequest
from vlm_unlearn.modeling.loader import read_config, resolve_precision, run_digest, run_model_folder
from vlm_unlearn.modeling.trial import check_processor_files
from vlm_unlearn.records import Response
from vlm_unlearn.store import RunDirectory

BATCH_SIZE_FACTOR = 16  # requests per call, as a multiple of batch_size: vLLM schedules best with many requests
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@BACKENDS.register("vllm")
class VLLMBackend:
    """Generates with a model folder or hub name, using tensor parallelism over all GPUs visible to this process.

    Raises:
        UserError: vLLM is not installed, the model does not exist, or it is an adapter.
    """

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
        """Returns the responses to a batch. A request with a broken image, or that vLLM rejects, fails alone."""
        conversations: dict[tuple[str, int], list[dict[str, Any]]] = {}
        responses: dict[tuple[str, int], Response] = {}
        for request in requests:
            try:
                chat = ChatRequest.of_prompt(request.prompt.id, request.prompt, request.image)
                conversations[request.key] = chat.messages()
            except UserError as error:
                responses[request.key] = _failed(request, str(error))
        valid = [request for request in requests if request.key in conversations]
        for request, response in zip(valid, self._chat(valid, conversations), strict=True):
            responses[request.key] = response
        return [responses[request.key] for request in requests]

    def _chat(
        self, requests: Sequence[GenerationRequest], conversations: Mapping[tuple[str, int], list[dict[str, Any]]]
    ) -> list[Response]:
        from vllm import SamplingParams

        if not requests:
            return []
        config = self._config
        sampling_params = [
            SamplingParams(
                max_tokens=config.max_new_tokens,
                temperature=config.temperature,
                top_p=config.top_p if config.temperature else 1.0,
                seed=sampling_seed(config.seed, request) if config.temperature else None,
            )
            for request in requests
        ]
        messages = [conversations[request.key] for request in requests]
        engine = self._engine
        try:
            outputs = engine.chat(messages, sampling_params, use_tqdm=False)
        except ValueError as error:  # such as a prompt that is too long, or an image that the processor rejects
            if len(requests) > 1:
                return [response for request in requests for response in self._chat([request], conversations)]
            return [_failed(requests[0], f"vLLM rejects the question: {quoted(error, 300)}")]
        return [
            Response(
                prompt_id=request.prompt.id,
                sample=request.sample,
                text=output.outputs[0].text.strip(),
                finish_reason=output.outputs[0].finish_reason,
            )
            for request, output in zip(requests, outputs, strict=True)
        ]


def _failed(request: GenerationRequest, error: str) -> Response:
    return Response(prompt_id=request.prompt.id, sample=request.sample, error=error)


def tensor_parallel_size(model_path: Path) -> int:
    """Returns the largest number of visible GPUs that evenly divides the model's attention heads."""
    import torch

    num_gpus = max(1, torch.cuda.device_count())
    num_heads = int(getattr(read_config(model_path).get_text_config(), "num_attention_heads", 1))
    return next(count for count in range(num_gpus, 0, -1) if num_heads % count == 0)


def _vllm_version() -> str:
    try:
        return version("vllm")
    except PackageNotFoundError:
        return "unknown"
