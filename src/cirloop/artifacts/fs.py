"""Files on disk: errors that name their file and the remedy, and removal of what killed writers
leave."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
ABANDONED = 600.0
"""Seconds without a write after which a temporary file is taken for that of a process that was
killed."""
_FULL = "Free space there (df, quota)"
_NOT_WRITABLE = "Make it writable for this user, or give a directory that is"
REMEDIES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: (
        "Raise the limit on the size of files (ulimit -f), or use a file system without it"
    ),
    errno.EIO: "The disk or its connection failed; the system's log says more",
    errno.ESTALE: "The file server failed",
    errno.EROFS: _NOT_WRITABLE,
    errno.EACCES: _NOT_WRITABLE,
    errno.EPERM: _NOT_WRITABLE,
    errno.ENAMETOOLONG: "Give a shorter name",
    errno.ENOTDIR: "A part of this path is a file; give another one",
    errno.EMFILE: "Raise the limit on open files (ulimit -n)",
}


def os_error_hint(error: OSError) -> str | None:
    """Return a message for the user where a disk is full, failing or not writable; None for any
    other error."""
    remedy = REMEDIES.get(error.errno or 0)
    file = error.filename2 or error.filename or "a file"
    resume = (
        "What was finished is kept: then run the command again, train_iterative.py with"
        " --auto_resume."
    )
    return None if remedy is None else f"{file}: {error.strerror}. {remedy}. {resume}"


@contextmanager
def with_filename(path: Path) -> Iterator[None]:
    """Add `path` to an OSError that names no file, as those of writing, syncing and closing do."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def sync_directory(path: Path) -> None:
    """Flush a directory's list of names, or a file, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with with_filename(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(path: Path) -> None:
    """Flush a file, or every file and directory below a directory, to the disk."""
    for part in [path, *path.rglob("*")] if path.is_dir() else [path]:
        sync_directory(part)


@contextmanager
def translate_safetensors_error(path: Path) -> Iterator[None]:
    """Raise the OSError that a SafetensorError stands for, with `path` as its file."""
    from safetensors import SafetensorError

    try:
        with with_filename(path):
            yield
    except SafetensorError as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None


def save_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file with the permissions of any other new file.

    The library's own function lets only the owner read the file. Raises OSError, as other writes
    do.
    """
    from safetensors.torch import save_file  # here, since it loads torch

    with translate_safetensors_error(path):
        save_file(dict(tensors), path, metadata)
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def remove_stale_temp(directory: Path, prefix: str = ".") -> None:
    """Delete files of `directory` whose names begin with `prefix` and that nobody has written to
    lately.

    Killed processes leave such files. Those of safetensors are called `.tmp` and six letters.
    """
    with suppress(FileNotFoundError):  # no such directory, or another process deletes too
        for file in directory.iterdir():
            if file.name.startswith(prefix) and file.stat().st_mtime < time.time() - ABANDONED:
                with suppress(PermissionError):  # another user's
                    file.unlink(missing_ok=True)


def remove_tree_quietly(directory: Path) -> None:
    """Delete a directory that is no longer needed; log a warning where that fails."""
    if directory.exists():
        try:
            shutil.rmtree(directory)
        except OSError as error:
            logger.warning(
                "%s could not be removed (%s); nothing needs it, delete it", directory, error
            )
