"""Asking a chat model many questions: any OpenAI-compatible server, or a model on this machine; with a cache that survives a kill."""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from vlm_unlearn.data.images import open_image, png_url
from vlm_unlearn.errors import RunError, UserError, quoted
from vlm_unlearn.store import digest_file, digest_json

if TYPE_CHECKING:
    from openai import AsyncOpenAI

API_KEY_VARIABLE = "OPENAI_API_KEY"
MAX_FAILURES_IN_A_ROW = 8  # questions in a row without a server that say that it is not there


@dataclass(frozen=True)
class ChatRequest:
    """One question to a chat model."""

    id: str
    text: str
    image: Path | None = None
    seed: int | None = None  # of a sampled answer


@dataclass(frozen=True)
class ChatResponse:
    """What came back: text, or why there is none."""

    id: str
    text: str | None
    error: str | None = None
    finish_reason: str | None = None  # as the server names it: "stop", "length", ...
    tokens: tuple[int, int] | None = None  # read and written, where the server tells


OnChatResponse = Callable[[ChatResponse], None]


class ChatModel(Protocol):
    """Answers questions: greedily, so that an answer can be cached, unless it was made to sample."""

    def identity(self) -> Mapping[str, object]:
        """Everything that decides an answer, besides the question."""

    def run(self, asks: Iterable[ChatRequest], on_reply: OnChatResponse) -> None:
        """Calls `on_reply` once for each question, in any order."""


class ChatCache:
    """Replies by the digest of model, text and image, in one SQLite file: several processes may share it, a kill loses nothing."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._database = sqlite3.connect(file, timeout=60, isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, text TEXT NOT NULL)")
        except sqlite3.Error as error:
            raise RunError(
                f"{file}: the cache of replies can't be opened ({error}); delete it, or move it with VLM_UNLEARN_CACHE"
            ) from None

    def get(self, key: str) -> str | None:
        """The reply's text, or None."""
        found = self._database.execute("SELECT text FROM replies WHERE key = ?", (key,)).fetchone()
        return None if found is None else str(found[0])

    def put(self, key: str, text: str) -> None:
        """Keeps a reply."""
        kept = text.encode("utf-8", "replace").decode("utf-8")
        self._database.execute("INSERT OR REPLACE INTO replies (key, text) VALUES (?, ?)", (key, kept))


def complete_many(
    model: ChatModel, asks: Iterable[ChatRequest], cache: ChatCache | None, on_reply: OnChatResponse
) -> int:
    """Calls `on_reply` once for each question, in any order, and returns how many were asked for anew.

    What the cache holds is not asked again, nor is a question while the same one is under way. Only texts are cached: a question that
    failed is asked again the next time. No reply is kept, so that memory doesn't grow with the number of questions.
    """
    identity = model.identity()
    images: dict[Path, str] = {}
    under_way: dict[str, list[str]] = {}  # key -> further ids that wait for its reply
    keys: dict[str, str] = {}  # id that was asked -> key
    asked = 0

    def take(reply: ChatResponse) -> None:
        key = keys.pop(reply.id)
        if cache and reply.text is not None:
            cache.put(key, reply.text)
        on_reply(reply)
        for id in under_way.pop(key):
            on_reply(replace(reply, id=id, tokens=None))  # they were spent once

    def unknown() -> Iterator[ChatRequest]:
        nonlocal asked
        for ask in asks:
            try:
                if ask.image is not None and ask.image not in images:
                    images[ask.image] = digest_file(ask.image)
            except OSError as error:
                on_reply(ChatResponse(ask.id, None, f"{ask.image}: {error.strerror}"))
                continue
            seeded = {} if ask.seed is None else {"seed": ask.seed}
            key = digest_json(
                {"model": identity, "text": ask.text, "image": images[ask.image] if ask.image else None, **seeded}
            )
            known = cache.get(key) if cache else None
            if known is not None:
                on_reply(ChatResponse(ask.id, known))
            elif key in under_way:
                under_way[key].append(ask.id)
            else:
                under_way[key], keys[ask.id] = [], key
                asked += 1
                yield ask

    model.run(unknown(), take)
    return asked


def complete_all(
    model: ChatModel, asks: Iterable[ChatRequest], cache: ChatCache | None, on_done: Callable[[int], None] | None = None
) -> tuple[dict[str, ChatResponse], int]:
    """All replies by id, and how many were asked for anew; else as `complete_many`."""
    replies: dict[str, ChatResponse] = {}

    def take(reply: ChatResponse) -> None:
        replies[reply.id] = reply
        if on_done:
            on_done(len(replies))

    asked = complete_many(model, asks, cache, take)
    return replies, asked


