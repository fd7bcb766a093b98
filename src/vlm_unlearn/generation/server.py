"""Answers from a model that a server runs: vLLM, `transformers serve`, OpenAI itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType

from vlm_unlearn.config import GenerationConfig
from vlm_unlearn.generation.base import GenerationRequest, OnResponses, sampling_seed, split_into_batches
from vlm_unlearn.generation.chat import ChatRequest, ChatResponse, OpenAIChat
from vlm_unlearn.records import Response


class ServerBackend:
    """Any OpenAI-compatible server. Answers come one at a time, in any order.

    What the server can't answer gets a Response that says why, and is asked again the next time.

    Args:
        model: the name that the server knows the model by.

    Raises:
        UserError: the server's address is none.
    """

    def __init__(self, model: str, config: GenerationConfig) -> None:
        self._model = model
        self._config = config
        self._chat(1)

    def identity(self) -> Mapping[str, object]:
        decided = ("backend", "max_new_tokens", "temperature", "top_p", "seed", "request")
        # No digest can be had of what a server runs: a folder is only as good as the word of who started it.
        model = {"server": self._config.server, "name": self._model, "weights": "unknown"}
        return {"model": model, "generation": self._config.model_dump(include=set(decided))}

    def _chat(self, concurrency: int) -> OpenAIChat:
        config = self._config
        return OpenAIChat(
            str(config.server),
            self._model,
            config.max_new_tokens,
            concurrency,
            config.timeout,
            temperature=config.temperature,
            top_p=config.top_p,
            verbatim=True,
            request=config.request,
        )

    def make_batches(self, questions: Sequence[GenerationRequest]) -> list[list[GenerationRequest]]:
        return split_into_batches(questions, 1)  # the server makes its own

    def check_available(self) -> None:
        self._chat(1).check_available()

    def run(self, batches: Iterable[Sequence[GenerationRequest]], on_answers: OnResponses) -> None:
        with Grouped(on_answers) as grouped:
            self._ask((question for batch in batches for question in batch), grouped.add, self._config.concurrency)

    def run_one_by_one(self, questions: Sequence[GenerationRequest]) -> Iterator[Response]:
        found: list[Response] = []
        self._ask(questions, found.append, 1)
        yield from found

    def _ask(
        self, questions: Iterable[GenerationRequest], on_answer: Callable[[Response], None], concurrency: int
    ) -> None:
        under_way: dict[str, GenerationRequest] = {}

        def asks() -> Iterator[ChatRequest]:
            for number, question in enumerate(questions):
                under_way[str(number)] = question
                yield ChatRequest(
                    str(number), question.prompt.question, question.image, sampling_seed(self._config.seed, question)
                )

        def take(reply: ChatResponse) -> None:
            question = under_way.pop(reply.id)
            text = None if reply.text is None else reply.text.strip()
            answered = Response(
                prompt_id=question.prompt.id,
                sample=question.sample,
                text=text,
                finish_reason=reply.finish_reason,
                error=reply.error,
            )
            on_answer(answered)

        self._chat(concurrency).run(asks(), take)


class Grouped:
    """Hands answers on in groups, each second what has come: a disk need not sync for every one, and a kill loses little."""

    def __init__(self, on_answers: OnResponses, seconds: float = 1.0) -> None:
        self._on_answers = on_answers
        self._seconds = seconds
        self._pending: list[Response] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._problem: Exception | None = None  # a full disk, say
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def add(self, answer: Response) -> None:
        """Takes an answer in; raises what handing on has raised."""
        if self._problem:
            raise self._problem
        with self._lock:
            self._pending.append(answer)

    def _tick(self) -> None:
        while not self._closed.wait(self._seconds) and self._problem is None:
            try:
                self._hand_on()
            except Exception as problem:
                self._problem = problem

    def _hand_on(self) -> None:
        with self._lock:
            if self._pending:
                self._on_answers(self._pending)
                self._pending = []

    def __enter__(self) -> Grouped:
        self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._ticker.join()
        self._hand_on()
