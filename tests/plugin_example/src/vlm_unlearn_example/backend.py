"""A backend: a model that repeats the question."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from vlm_unlearn.config import GenerationConfig
from vlm_unlearn.generation.base import GenerationRequest, OnResponses, split_into_batches
from vlm_unlearn.records import Response


class EchoBackend:
    """Answers each question with the question.

    Args:
        model: The suite's model. It is not used.
        config: The generation settings. They are not used.
    """

    def __init__(self, model: str, config: GenerationConfig) -> None:
        self._model = model

    def identity(self) -> Mapping[str, object]:
        """Returns everything that determines a response."""
        return {"model": self._model, "generation": {"backend": "echo"}}

    def make_batches(self, requests: Sequence[GenerationRequest]) -> list[list[GenerationRequest]]:
        """Splits requests into batches."""
        return split_into_batches(requests, 8)

    def check_available(self) -> None:
        """Does nothing, because there is no server."""

    def run(self, batches: Iterable[Sequence[GenerationRequest]], on_responses: OnResponses) -> None:
        """Generates all responses."""
        for batch in batches:
            on_responses(list(self.run_one_by_one(batch)))

    def run_one_by_one(self, requests: Sequence[GenerationRequest]) -> Iterator[Response]:
        """Yields one response for each request."""
        for request in requests:
            text = request.prompt.question
            yield Response(prompt_id=request.prompt.id, sample=request.sample, text=text, finish_reason="stop")
