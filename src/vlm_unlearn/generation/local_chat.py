"""A chat model on this machine: any image-text-to-text model that transformers loads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch

from vlm_unlearn.data.batching import Processor, Turn, encode, move
from vlm_unlearn.errors import RequestError
from vlm_unlearn.generation.chat import Ask, OnReply, Reply
from vlm_unlearn.generation.decoding import plain_settings
from vlm_unlearn.models.loading import device, load_run_model, resolve_precision, run_digest, run_model_folder
from vlm_unlearn.store import package_versions


class LocalChat:
    """Greedy answers in batches."""

    def __init__(self, model: str, max_tokens: int = 256, batch_size: int = 8) -> None:
        self._folder = run_model_folder(model)
        self._max_tokens = max_tokens
        self._batch_size = batch_size

    def identity(self) -> Mapping[str, object]:
        return {"weights": run_digest(self._folder), "max_tokens": self._max_tokens, "versions": package_versions()}

    @torch.no_grad()
    def run(self, asks: Iterable[Ask], on_reply: OnReply) -> None:
        waiting = iter(asks)
        batch = list(islice(waiting, self._batch_size))
        if not batch:
            return  # all was cached: no model is needed
        model, processor = load_run_model(self._folder, resolve_precision("auto"))
        model.eval().to(device())
        while batch:
            for reply in self._replies(model, processor, batch):
                on_reply(reply)
            batch = list(islice(waiting, self._batch_size))

    def _replies(self, model: Any, processor: Processor, batch: list[Ask]) -> Iterator[Reply]:
        """A reply a question; where a batch can't be encoded, one by one, so that only the cause gets an error."""
        try:
            inputs = encode(processor, [Turn(ask.id, ask.image, ask.text, None) for ask in batch], padding_side="left")
        except RequestError as error:
            if len(batch) == 1:
                yield Reply(batch[0].id, None, str(error))
            else:
                for ask in batch:
                    yield from self._replies(model, processor, [ask])
            return
        inputs = move(inputs, model.device, model.dtype)
        with plain_settings(model):
            output = model.generate(**inputs, max_new_tokens=self._max_tokens, do_sample=False)
        texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for ask, text in zip(batch, texts, strict=True):
            yield Reply(ask.id, text.strip() or None, None if text.strip() else "empty answer")
