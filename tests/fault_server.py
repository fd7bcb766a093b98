"""A chat completions server of which 30 % of the requests meet a fault: of the connection, the server or the answer.

Faults are a pure function of the seed, the phase, the text of the request and the number of the attempt, so that they
don't depend on the order in which requests arrive.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LARGE = 50_000_000  # characters of a large answer
BOMB = 200_000_000  # characters of a compressed answer
SLOW_SECONDS = 0.3

# Faults of one attempt. The client sends the request again.
TRANSIENT = (
    *("reset", "reset_in_body", "short_body", "429", "429_bare", "500", "502_html", "503", "529"),
    *("broken_json", "no_choices", "empty_body", "html", "content_of_numbers", "error_200", "slow"),
    *("invalid_utf8", "deep_json"),
)
# Faults of a question for as long as a phase lasts: no retry helps.
LASTING = (
    *("all_reset", "all_503", "bad_request", "too_long_400", "large", "large_error", "endless", "bomb", "brotli"),
    *("reasoning_only", "reasoning_cut", "null_length", "null_stop", "all_broken_json", "error_200_lasting"),
    "redirect",
)
# Faults of a question in every phase.
FILTERS = (
    *("filter_400", "filter_azure", "filter_403", "filter_200", "filter_finish", "filter_half", "filter_null"),
    *("policy_400", "policy_451"),
)
UNUSUAL = (
    "parts",
    "thinking_parts",
    "with_reasoning",
    "gzip",
    "no_usage",
    "structured_refusal",
    "surrogate",
)  # no faults


def completion(content: object, finish_reason: str | None = "stop", **message: object) -> dict[str, Any]:
    """The body of a chat completion."""
    choice = {
        "index": 0,
        "finish_reason": finish_reason,
        "message": {"role": "assistant", "content": content, **message},
    }
    usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


def error(message: str, code: object = None, **fields: object) -> dict[str, Any]:
    """The body of an error."""
    return {"error": {"message": message, "code": code, **fields}}


class FaultServer:
    """The state of a server with faults.

    Attributes:
        answer: Returns the answer to a request's text.
        rate: The share of the requests of which the first attempt meets a fault.
        phase: The number of the phase. A new phase has other faults, except for the content filters.
        fixed: The fault of each request whose text contains a key, in every phase.
        faults: The number of attempts by kind of fault, since the server started.
        calls: The number of attempts.
        questions, first_faults: By phase, the number of requests, and of those whose first attempt met a fault.
        url: The address for clients.
    """

    def __init__(self, answer: Callable[[str], str], rate: float = 0.3, seed: int = 0) -> None:
        self.answer = answer
        self.rate = rate
        self.seed = seed
        self.phase = 0
        self.fixed: dict[str, str] = {}
        self.faults: Counter[str] = Counter()
        self.calls = 0
        self.questions: Counter[int] = Counter()
        self.first_faults: Counter[int] = Counter()
        self.url = ""
        self._attempts: Counter[tuple[int, str]] = Counter()
        self._lock = threading.Lock()

    def draw(self, *key: object) -> float:
        """A number between 0 and 1 that depends on the seed and the key only."""
        digest = hashlib.sha256(repr((self.seed, *key)).encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    def choose(self, kinds: Sequence[str], *key: object) -> str:
        return kinds[int(self.draw("kind", *key) * len(kinds))]

    def fault(self, text: str, phase: int, attempt: int) -> str:
        """The fault of an attempt, or an empty string. Each of the three groups has the same share."""
        fixed = next((fault for key, fault in self.fixed.items() if key in text), None)
        if fixed is not None:
            return fixed
        share = 1 - (1 - self.rate) ** (1 / 3)
        if self.draw("filter", text) < share:
            return self.choose(FILTERS, "filter", text)
        if self.draw("lasting", text, phase) < share:
            return self.choose(LASTING, "lasting", text, phase)
        if self.draw("transient", text, phase, attempt) < share:
            return self.choose(TRANSIENT, "transient", text, phase, attempt)
        return ""

    def next_fault(self, text: str) -> str:
        """Counts a call and returns its fault."""
        with self._lock:
            self.calls += 1
            self._attempts[self.phase, text] += 1
            attempt = self._attempts[self.phase, text]
            fault = self.fault(text, self.phase, attempt)
            self.questions[self.phase] += attempt == 1
            self.first_faults[self.phase] += attempt == 1 and fault != ""
            if fault:
                self.faults[fault] += 1
            return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: FaultServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._send(200, {"object": "list", "data": []})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][-1]["content"]
        text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        fault = self.state.next_fault(text)
        if not fault:
            kind = self.state.choose(("plain", *UNUSUAL), "form", text)
            self._send_answer(kind, self.state.answer(text))
        elif fault in FILTERS:
            self._send_filtered(fault)
        else:
            self._send_fault(fault, self.state.answer(text))

    def _send_answer(self, kind: str, answer: str) -> None:
        """Sends an answer, of the usual form or of another that clients have to read."""
        text = {"type": "text", "text": answer}
        half = len(answer) // 2
        parts = [{"type": "text", "text": answer[:half]}, {"type": "text", "text": answer[half:]}]
        bodies = {
            "parts": completion(parts),
            "thinking_parts": completion([{"type": "thinking", "thinking": "hm"}, text]),
            "with_reasoning": completion(answer, reasoning_content="Let me think."),
            "surrogate": completion(f"{answer} \ud800\x00"),
            "structured_refusal": completion(None, refusal=answer),
            "no_usage": {**completion(answer, None), "usage": None},
        }
        if kind == "gzip":
            content = gzip.compress(json.dumps(completion(answer)).encode())
            self._send_bytes(200, content, {"Content-Encoding": "gzip"})
        else:
            self._send(200, bodies.get(kind, completion(answer)))

    def _send_filtered(self, kind: str) -> None:
        azure = {"code": "ResponsibleAIPolicyViolation", "content_filter_result": {"violence": {"filtered": True}}}
        replies: dict[str, tuple[int, object]] = {
            "filter_400": (400, error("The response was filtered.", "content_filter")),
            "filter_azure": (400, error("Try another prompt.", "BadRequest", innererror=azure)),
            "filter_403": (403, error("Your input was flagged by our safety system.")),
            "filter_200": (200, error("filtered", "content_filter")),
            "filter_finish": (200, completion("", "content_filter")),
            "filter_half": (200, completion("First, take the", "content_filter")),
            "filter_null": (200, completion(None, "content_filter")),
            "policy_400": (400, error("rejected", "content_policy_violation", type="invalid_request_error")),
            "policy_451": (451, error("This request violates our usage policies.")),
        }
        self._send(*replies[kind])

    def _send_fault(self, kind: str, answer: str) -> None:
        replies: dict[str, tuple[int, object]] = {
            "500": (500, error("internal error")),
            "529": (529, error("Overloaded", type="overloaded_error")),
            "no_choices": (200, {**completion(""), "choices": []}),
            "content_of_numbers": (200, completion([{"type": "text", "text": 3}])),
            "error_200": (200, error("CUDA out of memory", 503)),
            "error_200_lasting": (200, error("CUDA out of memory", 500)),
            "bad_request": (400, error("the image could not be decoded")),
            "too_long_400": (400, error("maximum context length is 4096 tokens", "context_length_exceeded")),
            "reasoning_only": (200, completion(None, reasoning_content="Let me think.")),
            "reasoning_cut": (200, completion("", "length", reasoning="Let me think. ")),
            "null_length": (200, completion(None, "length")),
            "null_stop": (200, completion(None)),
        }
        raw: dict[str, tuple[int, bytes, dict[str, str]]] = {
            "429": (429, b'{"error": {"message": "rate limit"}}', {"Retry-After": "1"}),
            "429_bare": (429, b"slow down", {"Retry-After": "Thu, 01 Jan 2026 00:00:00 GMT"}),
            "503": (503, b'{"error": {"message": "loading"}}', {"Retry-After": "0"}),
            "all_503": (503, b'{"error": {"message": "no capacity"}}', {"Retry-After": "0"}),
            "502_html": (502, b"<html>Bad Gateway</html>", {"Content-Type": "text/html"}),
            "html": (200, b"<html>Please log in</html>", {"Content-Type": "text/html"}),
            "empty_body": (200, b"", {}),
            "broken_json": (200, b'{"choices": [{"mess', {}),
            "all_broken_json": (200, b'{"choices": [{"mess', {}),
            "invalid_utf8": (200, json.dumps(completion("caf")).encode().replace(b"caf", b"caf\xe9"), {}),
            "deep_json": (200, b"[" * 100_000, {}),
            "redirect": (307, b"", {"Location": self.path}),
            "brotli": (200, b"\x1b\x03\x00", {"Content-Encoding": "br"}),
            "bomb": (200, bomb(), {"Content-Encoding": "gzip"}) if kind == "bomb" else (200, b"", {}),
        }
        if kind in replies:
            self._send(*replies[kind])
        elif kind in raw:
            self._send_bytes(*raw[kind])
        elif kind in ("large", "large_error"):
            self._send_large(200 if kind == "large" else 500)
        elif kind == "endless":
            self._send_endless()
        elif kind == "slow":
            self._send_slowly(json.dumps(completion(answer)).encode())
        else:  # reset, all_reset, reset_in_body, short_body
            if kind in ("reset_in_body", "short_body"):
                self._head(200, {"Content-Length": "5000"})
                self.wfile.write(b'{"choices": [')
            self.close_connection = True
            if kind != "short_body":  # closing without lingering sends a reset instead of an orderly end
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _send_large(self, status: int) -> None:
        """Sends a valid completion of `LARGE` characters, one block at a time."""
        beginning, end = json.dumps(completion("CONTENT")).encode().split(b"CONTENT")
        self._head(status, {"Content-Length": str(len(beginning) + LARGE + len(end))})
        self.wfile.write(beginning)
        for _ in range(LARGE // 1_000_000):
            self.wfile.write(b"a" * 1_000_000)
        self.wfile.write(end)

    def _send_endless(self) -> None:
        """Sends blocks until the client closes the connection, or 1 GB."""
        self._head(200, {"Transfer-Encoding": "chunked"})
        for _ in range(1000):
            self.wfile.write(b"F4240\r\n" + b" " * 1_000_000 + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    def _send_slowly(self, content: bytes) -> None:
        self._head(200, {"Content-Length": str(len(content))})
        for start in range(0, len(content), len(content) // 10 + 1):
            self.wfile.write(content[start : start + len(content) // 10 + 1])
            self.wfile.flush()
            time.sleep(SLOW_SECONDS / 10)

    def _send(self, status: int, body: object) -> None:
        self._send_bytes(status, json.dumps(body).encode(), {})

    def _send_bytes(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self._head(status, {**headers, "Content-Length": str(len(content))})
        self.wfile.write(content)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()


_bombs: list[bytes] = []
_bomb_lock = threading.Lock()


def bomb() -> bytes:
    """A compressed valid completion of `BOMB` characters. It is made once, a block at a time."""
    with _bomb_lock:
        if not _bombs:
            beginning, end = json.dumps(completion("CONTENT")).encode().split(b"CONTENT")
            compressor = zlib.compressobj(1, wbits=31)
            blocks = [compressor.compress(beginning)]
            blocks += [compressor.compress(b"a" * 1_000_000) for _ in range(BOMB // 1_000_000)]
            _bombs.append(b"".join([*blocks, compressor.compress(end), compressor.flush()]))
        return _bombs[0]


@contextmanager
def fault_server(answer: Callable[[str], str], rate: float = 0.3, seed: int = 0) -> Iterator[FaultServer]:
    """Runs a server with faults on 127.0.0.1 until the block ends."""
    state = FaultServer(answer, rate, seed)
    handler = type("Handler", (_Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients close connections
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
