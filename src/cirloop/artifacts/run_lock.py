"""One run at a time in a run directory: a lock of the operating system on `run.lock`, which ends
with its process.

`run.lock.json` beside it says who holds it. A killed run leaves both files, and they hinder nobody.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from cirloop.artifacts.atomic import write_json
from cirloop.artifacts.fs import os_error_hint
from cirloop.types import UserError

FILE = "run.lock"
OWNER = "run.lock.json"


@contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """Hold the lock of a run directory, which is created if need be.

    Raises UserError where another process holds it.
    """
    new = [parent for parent in (directory, *directory.parents) if not parent.exists()]
    try:
        with ExitStack() as stack:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(directory / FILE, timeout=0))
                # While it is held: who waited for this file takes a new one.
                for name in (
                    FILE,
                    OWNER,
                ):
                    stack.callback((directory / name).unlink, missing_ok=True)
                write_json(directory / OWNER, {"schema": 1, "owner": _describe_owner()})
            except Timeout:
                raise UserError(_describe_conflict(directory)) from None
            except OSError as error:
                if os_error_hint(error):  # the command says it
                    raise
                raise UserError(
                    f"--experiment_dir {directory} cannot be written: {error}."
                ) from None
            yield
    finally:
        for parent in new:
            with suppress(OSError):  # something is in it
                parent.rmdir()


def _describe_owner() -> str:
    user = os.environ.get("USER", "a user without a name")
    began = datetime.now().astimezone().isoformat(timespec="seconds")
    return (
        f"process {os.getpid()} of {user} on {socket.gethostname()}, since {began}"
        f" ({shlex.join(sys.argv)})"
    )


def _describe_conflict(directory: Path) -> str:
    try:
        owner = json.loads((directory / OWNER).read_text("utf-8"))["owner"]
    except (OSError, ValueError, KeyError, TypeError):  # about to be written, or changed by hand
        owner = f"{OWNER} does not say which"
    return (
        f"a run works in {directory} already: {owner}.\nWays out: wait for it to end; stop its"
        " process by SIGTERM, and --auto_resume can go on; or start another run with another"
        " --experiment_dir."
    )
