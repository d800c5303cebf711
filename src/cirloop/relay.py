"""How processes that a run launched reach its log and its terminal: through one pipe, a line at a time.

A launched process has the pipe as its standard output and standard error. What cirloop says there is a line that begins
with `SIGN` and holds JSON: a log record, or news (`telling.py`). Every other line is the words of a library, a launcher
or Python, and is logged as it is. A line that cirloop writes is short enough for the system not to mix it with another
process's.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from cirloop import telling
from cirloop.shown import safe

SIGN = "\x1e"
VARIABLE = "CIRLOOP_RELAY"
PIECE = 800
"""Characters of a logged line that are sent at once; of at most 4 bytes each, they stay below PIPE_BUF."""
EVERY = 0.25
"""Seconds between two reports of a bar."""
LAST_WORDS = 5.0
"""Seconds for what ended processes have left in the pipe; a process that outlives its launcher keeps it open."""
logger = logging.getLogger("cirloop.processes")


def is_on() -> bool:
    """Whether this process was launched by a run that reads what it sends."""
    return os.environ.get(VARIABLE) == "1"


class Handler(logging.Handler):
    """Sends log records to the run that launched this process."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            for line in self.format(record).splitlines():
                for start in range(0, max(1, len(line)), PIECE):
                    piece = line[start : start + PIECE]
                    _send("log", {"name": record.name, "level": record.levelno, "text": piece,
                                  "bar": getattr(record, "bar", False)})  # fmt: skip
        except OSError:  # the run has ended, and this process will too
            self.handleError(record)


def _send(kind: str, what: dict[str, Any]) -> None:
    os.write(2, f"{SIGN}{json.dumps([kind, what], ensure_ascii=False)}\n".encode("utf-8", "replace"))


@contextmanager
def sending() -> Iterator[None]:
    """Within, bars and steps of this process are sent. For one process of those that do the same."""
    sent: dict[str, float] = {}

    def send(kind: str, what: dict[str, Any]) -> None:
        if kind == "bar" and what["done"] is not None and time.monotonic() - sent.get(what["key"], 0.0) < EVERY:
            return
        if kind == "bar":
            sent[what["key"]] = time.monotonic()
        _send(kind, what)

    if not is_on():
        yield
        return
    with telling.heard_by(send):
        yield


class Heard:
    """What launched processes write into `end`, a file descriptor to give them; pass it on from the main thread."""

    def __init__(self) -> None:
        begin, self.end = os.pipe()
        self._lines: SimpleQueue[str] = SimpleQueue()
        self._reader = Thread(target=self._read, args=(begin,), daemon=True)
        self._bars: set[str] = set()

    def _read(self, begin: int) -> None:
        with os.fdopen(begin, "rb") as pipe:
            for line in pipe:
                self._lines.put(line.decode("utf-8", "replace").rstrip("\n"))

    def start(self) -> None:
        """Once the processes have `end`: this one closes its own, and reads until all of them have."""
        os.close(self.end)
        self._reader.start()

    def pass_on(self, aside: bool = False) -> None:
        """Log and tell what has come so far. `aside`: for the log file alone."""
        while True:
            try:
                line = self._lines.get_nowait()
            except Empty:
                return
            news = _parsed(line)
            if news is None:
                text = line.rpartition("\r")[2]  # what a bar of a library wrote last
                if text.strip() and logger.isEnabledFor(logging.INFO):
                    logger.info("%s", text, extra={"aside": aside})
                elif text.strip() and not aside:  # nobody set logging up; it may be why the processes failed
                    sys.stderr.write(f"{safe(text)}\n")
            elif news[0] == "log":
                said = news[1]
                about = {"aside": aside, "bar": said["bar"]}
                logging.getLogger(said["name"]).log(said["level"], "%s", said["text"], extra=about)
            else:
                if news[0] == "bar":
                    self._bars.add(news[1]["key"])
                telling.tell(news[0], **news[1])

    def close(self, aside: bool) -> None:
        """Once the processes have ended: pass on the last of it, and take their bars away."""
        self._reader.join(LAST_WORDS)
        self.pass_on(aside)
        for key in self._bars:
            telling.tell("bar", key=key, title="", done=None, total=None, rate="")


def _parsed(line: str) -> tuple[str, dict[str, Any]] | None:
    """The kind and what it says; None for a line that is nobody's news, or was torn."""
    if not line.startswith(SIGN):
        return None
    try:
        kind, what = json.loads(line[len(SIGN) :])
    except ValueError:
        return None
    known = {"log": {"name", "level", "text", "bar"}, "bar": {"key", "title", "done", "total", "rate"}, "step": {"row"}}
    return (kind, what) if isinstance(what, dict) and known.get(kind) == {*what} else None
