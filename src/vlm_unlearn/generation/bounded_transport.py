"""HTTP transports with a limit on the size of a response, which a server can exceed by compression alone."""

from __future__ import annotations

import zlib
from typing import Any

import httpx2 as httpx

from vlm_unlearn.generation.openai_chat import TOO_LARGE

MAX_RESPONSE_BYTES = 8 * 2**20  # far above the longest text of a chat model
_CHUNK = 2**20


class ResponseTooLargeError(Exception):
    """The decompressed response exceeds the limit, or its compression is unknown."""


class _Body:
    """Collects the decompressed chunks of one response up to a limit."""

    def __init__(self, encoding: str, limit: int) -> None:
        self._limit = limit
        self._content = bytearray()
        names = [name.strip() for name in encoding.lower().split(",") if name.strip() not in ("", "identity")]
        if names not in ([], ["gzip"], ["x-gzip"], ["deflate"]):
            raise ResponseTooLargeError(f"the response has the compression {encoding[:40]!r}, which was not requested")
        # 32 + 15 bits detect both a gzip and a zlib header.
        self._decompressor = zlib.decompressobj(47) if names else None

    def add(self, chunk: bytes) -> None:
        """Adds a chunk as it was received.

        Raises:
            ResponseTooLargeError: The limit is exceeded.
        """
        if self._decompressor is None:
            self._append(chunk)
            return
        while chunk:
            self._append(self._decompressor.decompress(chunk, _CHUNK))
            chunk = self._decompressor.unconsumed_tail

    def _append(self, data: bytes) -> None:
        self._content += data
        if len(self._content) > self._limit:
            raise ResponseTooLargeError(f"the response has more than {self._limit / 2**20:.0f} MB")

    def response(self, original: httpx.Response) -> httpx.Response:
        """Returns the response with its decompressed content."""
        dropped = ("content-encoding", "content-length", "transfer-encoding")
        headers = [(name, value) for name, value in original.headers.multi_items() if name.lower() not in dropped]
        return httpx.Response(original.status_code, headers=headers, content=bytes(self._content))


def _too_large(error: Exception) -> httpx.Response:
    """Returns a response in place of one that is too large. Its status is one that clients do not retry."""
    reason = str(error) if isinstance(error, ResponseTooLargeError) else "the compressed response is damaged"
    return httpx.Response(413, json={"error": {"code": TOO_LARGE, "message": reason}})


class BoundedTransport(httpx.BaseTransport):
    """Sends requests without asking for compression, and reads at most `limit` bytes of a response.

    Args:
        limit: The maximum size of a decompressed response in bytes.
    """

    def __init__(self, limit: int = MAX_RESPONSE_BYTES) -> None:
        self._limit = limit
        self._inner = httpx.HTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Sends a request. A response that is too large becomes one with status 413."""
        request.headers["Accept-Encoding"] = "identity"
        original = self._inner.handle_request(request)
        stream: Any = original.stream
        try:
            body = _Body(original.headers.get("content-encoding", ""), self._limit)
            for chunk in stream:
                body.add(chunk)
            return body.response(original)
        except (ResponseTooLargeError, zlib.error) as error:
            return _too_large(error)
        finally:
            original.close()

    def close(self) -> None:
        """Closes all connections."""
        self._inner.close()


class AsyncBoundedTransport(httpx.AsyncBaseTransport):
    """`BoundedTransport` for asynchronous clients.

    Args:
        limits: The limits on the number of connections.
        limit: The maximum size of a decompressed response in bytes.
    """

    def __init__(self, limits: httpx.Limits, limit: int = MAX_RESPONSE_BYTES) -> None:
        self._limit = limit
        self._inner = httpx.AsyncHTTPTransport(limits=limits)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Sends a request. A response that is too large becomes one with status 413."""
        request.headers["Accept-Encoding"] = "identity"
        original = await self._inner.handle_async_request(request)
        stream: Any = original.stream
        try:
            body = _Body(original.headers.get("content-encoding", ""), self._limit)
            async for chunk in stream:
                body.add(chunk)
            return body.response(original)
        except (ResponseTooLargeError, zlib.error) as error:
            return _too_large(error)
        finally:
            await original.aclose()

    async def aclose(self) -> None:
        """Closes all connections."""
        await self._inner.aclose()
