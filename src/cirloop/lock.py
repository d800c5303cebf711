"""One run at a time in a run directory: `run.lock` says who works there, and is gone when they are done.

It is a file that says all from its first moment: written aside and linked, which fails where there is one, as O_EXCL
does. A killed run leaves it. On the same host, the number and the start of its process say whether it still works;
what another host left, only a person can judge. filelock's SoftFileLock, the nearest library, names no owner, time or
command, and takes a stale lock over without a word.
"""

from __future__ import annotations

import fcntl
import getpass
import json
import logging
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from cirloop.disk import explain, named
from cirloop.types import UserError

logger = logging.getLogger(__name__)
SCHEMA = 1
FILE = "run.lock"
PROC = Path("/proc")
TEXTS = ("owner", "host", "began", "command")


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Within, this process alone works in `directory`, which is made if need be.

    Raises UserError where another does, with who, where, since when and the way out.
    """
    path = directory / FILE
    made = [each for each in (directory, *directory.parents) if not each.exists()]
    text = json.dumps(_record()) + "\n"
    try:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            _take(path, text)
        except OSError as error:
            if explain(error):  # the command says it
                raise
            raise UserError(f"--experiment_dir {directory} cannot be written: {error}.") from None
        try:
            yield
        finally:
            if _read(path) == text:  # else a person deleted it, and another run works here by now
                path.unlink(missing_ok=True)
    finally:
        for each in made:
            with suppress(OSError):  # something is in it
                each.rmdir()


def _record() -> dict[str, Any]:
    try:
        owner = getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        owner = str(os.getuid())
    return {
        "schema": SCHEMA, "owner": owner, "host": socket.gethostname(), "pid": os.getpid(),
        "began": datetime.now().astimezone().isoformat(timespec="seconds"), "command": shlex.join(sys.argv),
        "process": {**_machine(), "started": _started(os.getpid())},
    }  # fmt: skip


def _take(path: Path, text: str) -> None:
    """Have `path` hold `text`. Raises UserError where it is another's."""
    aside = path.with_name(f".{FILE}.{os.getpid()}.tmp")
    try:
        while True:
            with named(path), aside.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(aside, path)
                return
            except FileExistsError:
                if _taken_over(path, aside):
                    return
            except FileNotFoundError:  # the run that had the lock until now cleared temporary files away
                continue
    finally:
        aside.unlink(missing_ok=True)


def _taken_over(path: Path, aside: Path) -> bool:
    """Put `aside` in the place of a stale lock; False where the lock has changed meanwhile.

    Of runs that find the same stale lock, all of them on its host, one at a time comes to the last line.
    """
    text = _read(path)
    if text is None:
        return False
    there = _parse(path, text)
    if (state := _state(there)) != "stale":
        raise UserError(_refusal(path, there, state))
    try:
        file = path.open("r+b")
    except FileNotFoundError:
        return False
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if _read(path) != text:
            return False
        logger.info("taking over a stale lock: %s has ended", _who(there))
        aside.replace(path)
    return True


def _read(path: Path) -> str | None:
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except FileNotFoundError:
        return None


def _parse(path: Path, text: str) -> dict[str, Any]:
    """What a lock says. Raises UserError where it is damaged or a later version's."""
    try:
        there: Any = json.loads(text)
    except ValueError:
        there = None
    schema = there.get("schema") if isinstance(there, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise UserError(f"{path} has schema {schema}, of a later version of cirloop; this one reads {SCHEMA}. If no "
                        "run works there, delete it.")  # fmt: skip
    pid = there.get("pid") if isinstance(there, dict) else None
    whole = schema == SCHEMA and isinstance(pid, int) and 0 < pid < 2**31
    if not whole or not all(isinstance(there.get(name), str) for name in TEXTS):
        raise UserError(f"{path} is damaged, so nobody knows who works there. If no run does, delete it.")
    return dict(there)


def _state(there: dict[str, Any]) -> Literal["works", "stale", "elsewhere"]:
    """Whether the process that a lock names still works, as far as this host can tell."""
    process, machine = there.get("process"), _machine()
    told: dict[str, Any] = process if isinstance(process, dict) else {}
    if there["host"] != socket.gethostname():
        return "elsewhere"
    if told.get("boot", machine["boot"]) != machine["boot"]:  # the host was started anew
        return "stale"
    if told.get("namespace", machine["namespace"]) != machine["namespace"]:  # a container with this host's name
        return "elsewhere"
    started = _started(there["pid"])
    return "works" if started is not None and started == told.get("started", started) else "stale"


def _machine() -> dict[str, str]:
    """What a process's number counts in: a boot of the host, and a container's own numbers. Nothing without /proc."""
    if not (PROC / "self").exists():
        return {"boot": "", "namespace": ""}
    boot = (PROC / "sys/kernel/random/boot_id").read_text("ascii").strip()
    return {"boot": boot, "namespace": os.readlink(PROC / "self/ns/pid")}


def _started(pid: int) -> int | None:
    """When the process `pid` of this host began, in ticks since boot (0 without /proc); None if it has ended.

    Numbers are given out again: another start is another process.
    """
    if (PROC / "self").exists():
        try:  # after the name, which may hold anything: the state, 18 other fields, and the start
            fields = (PROC / str(pid) / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if fields[0] in ("Z", "X") else int(fields[19])  # ended, and not yet cleared away
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # another user's
        pass
    return 0


def _who(there: dict[str, Any]) -> str:
    return f"process {there['pid']} of {there['owner']} on {there['host']}, since {there['began']}"


def _refusal(path: Path, there: dict[str, Any], state: str) -> str:
    out = f"if that run has ended (killed, it leaves its lock), delete {path}"
    if state == "works":
        out = f"stop that run with `kill {there['pid']}`: it ends so that --auto_resume can go on"
    return (
        f"a run works in {path.parent} already: {_who(there)} ({there['command']}).\n"
        f"Ways out: wait for it to end; {out}; or start another run with another --experiment_dir."
    )
