"""Whether launched processes still get on: each touches a file while its main thread moves, and the driver looks.

One that was stopped, or waits for a file server, gives no error, and those that wait for it in a collective give one
late or never.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

EVERY = 1.0
"""Seconds between two looks at the main thread."""


def break_it(directory: Path) -> None:
    """From now on, touch this process's file in `directory` whenever its main thread has moved."""
    main, file = threading.main_thread().ident, directory / f"alive_{os.environ.get('RANK', '0')}"

    def watch() -> None:
        before: list[tuple[int, int]] = []
        while True:
            now = _place(sys._current_frames().get(main or 0))
            if now != before:
                with suppress(OSError):  # the main thread will meet it too, and say so
                    file.touch()
            before = now
            time.sleep(EVERY)

    threading.Thread(target=watch, daemon=True).start()


def _place(frame: FrameType | None) -> list[tuple[int, int]]:
    """Where a thread is: instruction by instruction, from the innermost call out."""
    place = []
    while frame is not None:
        place.append((id(frame.f_code), frame.f_lasti))
        frame = frame.f_back
    return place


class Silence:
    """The driver's view of the processes whose files are in `directory`."""

    def __init__(self, directory: Path, minutes: float) -> None:
        self._directory, self.minutes = directory, minutes
        self._seen: list[tuple[str, int]] = []
        self._since = time.monotonic()

    def too_long(self) -> bool:
        """Whether none of them has moved for so many minutes, by this machine's clock."""
        now = sorted((path.name, path.stat().st_mtime_ns) for path in self._directory.glob("alive_*"))
        if now != self._seen:
            self._seen, self._since = now, time.monotonic()
        return time.monotonic() - self._since > 60 * self.minutes
