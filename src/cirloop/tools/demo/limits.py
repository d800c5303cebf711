"""Limits of the server: bytes of a request, requests at once, and none from other sites' pages."""

from __future__ import annotations

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

FORBIDDEN = 403
TOO_LARGE = 413
TOO_MANY = 429
FORM = 1 << 20
"""Bytes of a request besides the image in it."""


class Limits:
    """Middleware that refuses requests with a body (POST) before any of it is kept."""

    def __init__(self, app: ASGIApp, max_upload_mb: int, max_requests: int) -> None:
        self._app = app
        self._max_upload_mb = max_upload_mb
        self._max_requests = max_requests
        self._num = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        refused = self._refusal(Headers(scope=scope))
        if refused is not None:
            await self._discard(receive)
            await refused(scope, receive, send)
            return
        self._num += 1
        try:
            await self._app(scope, self._counted(receive), send)
        finally:
            self._num -= 1

    def _refusal(self, headers: Headers) -> JSONResponse | None:
        origin = headers.get("origin")
        length = headers.get("content-length", "0")
        if origin is not None and origin.partition("://")[2] != headers.get("host"):
            return _answer(FORBIDDEN, "a page of another site may not ask here.")
        if self._num >= self._max_requests:
            return _answer(
                TOO_MANY,
                f"{self._max_requests} requests are being answered, as many as --max_requests"
                " allows. Ask again in a second.",
            )
        if length.isdecimal() and int(length) > self._max_bytes:
            return _answer(TOO_LARGE, self._too_large)
        return None

    def _counted(self, receive: Receive) -> Receive:
        """Return `receive` that ends with 413 where a body of no stated length is too large."""
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                if message.get("more_body"):
                    await self._discard(receive)
                raise HTTPException(TOO_LARGE, self._too_large)
            return message

        return counted

    async def _discard(self, receive: Receive) -> None:
        """Read the rest of a body that is not too long, so that its sender gets to the answer."""
        num_bytes = 0
        while num_bytes <= self._max_bytes:
            message = await receive()
            if not message.get("more_body"):
                return
            num_bytes += len(message.get("body", b""))

    @property
    def _max_bytes(self) -> int:
        return (self._max_upload_mb << 20) + FORM

    @property
    def _too_large(self) -> str:
        return f"the request is larger than --max_upload_mb {self._max_upload_mb} allows."


def _answer(status: int, detail: str) -> JSONResponse:
    headers = {"Retry-After": "1"} if status == TOO_MANY else {}
    return JSONResponse({"detail": detail}, status, headers)
