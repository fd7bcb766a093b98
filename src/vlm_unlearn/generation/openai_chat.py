"""A chat model behind an OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from vlm_unlearn.errors import RunError, UserError, quoted
from vlm_unlearn.generation.chat import ChatRequest, ChatResponse, OnChatResponse, response_from_text
from vlm_unlearn.generation.completions import (
    CONTENT_FILTER,
    MalformedResponseError,
    error_in,
    has_reasoning,
    is_content_filter,
    text_of,
    token_usage,
)

if TYPE_CHECKING:
    from openai import AsyncOpenAI

TOO_LARGE = "response_too_large"  # the code of the error with which the transport replaces a response that is too large
FILTERED = "the server's content filter rejected the question or the answer"
OVERLOAD_STATUSES = (408, 409, 429, 502, 503, 504, 529)
UNREACHABLE, OVERLOADED, REJECTED = "unreachable", "overloaded", "rejected"  # reasons of failures
API_KEY_VARIABLE = "OPENAI_API_KEY"
FIRST_RETRY_SECONDS = 0.5  # delay before the first retry of a malformed response, as in the client. It doubles up to 8.
# The keys with which vLLM, SGLang and others continue the last message, that of the assistant.
CONTINUE_ANSWER = {"continue_final_message": True, "add_generation_prompt": False}
MAX_FAILURES_IN_A_ROW = 8  # a run stops after so many failed requests in a row (or `concurrency`, if that is more)


class OpenAIChat:
    """A server with the OpenAI chat completions API: vLLM, ``transformers serve``, OpenAI itself.

    The official client retries after status 429 and 5xx, timeouts and broken connections, with jittered backoff, and
    respects Retry-After. Malformed responses that the client accepts (broken JSON, no choices) are retried here in the
    same way. The API key is read from the environment variable ``OPENAI_API_KEY`` and never appears in a message.

    Args:
        base_url: The server's address, such as ``http://localhost:8000/v1``.
        model: The model's name on the server.
        max_tokens: The maximum number of tokens of a response.
        concurrency: The maximum number of pending requests.
        timeout: Seconds per attempt.
        retries: The number of further attempts after a failed one.
        temperature: 0 for greedy decoding. Above 0, each request is sampled with its `ChatRequest.seed`, provided that
            the server honors seeds.
        top_p: Samples from the most likely tokens whose probabilities add up to `top_p`.
        verbatim: Whether truncated and empty texts are valid responses, as they are from a model under test. By default
            they are errors.
        request: Keys to add to the request body or to replace in it. None removes a key. Servers differ in the keys
            they accept: OpenAI's reasoning models require ``max_completion_tokens``, vLLM has ``chat_template_kwargs``.
        revision: A name for the weights that the server runs, which a client cannot find out. Cached responses of other
            revisions are not used.

    Raises:
        UserError: The address or the API key is malformed.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        max_tokens: int = 256,
        concurrency: int = 16,
        timeout: float = 60.0,
        retries: int = 4,
        temperature: float = 0.0,
        top_p: float = 1.0,
        verbatim: bool = False,
        request: Mapping[str, Any] | None = None,
        revision: str = "",
    ) -> None:
        if not _is_server_address(base_url):
            raise UserError(
                f"{quoted(base_url)} is not a server address. Addresses start with http:// or https://, for example "
                "http://localhost:8000/v1.",
                code="invalid-field",
                field="server",
            )
        self._base_url = base_url.rstrip("/")
        self._model = model
        self._max_tokens = max_tokens
        self._concurrency = concurrency
        self._timeout = timeout
        self._retries = retries
        self._top_p = top_p
        self._sampling = self._sampling_keys(temperature)
        self._verbatim = verbatim
        self._request = dict(request or {})
        self._revision = revision
        self._failures: Counter[str] = Counter()  # requests in a row that failed, by the reason
        self._api_key = os.environ.get(API_KEY_VARIABLE, "").strip()
        if not self._api_key.isascii() or not self._api_key.isprintable():
            raise UserError(
                "contains a character that is not allowed in an API key. Look for a stray space or line break.",
                code="invalid-field",
                field=API_KEY_VARIABLE,
            )

    def _sampling_keys(self, temperature: float) -> dict[str, Any]:
        # Greedy requests contain no other sampling key: some servers reject or misread keys that they do not support.
        return {"temperature": temperature, "top_p": self._top_p} if temperature else {"temperature": 0}

    def identity(self) -> Mapping[str, object]:
        identity = {"server": self._base_url, "model": self._model, "max_tokens": self._max_tokens, **self._sampling}
        identity |= {"request": self._request} if self._request else {}
        return identity | ({"revision": self._revision} if self._revision else {})

    def check_available(self) -> None:
        """Checks that the server is reachable and accepts the API key.

        Raises:
            RunError: The server is not reachable.
            UserError: The server rejects the API key.
        """
        import httpx2 as httpx
        import openai

        from vlm_unlearn.generation.bounded_transport import BoundedTransport

        try:
            with openai.OpenAI(
                base_url=self._base_url,
                api_key=self._api_key or "none",
                max_retries=1,
                timeout=min(self._timeout, 10),
                http_client=httpx.Client(transport=BoundedTransport(), follow_redirects=True),
            ) as client:
                client.models.list()
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise UserError(
                f"{self._base_url} returned status {error.status_code}. Check {API_KEY_VARIABLE}.", code="access-denied"
            ) from None
        except openai.APIConnectionError:
            raise RunError(
                f"{self._base_url} does not respond. Check that the server is running.", code="server-unreachable"
            ) from None
        except Exception:  # a server that cannot list its models may still complete chats
            return

    def run(self, requests: Iterable[ChatRequest], on_response: OnChatResponse) -> None:
        """Sends the requests, at most `concurrency` at a time. Memory use does not grow with their number.

        Raises:
            UserError: The server rejects the API key, does not know the model, or rejects many requests in a row, so
                that later requests would fail too.
            RunError: The server is not reachable.
        """
        asyncio.run(self._run(iter(requests), on_response))

    async def _run(self, requests: Iterator[ChatRequest], on_response: OnChatResponse) -> None:
        import httpx2 as httpx
        from openai import AsyncOpenAI

        from vlm_unlearn.generation.bounded_transport import AsyncBoundedTransport

        limits = httpx.Limits(max_connections=1000, max_keepalive_connections=100)  # those of the client
        async with AsyncOpenAI(
            base_url=self._base_url,
            api_key=self._api_key or "none",
            max_retries=self._retries,
            timeout=self._timeout,
            http_client=httpx.AsyncClient(transport=AsyncBoundedTransport(limits), follow_redirects=True),
        ) as client:

            async def work() -> None:
                for request in requests:  # the workers share the iterator
                    response = await self._respond(client, request)
                    self._raise_if_hopeless(response)
                    on_response(response)

            workers = [asyncio.create_task(work()) for _ in range(self._concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()

    def _raise_if_hopeless(self, response: ChatResponse) -> None:
        """Raises an error if so many requests have failed in a row that later ones would fail too."""
        reason, count = next(iter(self._failures.items()), ("", 0))
        if count < max(self._concurrency, MAX_FAILURES_IN_A_ROW):
            return
        if reason == UNREACHABLE:
            raise RunError(
                f"{self._base_url} did not respond to {count} requests in a row ({response.error}). "
                "Check that the server is running.",
                code="server-unreachable",
            )
        if reason == OVERLOADED:
            raise RunError(
                f"{self._base_url} is overloaded: {count} requests in a row failed after all retries "
                f"({response.error}). Wait, or lower `concurrency`, and run the same command again.",
                code="server-overloaded",
            )
        raise UserError(
            f"{self._base_url} rejected {count} requests in a row ({response.error}). Add or remove "
            "keys of the request body with `request`, for example request={max_tokens: null, "
            "max_completion_tokens: 512}.",
            code="server-error",
        )

    def _count_failure(self, reason: str) -> None:
        """Counts a failed request. A failure for another reason, or a response, starts the count again."""
        self._failures = Counter({reason: self._failures[reason] + 1})

    async def _respond(self, client: AsyncOpenAI, request: ChatRequest) -> ChatResponse:
        """Sends one request and retries it after a malformed response."""
        try:
            messages = request.messages()
        except UserError as error:  # the image cannot be read
            return ChatResponse(request.id, None, str(error))
        for attempt in range(self._retries + 1):
            if attempt:
                await asyncio.sleep(min(FIRST_RETRY_SECONDS * 2 ** (attempt - 1), 8.0) * random.uniform(0.75, 1.0))
            try:
                return await self._send(client, request, messages)
            except MalformedResponseError as error:
                message = str(error)
        return ChatResponse(request.id, None, message)

    def _body(self, request: ChatRequest, messages: list[Any]) -> dict[str, Any]:
        """Returns the body of a request. The configured keys replace others, and a null removes a key."""
        sampling = self._sampling if request.temperature is None else self._sampling_keys(request.temperature)
        body: dict[str, Any] = {
            "model": self._model,
            "messages": messages,
            "max_tokens": self._max_tokens,
            **sampling,
        }
        if request.seed is not None and sampling["temperature"]:
            body["seed"] = request.seed
        configured = self._request
        if request.prefill is not None:
            body |= CONTINUE_ANSWER
        else:  # these keys would continue the question
            configured = {key: value for key, value in configured.items() if key not in CONTINUE_ANSWER}
        return {key: value for key, value in {**body, **configured}.items() if value is not None}

    async def _send(self, client: AsyncOpenAI, request: ChatRequest, messages: list[Any]) -> ChatResponse:
        """Sends one request, with the client's own retries.

        Raises:
            MalformedResponseError: The response is malformed. A retry may succeed.
        """
        import openai

        body = self._body(request, messages)
        try:
            # `chat.completions.create` validates the body, which takes longer than a call to a nearby server.
            # The client's timeout applies to each chunk, so a server that sends slowly would never time out.
            total_timeout = (self._timeout + 10) * (self._retries + 1)
            completion = await asyncio.wait_for(
                client.post("/chat/completions", cast_to=object, body=body), total_timeout
            )
        except openai.APIStatusError as error:
            # Not raised from here: a traceback would contain the server's message, which may repeat the API key.
            failure: tuple[int, object] | None = (error.status_code, error.body)
        except (openai.APIConnectionError, TimeoutError) as error:  # after all retries
            self._count_failure(UNREACHABLE)
            return ChatResponse(request.id, None, type(error).__name__)
        except Exception as error:  # the body is not JSON, or JSON of another shape
            self._failures.clear()
            raise MalformedResponseError(type(error).__name__) from None
        else:
            failure = error_in(completion)
        if failure is not None:
            return self._failed_response(request, *failure)
        self._failures.clear()
        return self._parse(request, completion)

    def _failed_response(self, request: ChatRequest, status: int, body: object) -> ChatResponse:
        """Returns the response to a request that the server has answered with an error.

        Args:
            request: The request.
            status: The HTTP status, or the status that the body of a response with status 200 contains.
            body: The content of the key ``error`` of the response.

        Raises:
            UserError: The key or the model is wrong, so that every other request would fail too.
        """
        if isinstance(body, dict) and body.get("code") == TOO_LARGE:  # of the transport, not of the server
            self._failures.clear()
            return ChatResponse(request.id, None, f"the reply is not read{self._server_message(body)}")
        message = f"HTTP {status}{self._server_message(body)}"
        if is_content_filter(body):  # it concerns this question alone
            self._failures.clear()
            return ChatResponse(request.id, None, f"{FILTERED} ({message})", finish_reason=CONTENT_FILTER)
        if status in (401, 403, 404):
            raise UserError(
                f"{self._base_url} returned status {status} for model {quoted(self._model)}. Check the "
                f"server's address, the model's name and {API_KEY_VARIABLE}.",
                code="model-not-found" if status == 404 else "access-denied",
            )
        if status in (400, 422):
            self._count_failure(REJECTED)
        elif status in OVERLOAD_STATUSES:
            self._count_failure(OVERLOADED)
        else:
            self._failures.clear()
        return ChatResponse(request.id, None, message)

    def _server_message(self, body: object) -> str:
        """Returns the server's error message for use after a colon, without the API key, which some servers repeat."""
        message = body.get("message") if isinstance(body, dict) else None
        if not isinstance(message, str) or not message.strip():
            return ""
        return f": {quoted(message.replace(self._api_key, '***') if self._api_key else message, 200)}"

    def _parse(self, request: ChatRequest, completion: object) -> ChatResponse:
        """Converts a chat completion, in the JSON of the API, to a response.

        Raises:
            MalformedResponseError: The completion has no choices, or its content is not a text.
        """
        choices = completion.get("choices") if isinstance(completion, dict) else None
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise MalformedResponseError("empty answer")
        message = choices[0].get("message")
        message = message if isinstance(message, dict) else {}
        text = text_of(message)
        finish_reason = choices[0].get("finish_reason")  # optional on some servers
        finish_reason = finish_reason if isinstance(finish_reason, str) else None
        if finish_reason == CONTENT_FILTER:
            cut = f" after {quoted(text)}" if text else ""
            response = ChatResponse(request.id, None, f"{FILTERED}{cut}", finish_reason=finish_reason)
        elif not text and has_reasoning(message):
            error = "the reply contains reasoning only"
            if finish_reason == "length":
                error += f", which was cut at max_tokens = {self._max_tokens}. Raise the maximum number of tokens."
            response = ChatResponse(request.id, None, error, finish_reason=finish_reason)
        elif self._verbatim and text is not None:
            response = ChatResponse(request.id, text, finish_reason=finish_reason)
        else:
            response = response_from_text(request, text, finish_reason, self._max_tokens)
        return replace(response, tokens=token_usage(completion))


def _is_server_address(base_url: str) -> bool:
    try:
        address = urlsplit(base_url)
        host = address.hostname or ""
        return (
            host.isascii()
            and host != ""
            and not address.query
            and address.scheme in ("http", "https")
            and (address.port or 1) > 0
        )
    except ValueError:  # raised by urlsplit and by `port`
        return False
