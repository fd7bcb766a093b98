"""A chat completions server for tests. A function answers its requests, and faults can be injected."""

from __future__ import annotations

import functools
import json
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest.mock import patch

RawReply = tuple[int, bytes, dict[str, str]]  # status, body and headers


class Stub:
    """The state of a stub server: its answers, injected faults, and the requests it has received.

    Attributes:
        answer: Returns the answer to a question.
        faults: Returns the fault of a call by its number, counted from 1: a status such as "429", "cut" (closes the
            connection), "garbage" (truncated JSON), "empty" (no choices), or "" for none.
        calls: The number of calls.
        bodies: The request bodies.
        keys: Authorization headers and their counts.
        at_once: The number of pending calls.
        most_at_once: The maximum of `at_once`.
        finish_reason, usage: Part of each response.
        usage_of: Returns the usage for a request body.
        raw: Returns the status, the body and further headers of a response to a question, or None for an answer.
    """

    def __init__(self, answer: Callable[[str], str]) -> None:
        self.answer = answer
        self.faults: Callable[[int], str] = lambda call: ""
        self.calls = 0
        self.bodies: list[dict[str, Any]] = []
        self.keys: Counter[str] = Counter()
        self.at_once = 0
        self.most_at_once = 0
        self.url = ""
        self.finish_reason = "stop"
        self.usage: dict[str, int] | None = None
        self.usage_of: Callable[[dict[str, Any]], dict[str, int] | None] = lambda body: self.usage
        self.raw: Callable[[str], RawReply | None] = lambda text: None
        self._lock = threading.Lock()

    def enter(self) -> int:
        with self._lock:
            self.calls += 1
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            return self.calls

    def leave(self) -> None:
        with self._lock:
            self.at_once -= 1


# Clients read the root certificates in 40 ms, although the stub server does not encrypt.
_ssl_context = functools.cache(ssl.create_default_context)


def send_json(handler: BaseHTTPRequestHandler, status: int, raw: bytes, retry_after: str) -> None:
    """Sends a JSON response. Status 429 gets a Retry-After header."""
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(raw)))
    if status == 429:
        handler.send_header("Retry-After", retry_after)
    handler.end_headers()
    handler.wfile.write(raw)


@contextmanager
def stub_server(answer: Callable[[str], str]) -> Iterator[Stub]:
    """Runs the server until the block ends. Clients in this process retry after milliseconds, not half a second."""
    stub = Stub(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self._send(200, '{"object": "list", "data": []}')

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            call = stub.enter()
            try:
                stub.bodies.append(body)
                stub.keys[self.headers.get("Authorization", "")] += 1
                self._reply(body, stub.faults(call))
            finally:
                stub.leave()

        def _reply(self, body: dict[str, Any], fault: str) -> None:
            if fault == "cut":
                self.close_connection = True
                self.connection.close()
                return
            if fault.isdigit():
                self._send(
                    int(fault),
                    json.dumps({"error": {"message": f"fault, your key is {self.headers.get('Authorization')}"}}),
                )
                return
            if fault == "garbage":
                self._send(200, '{"choices": [{"mess')
                return
            text = next(part["text"] for part in body["messages"][-1]["content"] if part["type"] == "text")
            raw = stub.raw(text)
            if raw is not None:
                status, content, headers = raw
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
                return
            message = {"role": "assistant", "content": stub.answer(text)}
            choices = (
                [] if fault == "empty" else [{"index": 0, "message": message, "finish_reason": stub.finish_reason}]
            )
            completion = {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": choices,
                "usage": stub.usage_of(body),
            }
            self._send(200, json.dumps(completion))

        def _send(self, status: int, text: str) -> None:
            send_json(self, status, text.encode(), retry_after="0")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # tests kill clients
    # With the default interval, each shutdown would wait for half a second.
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        with (
            patch("ssl.create_default_context", _ssl_context),
            patch("openai._base_client.INITIAL_RETRY_DELAY", 0.005),
            patch("vlm_unlearn.generation.openai_chat.FIRST_RETRY_SECONDS", 0.005),
        ):
            yield stub
    finally:
        server.shutdown()
        server.server_close()
