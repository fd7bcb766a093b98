"""A chat model on this machine: any image-text-to-text model that transformers loads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice

import torch

from vlm_unlearn.data.batching import Processor, Turn, encode, move, render
from vlm_unlearn.data.images import open_image
from vlm_unlearn.errors import RequestError
from vlm_unlearn.generation.chat import Ask, OnReply, Reply
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
            batch = self._readable(processor, batch, on_reply)
            if not batch:
                batch = list(islice(waiting, self._batch_size))
                continue
            turns = [_turn(ask) for ask in batch]
            inputs = move(encode(processor, turns, padding_side="left"), model.device, model.dtype)
            output = model.generate(**inputs, max_new_tokens=self._max_tokens, do_sample=False)
            texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for ask, text in zip(batch, texts, strict=True):
                on_reply(Reply(ask.id, text.strip() or None, None if text.strip() else "empty answer"))
            batch = list(islice(waiting, self._batch_size))

    def _readable(self, processor: Processor, batch: list[Ask], on_reply: OnReply) -> list[Ask]:
        """The questions that can be encoded; the others get their error as reply."""
        good = []
        for ask in batch:
            try:
                render(processor, _turn(ask))
                if ask.image is not None:
                    open_image(ask.image).close()
            except RequestError as error:
                on_reply(Reply(ask.id, None, str(error)))
            else:
                good.append(ask)
        return good


def _turn(ask: Ask) -> Turn:
    return Turn(ask.id, ask.image, ask.text, None)
