"""How requests reach a server of a foundation model: nothing but the question leaves, and no more
than an answer comes back.

The `openai` client adds headers about this machine (system, architecture, version of Python) and
about organisations that the environment names; they are left out, and OPENAI_CUSTOM_HEADERS neither
replaces the key nor the host. No proxy of the environment is used, and the length of an answer is
bounded while it is read.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx2

SENT_HEADERS = frozenset({"accept", "connection", "content-length", "content-type"})
MAX_ANSWER_BYTES = 1 << 18
"""Most bytes of an answer with all that belongs to it, of which the text is a small part."""
MAX_LIST_BYTES = 1 << 24
"""Most bytes of a list of models, which hosts of many describe at length."""


class UnreadableAnswer(httpx2.TransportError):
    """An answer that is too long, or compressed though that was not asked for."""


class BoundedTransport(httpx2.AsyncBaseTransport):
    """A transport that sends `SENT_HEADERS` and the key alone, and reads at most
    `MAX_ANSWER_BYTES`, or `MAX_LIST_BYTES` of what is got without a question."""

    def __init__(self, max_connections: int, key: str) -> None:
        self._key = key
        limits = httpx2.Limits(
            max_connections=max_connections, max_keepalive_connections=max_connections
        )
        # Of the environment a transport reads SSL_CERT_FILE and SSL_CERT_DIR, no proxies.
        self._inner = httpx2.AsyncHTTPTransport(limits=limits)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        headers = [
            (name, request.headers[name]) for name in request.headers if name in SENT_HEADERS
        ]
        sent = httpx2.Request(
            request.method,
            request.url,
            headers=[
                ("host", request.url.netloc.decode()),
                ("authorization", f"Bearer {self._key}"),
                ("accept-encoding", "identity"),
                *headers,
            ],
            stream=request.stream,
            extensions=request.extensions,
        )
        response = await self._inner.handle_async_request(sent)
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        limit = MAX_LIST_BYTES if request.method == "GET" else MAX_ANSWER_BYTES
        response.stream = _BoundedStream(response.stream, limit)
        # An answer is JSON, thus UTF-8, whatever codec of Python the server names.
        response.headers.pop("content-type", None)
        if response.headers.get("content-encoding", "identity") != "identity":
            await response.aclose()
            raise UnreadableAnswer("it is compressed, though that was not asked for")
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()


class _BoundedStream(httpx2.AsyncByteStream):
    def __init__(self, inner: httpx2.AsyncByteStream, limit: int) -> None:
        self._inner = inner
        self._limit = limit

    async def __aiter__(self) -> AsyncIterator[bytes]:
        num_bytes = 0
        async for piece in self._inner:
            num_bytes += len(piece)
            if num_bytes > self._limit:
                raise UnreadableAnswer(f"it is longer than {self._limit:,} bytes")
            yield piece

    async def aclose(self) -> None:
        await self._inner.aclose()
