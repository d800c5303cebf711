"""The server of page and API: which address it listens on, and under which names it answers."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import gradio as gr
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.routing import Route

from cirloop.tools.demo.api import PATHS
from cirloop.tools.demo.limits import Limits
from cirloop.tools.demo.page import CONTRAST, CSS
from cirloop.types import UserError

HOST = "127.0.0.1"
ALL_ADDRESSES = "0.0.0.0"
MAX_QUEUED = 32
"""Events of the page that wait."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where the server listens, and what it takes."""

    host: str = HOST
    port: int | None = None
    max_upload_mb: int = 64
    max_requests: int = 8


@contextmanager
def served(page: gr.Blocks, api: FastAPI, address: Address) -> Iterator[str]:
    """Serve the page, and the API's paths before the page's own: the address, until the end of the
    `with`. Raises UserError where the address cannot be had."""
    _check(address)
    theme = gr.themes.Default(  # by default the fonts are fetched
        font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")
    ).set(**CONTRAST)
    page.queue(max_size=MAX_QUEUED)
    # Not gr.mount_gradio_app: a page that is mounted does not check that files are uploads.
    try:
        url: str = page.launch(
            server_name=address.host,
            server_port=address.port,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            max_file_size=address.max_upload_mb << 20,
            app_kwargs={
                "middleware": _middleware(address),
                "routes": [Route(path, api) for path in PATHS],
            },
            theme=theme,
            css=CSS,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
        )[1]
    except OSError as error:
        raise UserError(f"--port {address.port}: {error}") from None
    try:
        yield url.rstrip("/")
    finally:
        page.close(verbose=False)


def _check(address: Address) -> None:
    """Raise UserError for an address that cannot be had. Gradio would wait for its server for
    ever."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port or 0))
        except OSError as error:
            port = "" if address.port is None else f" --port {address.port}"
            raise UserError(
                f"--host {address.host}{port} cannot be listened on ({error.strerror}). Give an"
                " IPv4 address or a name of this machine, and a port that is free."
            ) from None


def is_loopback(host: str) -> bool:
    """Return whether an address or name is of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _middleware(address: Address) -> list[Middleware]:
    """Return what each request passes first. The server answers to its own names only, so that a
    page of another site cannot ask through a name that it points here; on all addresses it cannot
    know them."""
    names = ["*"] if address.host == ALL_ADDRESSES else [address.host, HOST, "localhost"]
    return [
        Middleware(TrustedHostMiddleware, allowed_hosts=names),
        Middleware(Limits, max_upload_mb=address.max_upload_mb, max_requests=address.max_requests),
    ]
