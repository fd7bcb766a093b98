"""A chat model in this process: any image-text-to-text model that transformers loads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from vlm_unlearn.data.encoding import Turn
from vlm_unlearn.data.processor_call import Processor
from vlm_unlearn.generation.chat import ChatRequest, ChatResponse, OnChatResponse, response_from_text
from vlm_unlearn.generation.hf import generate_texts, rejection
from vlm_unlearn.modeling.loader import default_device, load_run_model, resolve_precision, run_digest, run_model_folder
from vlm_unlearn.store import package_versions


class LocalChat:
    """A chat model that decodes greedily, in batches.

    Args:
        model: A model folder, hub name, adapter folder or training run.
        max_tokens: The maximum number of tokens of a response.
        batch_size: The number of requests per batch.
        verbatim: Whether truncated and empty texts are valid responses. By default they are errors.

    Raises:
        UserError: The model does not exist.
    """

    def __init__(self, model: str, max_tokens: int = 256, batch_size: int = 8, verbatim: bool = False) -> None:
        self._folder = run_model_folder(model)
        self._max_tokens = max_tokens
        self._batch_size = batch_size
        self._verbatim = verbatim
        self._precision = resolve_precision("auto")

    @cached_property
    def _digest(self) -> str:
        return run_digest(self._folder)

    def identity(self) -> Mapping[str, object]:
        return {
            "weights": self._digest,
            "precision": self._precision,
            "max_tokens": self._max_tokens,
            "versions": package_versions(),
            **({"verbatim": True} if self._verbatim else {}),
        }

    def run(self, requests: Iterable[ChatRequest], on_response: OnChatResponse) -> None:
        iterator = iter(requests)
        while batch := list(islice(iterator, self._batch_size)):  # without requests, no model is loaded
            for response in self._respond(*_load(self._folder, self._digest, self._precision), batch):
                on_response(response)

    def _respond(self, model: Any, processor: Processor, batch: list[ChatRequest]) -> Iterator[ChatResponse]:
        """Yields one response per request. Those that the processor rejects fail, and the others run without them."""
        turns = [
            Turn(
                request.id,
                request.image,
                request.text,
                None,
                request.history,
                request.system,
                request.image_offset,
                image_round=request.image_round,
                prefill=request.prefill,
            )
            for request in batch
        ]
        try:
            outputs = generate_texts(model, processor, turns, self._max_tokens)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # processors raise many types of errors
            reasons = [rejection(processor, turn) for turn in turns]
            if not any(reasons):
                raise
            for request, reason in zip(batch, reasons, strict=True):
                if reason is not None:
                    yield ChatResponse(request.id, None, reason)
            valid = [request for request, reason in zip(batch, reasons, strict=True) if reason is None]
            if valid:
                yield from self._respond(model, processor, valid)
            return
        for request, (text, finish_reason) in zip(batch, outputs, strict=True):
            if self._verbatim:
                yield ChatResponse(request.id, text, finish_reason=finish_reason)
            else:
                yield response_from_text(request, text, finish_reason, self._max_tokens)


@lru_cache(maxsize=1)
def _load(model_path: Path, digest: str, precision: str) -> tuple[Any, Processor]:
    """Loads a model and keeps it for the judges that follow. The digest tells apart weights in the same folder."""
    model, processor = load_run_model(model_path, precision)
    model.to(default_device()).eval()
    return model, processor
