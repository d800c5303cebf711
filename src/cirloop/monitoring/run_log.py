"""`logs/` of a run directory: the log of each attempt at the run, `attempt_001.log` and on.

An attempt is logged from the moment it has the lock; its file is made once every check has passed,
since a run that is refused changes nothing. It has what the terminal has, with date and level, and
besides what only a terminal's bars say.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import socket
import sys
import time
from contextlib import suppress
from logging.handlers import MemoryHandler, RotatingFileHandler
from pathlib import Path
from types import TracebackType

import cirloop
from cirloop.artifacts.fs import os_error_hint, with_filename
from cirloop.monitoring import preemption
from cirloop.monitoring.console import RedactingFormatter
from cirloop.types import UserError

logger = logging.getLogger(__name__)
DIRECTORY = "logs"
MAX_BYTES = 16_000_000
MAX_FILES = 4
"""Bytes of a log before it goes on in a new file, and files of one attempt: the first of them is
the newest."""
MAX_LOGS = 200
"""Attempts whose logs are kept."""


class RotatingLog(RotatingFileHandler):
    """A log file that is flushed line by line. Where writing fails the run continues, with one
    warning."""

    def __init__(self, path: Path) -> None:
        with with_filename(path):
            super().__init__(
                path,
                mode="a",
                maxBytes=MAX_BYTES,
                backupCount=MAX_FILES - 1,
                encoding="utf-8",
                errors="replace",
            )
            self.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
            assert self.stream is not None
            first = (
                f"cirloop {cirloop.__version__}, process {os.getpid()} on {socket.gethostname()}: "
            )
            self.stream.write(self.format(_record(first + shlex.join(sys.argv))) + self.terminator)
            self.stream.flush()
        self._failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._failed:
            self._failed = True
            error.filename = error.filename or self.baseFilename
            logger.warning("the log lacks lines from here on: %s", os_error_hint(error) or error)


def _record(text: str) -> logging.LogRecord:
    return logging.LogRecord(__name__, logging.INFO, "", 0, "%s", (text,), None)


class RunLog:
    """The log of one attempt, as a context: `open` it once every check has passed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / DIRECTORY
        self._began = time.monotonic()
        self._held = MemoryHandler(1 << 20, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
        self._root = logging.getLogger()
        self._log: RotatingLog | None = None

    def __enter__(self) -> RunLog:
        self._root.addHandler(self._held)
        return self

    def open(self) -> Path:
        """Create the file, with the lines logged so far. Raises OSError, as other writes do."""
        self._directory.mkdir(exist_ok=True)
        before = {
            int(match[1]): path
            for path in self._directory.iterdir()
            if (match := re.fullmatch(r"attempt_(\d+)\.log", path.name))
        }
        for number in sorted(before)[: max(0, len(before) + 1 - MAX_LOGS)]:
            # Those of launched processes too.
            for part in self._directory.glob(f"{before[number].stem}.*"):
                part.unlink()
        path = self._directory / f"attempt_{max(before, default=0) + 1:03d}.log"
        self._log = RotatingLog(path)
        self._root.removeHandler(self._held)
        self._held.setTarget(self._log)
        self._held.flush()
        self._root.addHandler(self._log)
        logging.captureWarnings(True)
        logger.info("log of this attempt: %s", path)
        return path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        seconds = time.monotonic() - self._began
        if error is not None:
            _log_failure(error, seconds)
        self._root.removeHandler(self._held)
        self._held.close()
        if self._log is not None:
            logging.captureWarnings(False)
            self._root.removeHandler(self._log)
            with suppress(OSError):  # it was said
                self._log.close()


def _log_failure(error: BaseException, seconds: float) -> None:
    """Log why an attempt ended early. The command itself reports it on the terminal."""
    extra = {"aside": True}
    if isinstance(error, preemption.GracefulStop):
        logger.info(
            "ended after %.0f s: stopped by SIGTERM; go on with --auto_resume", seconds, extra=extra
        )
    elif isinstance(error, KeyboardInterrupt):
        logger.info(
            "ended after %.0f s: interrupted; go on with --auto_resume", seconds, extra=extra
        )
    elif isinstance(error, UserError) or (isinstance(error, OSError) and os_error_hint(error)):
        message = os_error_hint(error) if isinstance(error, OSError) else str(error)
        logger.error("ended after %.0f s: %s", seconds, message, extra=extra)
    else:
        logger.error(
            "ended after %.0f s by an error of the program", seconds, exc_info=error, extra=extra
        )