class OpenAIChat:
    """A server that speaks OpenAI's chat completions: vLLM, `transformers serve`, OpenAI itself.

    The official client retries on 429, 5xx, timeouts and cut connections, with jittered backoff, honouring Retry-After; what it takes
    for an answer and is none (broken JSON, no choices) is retried here, in the same way. The key is read from the environment variable
    ``OPENAI_API_KEY`` and stands in no message.

    Args:
        concurrency: questions under way at once.
        timeout: seconds for one try.
        temperature: 0 is greedy; above, each question is sampled with its own `ChatRequest.seed`, as far as the server heeds it.
        verbatim: a cut or an empty text is a reply too, as it is of a model under test.
        request: keys of the request's body to add or put in another's place, or with None to leave out: servers differ in what they
            take (OpenAI's reasoning models want ``max_completion_tokens``, vLLM's ``chat_template_kwargs``).
        revision: a name for what the server runs now, which no client can find out; with another one the cache knows nothing.
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
        try:
            address = urlsplit(base_url)
            host = address.hostname or ""
            named = host != "" and host.isascii() and not address.query
            whole = named and address.scheme in ("http", "https") and (address.port or 1) > 0
        except ValueError:
            whole = False
        if not whole:
            raise UserError(
                f"{quoted(base_url)}: is not a server's address; it begins with http:// or https://, as http://localhost:8000/v1"
            )
        self._base_url = base_url.rstrip("/")
        self._model = model
        self._max_tokens = max_tokens
        self._concurrency = concurrency
        self._timeout = timeout
        self._retries = retries
        # Nothing but these where nothing is sampled: servers refuse or misread what they don't know.
        self._sampling: dict[str, Any] = (
            {"temperature": temperature, "top_p": top_p} if temperature else {"temperature": 0}
        )
        self._verbatim = verbatim
        self._request = dict(request or {})
        self._revision = revision
        self._unreached = 0  # questions in a row for which no server was there
        self._refused = 0  # questions in a row that the server called wrong
        self._key = os.environ.get(API_KEY_VARIABLE, "").strip()
        if not self._key.isascii() or not self._key.isprintable():
            raise UserError(
                f"{API_KEY_VARIABLE}: holds a character that no key has; look for a stray blank or line break"
            )

    def identity(self) -> Mapping[str, object]:
        told = {"server": self._base_url, "model": self._model, "max_tokens": self._max_tokens, **self._sampling}
        told |= {"request": self._request} if self._request else {}
        return told | ({"revision": self._revision} if self._revision else {})

    def check_available(self) -> None:
        """Looks whether a server is there that takes the key, before there is anything to ask.

        Raises:
            RunError: nobody answers at the address.
            UserError: the server refuses the key.
        """
        import openai

        try:
            with openai.OpenAI(
                base_url=self._base_url, api_key=self._key or "none", max_retries=1, timeout=min(self._timeout, 10)
            ) as client:
                client.models.list()
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise UserError(
                f"{self._base_url}: the server answered {error.status_code}; check {API_KEY_VARIABLE}"
            ) from None
        except openai.APIConnectionError:
            raise RunError(f"{self._base_url}: nobody answers there; is the server up?") from None
        except Exception:  # a server that lists no models may answer questions all the same
            return

    def run(self, asks: Iterable[ChatRequest], on_reply: OnChatResponse) -> None:
        """Asks, at most `concurrency` at once; memory doesn't grow with the number of questions.

        Raises:
            UserError: the server refuses the key, doesn't know the model, or calls one question after the other wrong; no later
                one could fare better.
            RunError: no server is there.
        """
        asyncio.run(self._run(iter(asks), on_reply))

    async def _run(self, asks: Iterator[ChatRequest], on_reply: OnChatResponse) -> None:
        from openai import AsyncOpenAI

        async with AsyncOpenAI(
            base_url=self._base_url, api_key=self._key or "none", max_retries=self._retries, timeout=self._timeout
        ) as client:

            async def work() -> None:
                for ask in asks:  # shared: each worker takes the next
                    reply = await self._reply(client, ask)
                    self._give_up(reply)
                    on_reply(reply)

            workers = [asyncio.create_task(work()) for _ in range(self._concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()

    def _give_up(self, reply: ChatResponse) -> None:
        """Ends it all where no later question could fare better."""
        enough = max(self._concurrency, MAX_FAILURES_IN_A_ROW)
        if self._unreached >= enough:
            raise RunError(
                f"{self._base_url}: {self._unreached} questions in a row were not answered ({reply.error}); is the server up?"
            )
        if self._refused >= enough:
            raise UserError(
                f"{self._base_url}: refused {self._refused} questions in a row ({reply.error}); `request` adds keys to what is sent, "
                "or leaves them out, as request={max_tokens: null, max_completion_tokens: 512}"
            )

    async def _reply(self, client: AsyncOpenAI, ask: ChatRequest) -> ChatResponse:
        content: list[Any] = [{"type": "text", "text": ask.text}]
        if ask.image is not None:
            try:
                content.insert(0, {"type": "image_url", "image_url": {"url": png_url(open_image(ask.image))}})
            except UserError as error:
                return ChatResponse(ask.id, None, str(error))
        for tries in range(self._retries + 1):
            if tries:
                await asyncio.sleep(min(0.5 * 2 ** (tries - 1), 8.0) * random.uniform(0.75, 1.0))
            try:
                return await self._try(client, ask, content)
            except _NoAnswerError as error:
                problem = str(error)
        return ChatResponse(ask.id, None, problem)

    async def _try(self, client: AsyncOpenAI, ask: ChatRequest, content: list[Any]) -> ChatResponse:
        """One question, with the client's own retries.

        Raises:
            _NoAnswerError: the server sent what is no answer; asked again it may.
        """
        import openai

        body: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self._max_tokens,
        }
        body |= self._sampling
        if ask.seed is not None and self._sampling["temperature"]:
            body["seed"] = ask.seed
        body = {key: value for key, value in {**body, **self._request}.items() if value is not None}
        try:
            # Not `chat.completions.create`, whose checks of the body take longer than the call does on a server nearby.
            # The client's timeout is of each piece that comes; a server that drips would never meet it.
            patience = (self._timeout + 10) * (self._retries + 1)
            answer = await asyncio.wait_for(client.post("/chat/completions", cast_to=object, body=body), patience)
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise UserError(
                f"{self._base_url}: the server answered {error.status_code} for model {quoted(self._model)}; check the server's "
                f"address, the model's name and {API_KEY_VARIABLE}"
            ) from None
        except openai.APIStatusError as error:
            self._unreached = 0
            self._refused += error.status_code in (400, 422)
            return ChatResponse(ask.id, None, f"HTTP {error.status_code}{self._told(error.body)}")
        except (openai.APIConnectionError, TimeoutError) as error:  # cut, refused or timed out, after all retries
            self._unreached += 1
            return ChatResponse(ask.id, None, type(error).__name__)
        except Exception as error:  # an answer that is no JSON, or JSON of another shape
            self._unreached = self._refused = 0
            raise _NoAnswerError(type(error).__name__) from None
        self._unreached = self._refused = 0
        choice = _first_choice(answer)
        message = choice.get("message")
        text = message.get("content") if isinstance(message, dict) else None
        reason = choice.get("finish_reason")  # some servers leave it out
        return self._judged(ask, text, reason if isinstance(reason, str) else None, _tokens(answer))

    def _told(self, body: object) -> str:
        """What the server says is wrong, without the key, which some servers say back."""
        found = body.get("message") if isinstance(body, dict) else None
        if not isinstance(found, str) or not found.strip():
            return ""
        return f": {quoted(found.replace(self._key, '***') if self._key else found, 200)}"

    def _judged(
        self, ask: ChatRequest, text: object, finish_reason: str | None, tokens: tuple[int, int] | None
    ) -> ChatResponse:
        """A text that came, as the reply that it is."""
        if text is not None and not isinstance(text, str):
            raise _NoAnswerError("an answer that is no text")
        if self._verbatim and text is not None:
            return ChatResponse(ask.id, text, finish_reason=finish_reason, tokens=tokens)
        return replace(chat_response(ask, text, finish_reason, self._max_tokens), tokens=tokens)


def chat_response(ask: ChatRequest, text: str | None, finish_reason: str | None, max_tokens: int) -> ChatResponse:
    """A model's text as a reply; a cut or an empty one is none."""
    error = None
    if not text:
        error = "empty answer"
    elif finish_reason == "length":
        error = f"the reply was cut at {max_tokens} tokens, raise max_tokens: {quoted(text)}"
    return ChatResponse(ask.id, None if error else text, error, finish_reason=finish_reason)


class _NoAnswerError(Exception):
    """What the server sent is no answer."""


def _first_choice(answer: object) -> dict[str, Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise _NoAnswerError("empty answer")
    return choices[0]


def _tokens(answer: object) -> tuple[int, int] | None:
    """What a server says it read and wrote; servers differ in what they leave out."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    if not isinstance(usage, dict):
        return None
    read, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
    return (
        (read, written)
        if type(read) is type(written) is int and min(read, written) >= 0 and max(read, written) < 2**40
        else None
    )
