"""What can happen to a file, as functions of its path; and reading it as somebody who may not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from cirloop.types import UserError

NOBODY = 65534


def flipped(share: float) -> Callable[[Path], None]:
    """One bit of the byte at `share` of the file."""

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[min(int(share * len(content)), len(content) - 1)] ^= 4
        path.write_bytes(content)

    return flip


def cut(share: float) -> Callable[[Path], None]:
    """The first `share` of the file; all but the last two bytes (of JSON `}` and a line feed) where
    it is 1."""

    def truncate(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: min(int(share * len(content)), len(content) - 2)])

    return truncate


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def zeroed(path: Path) -> None:
    """Its length, with nothing in it: what a crash may leave of a file that was not synced."""
    path.write_bytes(bytes(path.stat().st_size))


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def gone(path: Path) -> None:
    path.unlink()


def someone_elses_text(path: Path) -> None:
    path.write_text('{"schema": 1}\n', "utf-8")


ALTERATIONS: dict[str, Callable[[Path], None]] = {
    "a bit of its head": flipped(0.02),
    "a bit of its first quarter": flipped(0.25),
    "a bit of its middle": flipped(0.5),
    "a bit of its last quarter": flipped(0.75),
    "a bit of its end": flipped(0.999),
    "half of it": cut(0.5),
    "all but its last two bytes": cut(1.0),
    "empty": emptied,
    "zeros": zeroed,
    "longer": longer,
    "another file": someone_elses_text,
    "a directory": a_directory,
    "a dangling link": a_dangling_link,
    "a pipe": a_pipe,
    "gone": gone,
}


def copied(source: Path, goal: Path) -> Path:
    shutil.copytree(source, goal, symlinks=True)
    return goal


def content(directory: Path) -> dict[str, bytes | str]:
    """Everything below a directory, so that one can see that nothing was changed."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else "no file"
        for path in sorted(directory.rglob("*"))
    }


def refused(read: Callable[[], object]) -> str:
    """The message of the UserError that `read` must end in."""
    try:
        found = read()
    except UserError as error:
        return str(error)
    raise AssertionError(f"accepted: {found!r:.200}")


def refused_to_nobody(read: Callable[[], object]) -> str:
    """`refused` in a child process, without root's right to read everything where this is root."""
    out, into = os.pipe()
    child = os.fork()
    if not child:
        said = "the child failed"
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            said = refused(read)
        except BaseException as error:
            said = f"not a UserError: {error!r}"
        finally:
            os.write(into, said.encode()[:60_000])
            os._exit(0)
    os.close(into)
    with os.fdopen(out, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    return said
