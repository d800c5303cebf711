"""What the commands share: one clear line for the user's errors, and quiet libraries."""

from __future__ import annotations

import codecs
import io
import os
import sys
import warnings
from collections.abc import Callable

from cirloop.artifacts.fs import os_error_hint
from cirloop.io.pipes import quiet_when_unread
from cirloop.io.redact import sanitize
from cirloop.monitoring import live, preemption
from cirloop.monitoring.console import start_logging
from cirloop.reproducibility import prepare_process
from cirloop.types import UserError

ASCII_FALLBACK = "cirloop.signs"
"""Name of how a terminal or pipe that cannot show a sign is written to: by one or more that it
can."""
ASCII_SPELLINGS = {
    "±": "+-",
    "→": "->",
    "…": "...",
    "–": "-",
    "—": "-",
    "×": "x",
    "·": "-",
    "•": "-",
    "✓": "ok",
    "µ": "u",
}


def _encode_as_ascii(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return (
        "".join(ASCII_SPELLINGS.get(sign, "?") for sign in error.object[error.start : error.end]),
        error.end,
    )


codecs.register_error(ASCII_FALLBACK, _encode_as_ascii)


def main_wrapper(main: Callable[[], None]) -> None:
    """Run a command. A UserError, and a disk that is full, failing or shut, ends it with a message
    and exit code 2, an interrupt with 130, and a run that was asked to stop by SIGTERM with 75. One
    whose output nobody reads any more ends with 141."""
    with quiet_when_unread():
        _run(main)


def _run(main: Callable[[], None]) -> None:
    prepare_process()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ASCII_FALLBACK)
    start_logging()
    try:
        with live.live_display():
            main()
    except UserError as error:
        sys.stderr.write(f"error: {sanitize(str(error))}\n")
        sys.exit(2)
    except preemption.GracefulStop:
        sys.stderr.write("stopped by SIGTERM; go on with --auto_resume\n")
        sys.exit(preemption.EXIT_PREEMPTED)
    except OSError as error:
        hint = os_error_hint(error)
        if hint is None:
            raise
        sys.stderr.write(f"error: {hint}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("stopped; go on with --auto_resume\n")
        sys.exit(130)
