"""The server of the page: this machine only, and no way in it to name a file.

Gradio's own ways to send, fetch and pass on files are shut. Pictures go by digest through
`/picture`, to the desk and from it.
"""

from __future__ import annotations

import re
import socket
from importlib import resources
from pathlib import Path
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.middleware.trustedhost import TrustedHostMiddleware

from cirloop.io.redact import sanitize
from cirloop.tools.demo.image_registry import Desk
from cirloop.tools.search.engine import MAX_FILE
from cirloop.types import UserError

HOST = "127.0.0.1"
SHUT = re.compile(
    r"/(file|proxy)[=/]|/(upload|upload_progress|stream|monitoring|deep_link|vibe-[a-z-]+)(/|$)"
)
"""Of Gradio: files by path, requests to other servers, uploads to the disk, and what watches or
edits the page."""
BINARY = "application/octet-stream"
"""Of an upload. Other sites' pages may not send this without asking, which nothing here answers."""
FONTS = ("system-ui", "sans-serif")


class Shut:
    """Answers 404 to what is SHUT."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and SHUT.search(scope["path"]):
            await Response(status_code=404)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def application(blocks: gr.Blocks, desk: Desk) -> FastAPI:
    """Return the page with its pictures."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Shut)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])

    @app.get("/picture/{key}")
    def picture(key: str) -> Response:
        try:
            made = desk.small(key)
        except UserError:
            return Response(status_code=404)
        head = {
            "Cache-Control": "private, max-age=86400, immutable",
            "X-Content-Type-Options": "nosniff",
        }
        return Response(made, media_type="image/webp", headers=head)

    @app.post("/picture")
    async def upload(request: Request) -> dict[str, str]:
        """Return the key of a picture, or what is wrong with it; that is an answer too, and no
        failed request."""
        if request.headers.get("content-type") != BINARY:
            return {"problem": f"an upload is sent as {BINARY}"}
        content = bytearray()
        async for chunk in request.stream():
            content += chunk
            if len(content) > MAX_FILE:
                return {
                    "problem": (
                        f"the uploaded file has more than {MAX_FILE:,} bytes. Give a smaller"
                        " picture."
                    )
                }
        try:
            return {"key": await run_in_threadpool(desk.take, bytes(content))}
        except UserError as error:
            return {"problem": sanitize(str(error))}

    theme = gr.themes.Default(
        font=FONTS, font_mono=("ui-monospace", "monospace"), primary_hue="blue"
    )
    theme.set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
    )
    with resources.as_file(resources.files("cirloop.tools.demo") / "page.css") as css:
        made: FastAPI = gr.mount_gradio_app(
            app,
            blocks,
            "/",
            server_name=HOST,
            footer_links=[],
            run_history=False,
            allowed_paths=[],
            show_error=False,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            theme=theme,
            css=Path(css).read_text("utf-8"),
        )
    return made


def listening(port: int) -> socket.socket:
    """Return a socket on loopback. Raises UserError where the port is taken or may not be used."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((HOST, port))
        made.listen()
    except OSError as error:
        made.close()
        raise UserError(
            f"--port {port}: {error.strerror}. Give another, or 0 for any that is free."
        ) from None
    return made


class Server(uvicorn.Server):
    """Hangs up on open pages when it ends: they listen without end."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        connections: Any = self.server_state.connections
        for connection in list(connections):
            connection.transport.close()
        await super().shutdown(sockets)


def serve(app: FastAPI, on: socket.socket) -> None:
    """Until the process is asked to end."""
    settings = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=1, access_log=False
    )
    Server(settings).run(sockets=[on])
