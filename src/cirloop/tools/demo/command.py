"""A page to try a run's models on, or any other, in a browser; `POST /search` is the same for
programs.

    python -m cirloop.demo --experiment_dir RUN
    python -m cirloop.demo --experiment_dir RUN --gallery FOLDER --port 8000
    python -m cirloop.demo --model NAME --images FOLDER

It answers as `python -m cirloop.search` does (docs/search.md).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from tempfile import TemporaryDirectory

from pydantic import Field

from cirloop.config import cli
from cirloop.tools.search.config import SearchOptions
from cirloop.tools.search.engine import MAX_FILE, Engine

logger = logging.getLogger("cirloop.tools.demo")
PROGRAM = "python -m cirloop.demo"
OPEN = (
    "--host %s: whoever reaches this machine there can search, upload, and see every image of the"
    " gallery; there is no password and no encryption. For one person elsewhere leave --host out"
    " and tunnel: ssh -L %d:127.0.0.1:%d USER@THIS_MACHINE"
)


class DemoConfig(SearchOptions):
    """A search page, and `POST /search` for programs. It is served to this machine only, unless
    --host says otherwise; Ctrl-C ends it."""

    host: str = "127.0.0.1"
    """The IPv4 address or name to listen on; 0.0.0.0 is every address of this machine."""
    port: int | None = Field(None, ge=1, le=65535)
    """By default the first free one from 7860 on."""
    max_upload_mb: int = Field(MAX_FILE >> 20, ge=1, le=MAX_FILE >> 20)
    """Size of an image that is sent, in MiB (2^20 bytes); larger ones are answered with 413."""
    max_requests: int = Field(8, ge=1)
    """Requests that are taken at once; one more is answered with 429."""


def main(argv: Sequence[str]) -> None:
    """Serve the page. Raises UserError for what is wrong with the flags, the run, the folder or the
    port."""
    options = cli.parse_flags(DemoConfig, argv, PROGRAM)
    engine = Engine(options)
    label = engine.label(options.iteration)
    engine.warm_up(label)
    with TemporaryDirectory(prefix="cirloop-demo-") as cache:
        os.environ["GRADIO_TEMP_DIR"] = cache  # nobody else's, and gone with the page
        from cirloop.tools.demo.api import build_api
        from cirloop.tools.demo.page import build_page
        from cirloop.tools.demo.server import Address, is_loopback, served

        limits = options.max_upload_mb, options.max_requests
        page = build_page(engine, label, options.k)
        api = build_api(engine, label, options.k)
        with served(page, api, Address(options.host, options.port, *limits)) as url:
            if not is_loopback(options.host):
                logger.warning(OPEN, options.host, page.server_port, page.server_port)
            logger.info("the page is at %s (Ctrl-C ends it)", url)
            page.block_thread()
