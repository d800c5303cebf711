"""Tensors kept on disk in shards, safetensors files of many, shared by processes and held to a
size.

A shard is written aside and renamed, so several processes may write at once and a killed one leaves
nothing half-written behind. Its name is the digest of its content: a shard that does not agree is
deleted, and what it held is reported missing. Shards are read mapped into memory: one that is open
stays readable when another process deletes its file. A shard's time of change is the start of the
last run that found it whole, which need not compare it again.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from cirloop.artifacts.fs import remove_stale_temp, save_tensors
from cirloop.artifacts.store import file_digest

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
RUN_STARTED_AT = int(os.environ.setdefault("CIRLOOP_RUN_STARTED_AT", str(int(time.time()))))
"""In seconds; child processes have it from the environment."""


class TensorCache:
    """The shards in `root / name`. Keys are `digest@...`; a digest is what is asked for.
    `max_bytes` is of all of `root`, 0 = no limit; what this run uses stays also beyond it."""

    def __init__(self, root: Path, name: str, max_bytes: int = 0) -> None:
        self._root, self._directory, self._max_bytes = root, root / name, max_bytes
        self._keys: dict[Path, list[str]] = {}
        self._open: dict[Path, Any] = {}
        self._warned = False
        remove_stale_temp(self._directory)
        self._list()

    def missing(self, digests: Collection[str]) -> list[str]:
        """Those of `digests` that no shard holds. The others can be read from now on, whoever
        deletes their files."""
        if any(digest not in self._index for digest in digests):
            self._list()  # another process may have made them meanwhile
        while (
            closed := {self._index[digest][0] for digest in digests if digest in self._index}
            - self._open.keys()
        ):
            self._open |= {
                path: shard for path in closed if (shard := _opened(path, compare=True)) is not None
            }
            if gone := closed - self._open.keys():
                self._keys = {path: keys for path, keys in self._keys.items() if path not in gone}
                self._list()
        return [digest for digest in digests if digest not in self._index]

    def key(self, digest: str) -> str:
        return self._index[digest][1]

    def read(self, digest: str) -> torch.Tensor:
        """The tensor of a digest that is not `missing`, mapped from its file."""
        path, key = self._index[digest]
        tensor: torch.Tensor = self._open[path].get_tensor(key)
        return tensor

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """One shard of `tensors`, by key; with a limit, after room is made for it."""
        if self._max_bytes:
            self._make_room(sum(tensor.nbytes for tensor in tensors.values()))
        self._directory.mkdir(parents=True, exist_ok=True)
        aside = self._directory / f".{os.getpid()}.{secrets.token_hex(4)}.tmp"
        try:
            save_tensors(aside, tensors)
            path = self._directory / f"{file_digest(aside)[:24]}.safetensors"
            self._open[path] = _opened(aside)  # before others see it, and could delete it
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        _mark(path)
        self._keys[path] = [*tensors]
        self._index |= {key.split("@")[0]: (path, key) for key in tensors}

    def _list(self) -> None:
        """Look for shards of other processes, and index all."""
        for path in sorted({*self._directory.glob("*.safetensors")} - self._keys.keys()):
            shard = _opened(path)
            self._keys[path] = [] if shard is None else [*shard.keys()]
        self._index = {
            key.split("@")[0]: (path, key) for path, keys in self._keys.items() for key in keys
        }

    def _make_room(self, num_bytes: int) -> None:
        """Delete files in `root`, the oldest first, until `num_bytes` fit or this run uses all that
        are left."""
        files = []
        for path in self._root.glob("*/*"):
            with suppress(FileNotFoundError):  # another process deletes too
                files.append((path.stat().st_mtime, path, path.stat().st_size))
        total = num_bytes + sum(size for _, _, size in files)
        for changed, path, size in sorted(files):
            if total > self._max_bytes and changed < RUN_STARTED_AT:
                with suppress(PermissionError):  # another user's
                    path.unlink(missing_ok=True)
                    total -= size
        if total > self._max_bytes and not self._warned:
            self._warned = True
            message = (
                "the vision features in use take %.3g GB in %s, more than"
                " runtime.feature_cache_max_gb; they stay"
            )
            logger.warning(message, total / 1e9, self._root)


def _opened(path: Path, compare: bool = False) -> Any:
    """A shard mapped into memory; None where it is gone or may not be read, or is damaged, and then
    deleted."""
    try:
        shard = safe_open(path, framework="pt") if path.is_file() else None
        if shard is not None and compare and path.stat().st_mtime != RUN_STARTED_AT:
            if file_digest(path)[:24] != path.stem:
                raise SafetensorError("its digest does not agree with its name")
            _mark(path)
        return shard
    except FileNotFoundError:
        return None
    except SafetensorError as error:
        logger.warning(
            "cached vision features %s are damaged (%s): deleted and made again", path, error
        )
        path.unlink(missing_ok=True)
        return None


def _mark(path: Path) -> None:
    """Note that a shard is whole."""
    with suppress(
        OSError
    ):  # another user's, or on a disk that is not written to: other processes compare it too
        os.utime(path, (RUN_STARTED_AT, RUN_STARTED_AT))
