"""Answers from vLLM in this process: ``pip install '.[vllm]'``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlm_unlearn.config import GenerationConfig
from vlm_unlearn.data.images import open_image, png_url
from vlm_unlearn.errors import UserError
from vlm_unlearn.generation.base import GenerationRequest, OnResponses, sampling_seed, split_into_batches
from vlm_unlearn.models.loader import read_config, resolve_precision, run_digest, run_model_folder
from vlm_unlearn.records import Response

WRITTEN = 16  # so many batches' worth of answers are asked for, and written, at once: vLLM fills its own batches best from many
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


class VLLMBackend:
    """A plain model folder or hub name, split over all GPUs that this process sees.

    Raises:
        UserError: vLLM is not installed, there is no such model, or it is an adapter.
    """

    def __init__(self, model: str, config: GenerationConfig) -> None:
        if find_spec("vllm") is None:
            raise UserError("generation.backend=vllm: vLLM is not installed; pip install '.[vllm]', or use backend=hf")
        self._folder = run_model_folder(model)
        if (self._folder / "adapter_config.json").is_file():
            run = self._folder.parent if (self._folder.parent / "manifest.json").is_file() else model
            raise UserError(
                f"model {model}: is an adapter, and vLLM takes whole models; merge it: vlm-unlearn export {run} --out DIR"
            )
        self._config = config
        self._precision = resolve_precision(config.precision)

    def identity(self) -> Mapping[str, object]:
        decided = ("backend", "max_new_tokens", "temperature", "top_p", "seed")
        generation = {**self._config.model_dump(include=set(decided)), "precision": self._precision, "vllm": _version()}
        return {"model": run_digest(self._folder), "generation": generation}

    @cached_property
    def _engine(self) -> Any:
        from vllm import LLM

        return LLM(
            model=str(self._folder),
            dtype=DTYPES[self._precision],
            tensor_parallel_size=tensor_parallel(self._folder),
            limit_mm_per_prompt={"image": 1},
            seed=self._config.seed,
            generation_config="vllm",  # not the model's own penalties, top-k and temperature
        )

    def make_batches(self, questions: Sequence[GenerationRequest]) -> list[list[GenerationRequest]]:
        return split_into_batches(questions, WRITTEN * self._config.batch_size)

    def check_available(self) -> None:
        """The folder was looked at when this was made."""

    def run(self, batches: Iterable[Sequence[GenerationRequest]], on_answers: OnResponses) -> None:
        for batch in batches:
            on_answers(self._answer(batch))

    def run_one_by_one(self, questions: Sequence[GenerationRequest]) -> Iterator[Response]:
        for question in questions:
            yield from self._answer([question])

    def _answer(self, questions: Sequence[GenerationRequest]) -> list[Response]:
        from vllm import SamplingParams

        config = self._config
        settings = [
            SamplingParams(
                max_tokens=config.max_new_tokens,
                temperature=config.temperature,
                top_p=config.top_p if config.temperature else 1.0,
                seed=sampling_seed(config.seed, question) if config.temperature else None,
            )
            for question in questions
        ]
        outputs = self._engine.chat([_messages(question) for question in questions], settings, use_tqdm=False)
        return [
            Response(
                prompt_id=question.prompt.id,
                sample=question.sample,
                text=output.outputs[0].text.strip(),
                finish_reason=output.outputs[0].finish_reason,
            )
            for question, output in zip(questions, outputs, strict=True)
        ]


def _messages(question: GenerationRequest) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [{"type": "text", "text": question.prompt.question}]
    if question.image is not None:
        content.insert(0, {"type": "image_url", "image_url": {"url": png_url(open_image(question.image))}})
    return [{"role": "user", "content": content}]


def tensor_parallel(folder: Path) -> int:
    """Over how many GPUs vLLM can split the model: the most that are visible and that its attention heads can be dealt out to."""
    import torch

    visible = max(1, torch.cuda.device_count())
    heads = int(getattr(read_config(folder).get_text_config(), "num_attention_heads", 1))
    return next(count for count in range(visible, 0, -1) if heads % count == 0)


def _version() -> str:
    try:
        return version("vllm")
    except PackageNotFoundError:
        return "unknown"
