"""A launched process, whatever its job: its logs, its end with the driver's, and its errors, which
the driver passes on."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from cirloop.artifacts.atomic import write_text
from cirloop.artifacts.fs import os_error_hint
from cirloop.monitoring import live
from cirloop.monitoring.console import RedactingFormatter, start_logging
from cirloop.reproducibility import prepare_process
from cirloop.types import UserError

if TYPE_CHECKING:
    from cirloop.distributed.jobs import Job

logger = logging.getLogger(__name__)
USER_ERROR = 2
"""Exit code of a process that left its message in `Job.error`."""


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def serve(job: Job, work: Callable[[], None]) -> None:
    """Do the `work` of a job in this process. The message of a UserError is left for the driver,
    and the exit code is `USER_ERROR` then."""
    prepare_process()
    start_logging(plain=rank() != 0)
    exit_with_parent(job.driver)
    try:
        if job.log is not None:
            _open_worker_log(job.log)
        with ExitStack() as stack:
            if rank() == 0:
                stack.enter_context(live.live_display())
            work()
    except UserError as error:
        _fail(job, str(error))
    except OSError as error:
        hint = os_error_hint(error)
        if hint is None:
            raise
        logger.error(hint)  # the driver's own message may find no room
        _fail(job, hint)
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def exit_with_parent(driver: tuple[str, int]) -> None:
    """Exit this process when the driver on the same machine has ended: nobody waits for its
    result."""
    host, pid = driver

    def watch() -> None:
        while Path(f"/proc/{pid}").exists():
            time.sleep(1)
        os._exit(1)

    if host == socket.gethostname() and Path("/proc/self").exists():
        Thread(target=watch, daemon=True).start()


def _open_worker_log(attempt: Path) -> None:
    """Log this process beside the attempt's log: log lines of the first process, all output of the
    others."""
    path = attempt.with_suffix(f".rank_{rank()}.log")
    if rank() == 0:
        handler = logging.FileHandler(path, encoding="utf-8")
        handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(handler)
        return
    with path.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)


def _fail(job: Job, message: str) -> None:
    with suppress(OSError):
        write_text(job.error, message)
    sys.exit(USER_ERROR)
