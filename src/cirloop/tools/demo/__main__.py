"""A page to try a run's models on, in a browser on this machine.

    python -m cirloop.demo --experiment_dir RUN
    python -m cirloop.demo --experiment_dir RUN --gallery FOLDER --port 8000

It answers as `python -m cirloop.search` does (docs/search.md).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import suppress

from pydantic import Field

from cirloop.cli import entry
from cirloop.tools.search.config import SearchOptions, parse
from cirloop.tools.search.engine import Engine

logger = logging.getLogger("cirloop.tools.demo")
PROGRAM = "python -m cirloop.demo"


class DemoConfig(SearchOptions):
    """A search page over a run's models. It is served to this machine only; Ctrl-C ends it."""

    port: int = Field(7860, ge=0, le=65535)
    """On 127.0.0.1; 0 = any that is free."""


def main(argv: Sequence[str]) -> None:
    """Serve the page. Raises UserError for what is wrong with the flags, the run, the folder or the
    port."""
    options = parse(DemoConfig, argv, PROGRAM)
    from cirloop.tools.demo.image_registry import Desk
    from cirloop.tools.demo.page import blocks
    from cirloop.tools.demo.server import HOST, application, listening, serve

    with listening(options.port) as on:
        engine = Engine(options)
        label = engine.label(options.iteration)
        engine.warm_up(label)
        desk = Desk(engine)
        app = application(blocks(engine, desk, label, options.k), desk)
        logger.info("the page is at http://%s:%d (Ctrl-C ends it)", HOST, on.getsockname()[1])
        with suppress(KeyboardInterrupt):
            serve(app, on)


if __name__ == "__main__":
    entry.main_wrapper(lambda: main(sys.argv[1:]))
