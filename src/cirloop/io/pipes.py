"""A command whose reader closes the pipe, as `cirloop doctor | head -1` does. Standard library
only."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

READER_GONE = 141
"""The exit code of a command that nobody reads any more: what a shell gives one that SIGPIPE
ended."""


@contextmanager
def quiet_when_unread() -> Iterator[None]:
    """End the process without a traceback where nobody reads its output any more.

    A connection to elsewhere that breaks is an error as before.
    """
    try:
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
    except BrokenPipeError:
        unread = [number for number in (1, 2) if _is_unread(number)]
        if not unread:
            raise
        null = os.open(os.devnull, os.O_WRONLY)
        for number in unread:  # what is still buffered is flushed when Python ends
            os.dup2(null, number)
        sys.exit(READER_GONE)


def _is_unread(number: int) -> bool:
    """Return whether a descriptor is a pipe or a socket whose reader is gone."""
    poll = select.poll()
    with suppress(OSError):
        poll.register(number, 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    return False
