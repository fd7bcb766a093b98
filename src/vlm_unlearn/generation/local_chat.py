"""A chat model on this machine: any image-text-to-text model that transformers loads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from vlm_unlearn.data.encoding import Processor, Turn
from vlm_unlearn.errors import UserError
from vlm_unlearn.generation.chat import ChatRequest, ChatResponse, OnChatResponse, chat_response
from vlm_unlearn.generation.hf import generate_texts
from vlm_unlearn.models.loader import default_device, load_run_model, resolve_precision, run_digest, run_model_folder
from vlm_unlearn.store import package_versions


class LocalChat:
    """Greedy answers in batches.

    Raises:
        UserError: there is no such model.
    """

    def __init__(self, model: str, max_tokens: int = 256, batch_size: int = 8) -> None:
        self._folder = run_model_folder(model)
        self._max_tokens = max_tokens
        self._batch_size = batch_size
        self._precision = resolve_precision("auto")

    @cached_property
    def _digest(self) -> str:
        return run_digest(self._folder)

    def identity(self) -> Mapping[str, object]:
        decided = {"weights": self._digest, "precision": self._precision, "max_tokens": self._max_tokens}
        return {**decided, "versions": package_versions()}

    def run(self, asks: Iterable[ChatRequest], on_reply: OnChatResponse) -> None:
        waiting = iter(asks)
        while batch := list(islice(waiting, self._batch_size)):  # where all was cached no model is needed
            for reply in self._replies(*_loaded(self._folder, self._digest, self._precision), batch):
                on_reply(reply)

    def _replies(self, model: Any, processor: Processor, batch: list[ChatRequest]) -> Iterator[ChatResponse]:
        """A reply a question; where a batch can't be encoded, one by one, so that only the cause gets an error."""
        try:
            said = generate_texts(
                model, processor, [Turn(ask.id, ask.image, ask.text, None) for ask in batch], self._max_tokens
            )
        except UserError as error:
            if len(batch) == 1:
                yield ChatResponse(batch[0].id, None, str(error))
            else:
                for ask in batch:
                    yield from self._replies(model, processor, [ask])
            return
        for ask, (text, reason) in zip(batch, said, strict=True):
            yield chat_response(ask, text, reason, self._max_tokens)


@lru_cache(maxsize=1)
def _loaded(folder: Path, digest: str, precision: str) -> tuple[Any, Processor]:
    """A model, held for the judges that come after this one; other weights in the same folder are another model."""
    model, processor = load_run_model(folder, precision)
    model.to(default_device()).eval()
    return model, processor
