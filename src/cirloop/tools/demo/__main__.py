"""A page to try a run's models on, in a browser on this machine.

    python -m cirloop.demo --experiment_dir RUN
    python -m cirloop.demo --experiment_dir RUN --gallery FOLDER --port 8000

It answers as `python -m cirloop.search` does (docs/search.md).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from tempfile import TemporaryDirectory

from pydantic import Field

from cirloop.cli import entry
from cirloop.tools.search.config import SearchOptions, parse
from cirloop.tools.search.engine import Engine

logger = logging.getLogger("cirloop.tools.demo")
PROGRAM = "python -m cirloop.demo"


class DemoConfig(SearchOptions):
    """A search page over a run's models. It is served to this machine only; Ctrl-C ends it."""

    port: int | None = Field(None, ge=1, le=65535)
    """On 127.0.0.1; by default the first free one from 7860 on."""


def main(argv: Sequence[str]) -> None:
    """Serve the page. Raises UserError for what is wrong with the flags, the run, the folder or the
    port."""
    options = parse(DemoConfig, argv, PROGRAM)
    engine = Engine(options)
    label = engine.label(options.iteration)
    engine.warm_up(label)
    with TemporaryDirectory(prefix="cirloop-demo-") as cache:
        os.environ["GRADIO_TEMP_DIR"] = cache  # nobody else's, and gone with the page
        from cirloop.tools.demo.page import build_page, launch

        page = build_page(engine, label, options.k)
        logger.info("the page is at %s (Ctrl-C ends it)", launch(page, options.port))
        page.block_thread()


if __name__ == "__main__":
    entry.main_wrapper(lambda: main(sys.argv[1:]))
