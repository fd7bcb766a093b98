"""Generation with a model that an OpenAI-compatible server runs: vLLM, ``transformers serve``, OpenAI itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from types import TracebackType

from vlm_unlearn.config import GenerationConfig
from vlm_unlearn.generation.base import (
    BACKENDS,
    PROMPT_FIELDS,
    GenerationRequest,
    OnResponses,
    sampling_seed,
    split_into_batches,
)
from vlm_unlearn.generation.chat import ChatRequest, ChatResponse
from vlm_unlearn.generation.openai_chat import CONTINUE_ANSWER, OpenAIChat
from vlm_unlearn.records import Prompt, Response


@BACKENDS.register("openai")
class ServerBackend:
    """Generates with any OpenAI-compatible server. Responses arrive one at a time, in any order.

    A request that fails gets a response with an `error`. It is sent again by the next run. If the server does not
    continue an answer, every request with a prefill fails, and none of them is sent.

    Args:
        model: The model's name on the server.
        config: The generation settings.

    Raises:
        UserError: The server's address is invalid.
    """

    prompt_fields = PROMPT_FIELDS

    def __init__(self, model: str, config: GenerationConfig) -> None:
        self._model = model
        self._config = config
        self._chat(1)  # checks the address

    def identity(self) -> Mapping[str, object]:
        settings = ("backend", "max_new_tokens", "temperature", "top_p", "seed", "request")
        # A server does not tell which weights it runs, so they cannot be part of the identity.
        model = {"server": self._config.server, "name": self._model, "weights": "unknown"}
        return {"model": model, "generation": self._config.identity(*settings)}

    def _chat(
        self, concurrency: int, max_tokens: int | None = None, request: Mapping[str, object] | None = None
    ) -> OpenAIChat:
        config = self._config
        return OpenAIChat(
            str(config.server),
            self._model,
            max_tokens or config.max_new_tokens,
            concurrency,
            config.timeout,
            temperature=config.temperature,
            top_p=config.top_p,
            verbatim=True,
            request={**config.request, **(request or {})},
        )

    def make_batches(self, requests: Sequence[GenerationRequest]) -> list[list[GenerationRequest]]:
        return split_into_batches(requests, 1)  # the server forms its own batches

    def check_available(self) -> None:
        self._chat(1).check_available()

    def run(self, batches: Iterable[Sequence[GenerationRequest]], on_responses: OnResponses) -> None:
        with ResponseBuffer(on_responses) as buffer:
            requests = (request for batch in batches for request in batch)
            self._send(requests, buffer.add, self._config.concurrency)

    def run_one_by_one(self, requests: Sequence[GenerationRequest]) -> Iterator[Response]:
        responses: list[Response] = []
        self._send(requests, responses.append, 1)
        yield from responses

    def _send(
        self, requests: Iterable[GenerationRequest], on_response: Callable[[Response], None], concurrency: int
    ) -> None:
        pending: dict[str, GenerationRequest] = {}

        def chat_requests() -> Iterator[ChatRequest]:
            for number, request in enumerate(requests):
                if request.prompt.prefill is not None and self._prefill_problem is not None:
                    prompt_id, sample = request.key
                    on_response(Response(prompt_id=prompt_id, sample=sample, error=self._prefill_problem))
                    continue
                pending[str(number)] = request
                seed = sampling_seed(self._config.seed, request)
                yield ChatRequest.of_prompt(str(number), request.prompt, request.image, seed)

        def on_chat_response(chat_response: ChatResponse) -> None:
            request = pending.pop(chat_response.id)
            response = Response(
                prompt_id=request.prompt.id,
                sample=request.sample,
                text=stripped_answer(chat_response.text, request.prompt),
                finish_reason=chat_response.finish_reason,
                error=chat_response.error,
            )
            on_response(response)

        requests = list(requests)
        if any(request.prompt.prefill is not None for request in requests):
            _ = self._prefill_problem  # sends requests, which is not possible while others run
        self._chat(concurrency).run(chat_requests(), on_chat_response)

    @cached_property
    def _prefill_problem(self) -> str | None:
        """Why the server does not continue an answer that has begun, or None if it does.

        A server that does not know the keys may ignore them. It would then answer anew, with the beginning as a
        finished answer before it, which is another attack. Two requests show it: if the server continues the answer,
        its prompt has fewer tokens with the keys than without them, because the answer is not closed and no new one is
        opened. If the suite sets one of the keys itself, the server is trusted, and nothing is sent.
        """
        if CONTINUE_ANSWER.keys() & self._config.request.keys():
            return None
        counts: dict[str, int] = {}
        errors: list[str] = []

        def on_response(response: ChatResponse) -> None:
            if response.tokens is None:
                errors.append(response.error or "it reports no number of prompt tokens")
            else:
                counts[response.id] = response.tokens[0]

        requests: dict[str, Mapping[str, object]] = {
            "continued": {},
            "closed": {key: not value for key, value in CONTINUE_ANSWER.items()},
        }
        for id, keys in requests.items():
            self._chat(1, max_tokens=1, request=keys).run(
                [ChatRequest(id, "Hello", prefill="Good morning", temperature=0)], on_response
            )
        if not errors and counts["continued"] < counts["closed"]:
            return None
        reason = errors[0] if errors else "it ignores these keys"
        keys_text = ", ".join(f"{key}: {str(value).lower()}" for key, value in CONTINUE_ANSWER.items())
        return (
            f"{self._config.server} does not continue an answer with {keys_text}: {reason}. Use vLLM's server, or "
            "backend: hf. If the server needs other keys, set them in generation.request, and one of these two to null."
        )


def stripped_answer(text: str | None, prompt: Prompt) -> str | None:
    """Returns the text of an answer without surrounding space. After a prefill, the space between the two stays."""
    if text is None:
        return None
    return text.strip() if prompt.prefill is None else text.rstrip()


class ResponseBuffer:
    """Collects responses and passes them on once per interval, from a background thread.

    Writing in groups saves one disk synchronization per response, and a killed process loses one interval at most.

    Args:
        on_responses: Called with each group of responses.
        interval: Seconds between two groups.
    """

    def __init__(self, on_responses: OnResponses, interval: float = 1.0) -> None:
        self._on_responses = on_responses
        self._interval = interval
        self._pending: list[Response] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._error: Exception | None = None  # raised by `on_responses`, for example because the disk is full
        self._thread = threading.Thread(target=self._flush_periodically, daemon=True)

    def add(self, response: Response) -> None:
        """Adds a response. Raises the error of `on_responses` if an earlier call in the background failed."""
        if self._error:
            raise self._error
        with self._lock:
            self._pending.append(response)

    def _flush_periodically(self) -> None:
        while not self._closed.wait(self._interval) and self._error is None:
            try:
                self._flush()
            except Exception as error:
                self._error = error

    def _flush(self) -> None:
        with self._lock:
            if self._pending:
                self._on_responses(self._pending)
                self._pending = []

    def __enter__(self) -> ResponseBuffer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()
        self._flush()
