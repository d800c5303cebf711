"""Every write below some directories as it happens, with its call site, and a fault at a chosen
one.

Only for processes that end soon: an audit hook stays for the life of a process. What Python does
raises audit events; what they miss is wrapped: `os.fsync`, and safetensors' `save_file`, which
writes from Rust. For a fault in the middle of a write `open` is wrapped too.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

WRITERS = {f"artifacts.atomic:{name}" for name in ("write_text", "write_json", "write_checked")}
WRITERS |= {
    f"artifacts.fs:{name}"
    for name in (
        "save_tensors",
        "remove_stale_temp",
        "remove_tree_quietly",
        "sync_directory",
        "sync_tree",
    )
}
"""They write a path for others, who are the call site."""
SIGNALS = ("SIGKILL", "SIGTERM")
FAULTS: dict[str, type[BaseException]] = {
    "MemoryError": MemoryError,
    "OutOfMemoryError": torch.OutOfMemoryError,
    "RuntimeError": RuntimeError,
    "KeyboardInterrupt": KeyboardInterrupt,
}
PATTERNS = (
    (r"/\.tmp\w{6}$", "/*"),  # of safetensors
    (r"/\.\d+\.[0-9a-f]{8}\.tmp$", "/*"),  # of the vision cache
    (r"\.([^/]+?)\.\d+(\.[0-9a-f]{8})?\.tmp$", r"\1"),  # of ours
    (r"(iter|replaced|attempt)_\d+", r"\1_*"),
    (r"step_\d+", "step_*"),
    (r"evaluation_(base|iter_\*)", "evaluation_*"),
    (r"figures/\w+", "figures/*"),
    (r"/[0-9a-f]{16}(?=/|$)", "/*"),
    (r"[0-9a-f]{24}(\.\w+)?$", r"*\1"),
)
HALF = "during"


def pattern(path: Path, roots: dict[str, Path]) -> str | None:
    """A path below one of the roots by the root's name, numbers and temporary names left out."""
    for name, root in roots.items():
        if path == root or root in path.parents:
            found = f"{name}/{path.relative_to(root).as_posix()}".removesuffix("/.")
            for before, after in PATTERNS:
                found = re.sub(before, after, found)
            return found
    return None


def raise_fault(kind: str, path: Path | None) -> None:
    """`path` is None where the system's error would not name the file: of a write, a sync."""
    if kind in SIGNALS:
        os.kill(os.getpid(), getattr(signal, kind))
    elif kind in FAULTS:
        raise FAULTS[kind]("injected")
    else:
        number = getattr(errno, kind)
        raise OSError(number, os.strerror(number), *([str(path)] if path else []))


