"""Preemption: SIGTERM ends a run at the next safe moment, and `--auto_resume` continues it.

SIGTERM only sets a flag. Training checks it after every step and writes a step checkpoint; other
stages check it between batches and are restarted from scratch. The processes of a training stage
are stopped by a file as well, because a launcher that passes the signal on kills them after 30
seconds, in the middle of a long step.
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
    """A stop that SIGTERM requested; finished artifacts are kept. It is no Exception, so `except
    Exception` does not catch it."""


@contextmanager
def handle_sigterm(order: Path | None = None) -> Iterator[None]:
    """Turn SIGTERM into a stop request while the context is open; a file at `order` requests one
    too.

    Python handles signals in the main thread only; in other threads SIGTERM keeps its meaning.
    """
    global _requested, _stop_file
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _request) if main else None
    _requested = False
    _stop_file = order
    try:
        yield
    finally:
        _requested = False
        _stop_file = None
        if main:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _request(*_: object) -> None:
    global _requested
    _requested = True


def stop_requested() -> bool:
    """Tell whether the run was asked to stop."""
    return _requested or (_stop_file is not None and _stop_file.exists())


def raise_if_requested() -> None:
    """Raise GracefulStop if a stop was requested; call this where stopping is safe."""
    if not _deferred and stop_requested():
        raise GracefulStop


@contextmanager
def defer_to_step() -> Iterator[None]:
    """Disable `raise_if_requested` while the context is open: training checks after each step
    itself."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False
