"""SIGTERM: a run that is asked to stop ends at the next safe moment, and `--auto_resume` goes on.

The signal only leaves a note. Training looks at it after each step and keeps a step checkpoint;
everything else looks between two batches and between stages, since what is half made there is made
anew. Processes of a training stage are asked by a file as well: a launcher that passes the signal
on kills them after 30 seconds, in the middle of a long step.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXIT_PREEMPTED = 75
"""The exit code of a run that stopped and can go on: EX_TEMPFAIL of sysexits.h."""

_requested = False
_stop_file: Path | None = None
_deferred = False


class GracefulStop(BaseException):
    """The run was asked to stop and does. What is finished is kept. No error: `except Exception`
    lets it through."""


@contextmanager
def handle_sigterm(order: Path | None = None) -> Iterator[None]:
    """Within, SIGTERM is noted and does not end the process; a file at `order` says the same.

    Elsewhere than in the main thread Python can handle no signal, and SIGTERM keeps its meaning.
    """
    global _requested, _stop_file
    main = threading.current_thread() is threading.main_thread()
    before, _requested, _stop_file = (
        (signal.signal(signal.SIGTERM, _request) if main else None),
        False,
        order,
    )
    try:
        yield
    finally:
        _requested, _stop_file = False, None
        if main:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _request(*_: object) -> None:
    global _requested
    _requested = True


def stop_requested() -> bool:
    """Whether the run is to stop."""
    return _requested or (_stop_file is not None and _stop_file.exists())


def raise_if_requested() -> None:
    """A moment at which it is safe to stop. Raises Stopped where that was asked for."""
    if not _deferred and stop_requested():
        raise GracefulStop


@contextmanager
def defer_to_step() -> Iterator[None]:
    """Within, `check` lets everything pass: training asks for itself, after each step."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False