class Watch:
    """From now on every write below `roots` (name -> directory) goes to `events`; `fault` strikes
    once.

    A fault is {site, op, path, when, kind, nth}; `when` is before or after the operation, or in the
    middle of it.
    """

    def __init__(self, roots: dict[str, Path], fault: dict[str, Any] | None) -> None:
        self.roots = {name: path.resolve() for name, path in roots.items()}
        self.fault, self.fired, self.stage = fault, False, "open"
        self.events: list[tuple[str, str, str, str]] = []
        self._left = fault.get("nth", 1) if fault else 0
        self._inner, self._half = 0, False
        self._open, self._fsync, self._save = io.open, os.fsync, safetensors.torch.save_file
        io.open = builtins.open = self._opened  # type: ignore[assignment]
        os.fsync = self._synced
        safetensors.torch.save_file = self._saved
        sys.addaudithook(self._hook)

    def _hook(self, name: str, args: tuple[Any, ...]) -> None:
        told = self._told(name, args)
        if told is not None:
            self._event(*told, sys._getframe(1))

    def _told(self, name: str, args: tuple[Any, ...]) -> tuple[str, Path] | None:
        """The operation and its path."""
        if name == "open" and isinstance(args[0], str | bytes | os.PathLike):
            writes = (
                set(args[1] or "") & set("wax+")
                if args[1]
                else args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            )
            return ("open", _absolute(args[0])) if writes and not os.path.isdir(args[0]) else None
        if name in ("os.rename", "os.link", "os.symlink"):
            return name.removeprefix("os."), _absolute(args[1])
        if name in ("os.remove", "os.rmdir", "os.mkdir"):
            return name.removeprefix("os."), _absolute(args[0], args[-1])
        if name in ("shutil.rmtree", "os.utime", "os.truncate", "os.chmod"):
            return name.split(".")[1], _absolute(args[0])
        return None

    def _event(self, op: str, path: Path, frame: FrameType | None) -> None:
        site, ours, removing, target = _site(frame)
        if ours is None or pattern(path, self.roots) is None:
            return
        if target is not None and not removing:
            op = "sync_dir" if op == "sync" and path == target.parent else op
        where = pattern(path if target is None or removing else target, self.roots)
        assert where is not None
        if removing and op in ("remove", "rmdir"):  # a part of shutil.rmtree
            self._inner += 1
            self._strike(self._due("rmtree", site, None, HALF) and self._inner == 2, path, ours)
            return
        self._inner = 0
        self.events.append((self.stage, op, site, where))
        if not self._matches(op, site, where):
            return
        self._left -= 1
        assert self.fault is not None
        if self._left or self.fired:
            return
        if self.fault["when"] == "before":
            self._strike(True, path, ours)
        elif self.fault["when"] == "after":
            self._strike_after(path, ours)
        elif op in ("open", "save"):
            self._half = True

    def _matches(self, op: str, site: str, where: str | None) -> bool:
        f = self.fault
        return f is not None and (f["op"], f["site"]) == (op, site) and where in (None, f["path"])

    def _due(self, op: str, site: str, where: str | None, when: str) -> bool:
        return (
            self._matches(op, site, where)
            and self.fault is not None
            and self.fault["when"] == when
            and not self._left
        )

    def _strike(self, now: bool, path: Path | None, ours: FrameType) -> None:
        if now and not self.fired and self.fault is not None:
            self.fired = True
            raise_fault(self.fault["kind"], path)

    def _strike_after(self, path: Path, ours: FrameType) -> None:
        """At the next line of our code, so that the operation is done and nothing after it."""

        def next_line(frame: FrameType, event: str, arg: Any) -> None:
            sys.settrace(None)
            frame.f_trace = None
            self._strike(True, path, ours)

        ours.f_trace = next_line
        sys.settrace(lambda frame, event, arg: None)

    def _opened(self, *args: Any, **options: Any) -> Any:
        file = self._open(*args, **options)
        if self._half:
            self._half = False
            return Half(file, lambda: self._strike(True, None, sys._getframe()))
        return file

    def _synced(self, handle: int) -> None:
        self._event("sync", Path(os.readlink(f"/proc/self/fd/{handle}")), sys._getframe(1))
        self._fsync(handle)

    def _saved(self, tensors: Any, filename: Any, *rest: Any) -> None:
        path = Path(filename).absolute()
        try:
            self._event("save", path, sys._getframe(1))
        except OSError as error:
            _as_safetensors_says(error)
        self._save(tensors, filename, *rest)
        if not self._half:
            return
        self._half = False
        assert self.fault is not None
        if self.fault["kind"] in SIGNALS:  # what the library has on disk then
            aside = path.with_name(".tmpAbCdEf")
            path.rename(aside)
            os.truncate(aside, aside.stat().st_size // 2)
        else:  # it removes that
            path.unlink()
        try:
            self._strike(True, None, sys._getframe())
        except OSError as error:
            _as_safetensors_says(error)


class Half:
    """A file whose first write writes one half, then meets a fault."""

    def __init__(self, file: Any, strike: Callable[[], None]) -> None:
        self._file, self._strike = file, strike

    def write(self, text: Any) -> int:
        self._file.write(text[: len(text) // 2])
        self._file.flush()
        self._strike()
        return int(self._file.write(text[len(text) // 2 :])) + len(text) // 2

    def __enter__(self) -> Half:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _as_safetensors_says(error: OSError) -> None:
    """Its errors are not OSError."""
    raise SafetensorError(
        f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
    ) from None


def _absolute(path: Any, directory: Any = -1) -> Path:
    """`directory` is a handle that `path` is relative to, or -1."""
    name = os.fsdecode(path) if not isinstance(path, int) else os.readlink(f"/proc/self/fd/{path}")
    if isinstance(directory, int) and directory >= 0 and not os.path.isabs(name):
        name = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), name)
    return Path(os.path.abspath(name))


def _site(frame: FrameType | None) -> tuple[str, FrameType | None, bool, Path | None]:
    """`module:function` of the innermost code of cirloop that is no writer, the innermost of all of
    it, whether shutil is at work below it, and the path that a writer between the two writes."""
    ours, removing, target = None, False, None
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module == "shutil" and ours is None:
            removing = removing or "rmtree" in frame.f_code.co_name
        if module.startswith("cirloop."):
            ours = ours or frame
            name = frame.f_code.co_qualname.replace(".<locals>", "")
            site = f"{module.removeprefix('cirloop.')}:{name}"
            if site not in WRITERS:
                return site, ours, removing, target
            target = Path(frame.f_locals.get("path") or frame.f_locals["directory"]).resolve()
        frame = frame.f_back
    return "", ours, removing, target
