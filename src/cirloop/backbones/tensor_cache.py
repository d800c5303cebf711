"""Tensors kept on disk in shards (safetensors files of many tensors) within a limit of size.

Processes share the shards. A shard is written aside and renamed, so several processes may write at
once, and a killed one leaves nothing half-written. A shard's name is the digest of its content: one
whose content does not agree is deleted, and its tensors are reported missing. Shards are mapped
into memory: an open one stays readable when another process deletes its file. The modification time
of a shard is the start of the last run that verified it, which need not verify it again.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from safetensors import SafetensorError, safe_open

from cirloop.artifacts.fs import remove_stale_temp, save_tensors
from cirloop.artifacts.store import file_digest

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
RUN_STARTED_VARIABLE = "CIRLOOP_RUN_STARTED_AT"
RUN_STARTED_AT = int(os.environ.get(RUN_STARTED_VARIABLE, time.time()))
"""Start of the run in seconds; launched processes take it from the environment that they get."""


class Shard(Protocol):
    """An open safetensors file."""

    def keys(self) -> list[str]: ...

    def get_tensor(self, name: str) -> torch.Tensor: ...


class TensorCache:
    """Shards in `root / name`, with keys `DIGEST@...`; tensors are looked up by digest.

    `max_bytes` limits all of `root`, 0 = no limit. What this run uses stays also beyond the limit.
    """

    def __init__(self, root: Path, name: str, max_bytes: int = 0) -> None:
        self._root = root
        self._directory = root / name
        self._max_bytes = max_bytes
        self._listed: dict[Path, list[str]] = {}
        self._open: dict[Path, Shard] = {}
        self._warned = False
        remove_stale_temp(self._directory)
        self._list()

    def missing(self, digests: Collection[str]) -> list[str]:
        """Return those of `digests` that no shard holds.

        The others can be read from now on, whoever deletes their files.
        """
        if any(digest not in self._index for digest in digests):
            self._list()  # another process may have written them
        while True:
            needed = {self._index[digest][0] for digest in digests if digest in self._index}
            closed = needed - self._open.keys()
            if not closed:
                return [digest for digest in digests if digest not in self._index]
            for path in closed:
                shard = _open_shard(path, verify=True)
                if shard is None:
                    del self._listed[path]
                else:
                    self._open[path] = shard
            if closed - self._open.keys():
                self._list()

    def key(self, digest: str) -> str:
        """Return the key of a digest that is not `missing`."""
        return self._index[digest][1]

    def read(self, digest: str) -> torch.Tensor:
        """Return the tensor of a digest that is not `missing`, mapped from its file."""
        path, key = self._index[digest]
        return self._open[path].get_tensor(key)

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a shard of `tensors`, by key; with a limit, make room for it first."""
        if self._max_bytes:
            self._make_room(sum(tensor.nbytes for tensor in tensors.values()))
        self._directory.mkdir(parents=True, exist_ok=True)
        aside = self._directory / f".{os.getpid()}.{secrets.token_hex(4)}.tmp"
        try:
            save_tensors(aside, tensors)
            path = self._directory / f"{file_digest(aside)[:24]}.safetensors"
            shard = _open_shard(aside)  # before others see it, and could delete it
            if shard is not None:
                self._open[path] = shard
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        _touch(path)
        self._listed[path] = [*tensors]
        self._index |= {key.split("@")[0]: (path, key) for key in tensors}

    def _list(self) -> None:
        """Look for shards of other processes, and index all shards."""
        for path in sorted({*self._directory.glob("*.safetensors")} - self._listed.keys()):
            shard = _open_shard(path)
            self._listed[path] = [] if shard is None else [*shard.keys()]
        self._index = {
            key.split("@")[0]: (path, key) for path, keys in self._listed.items() for key in keys
        }

    def _make_room(self, num_bytes: int) -> None:
        """Delete files in `root`, the oldest first, until `num_bytes` fit or the run uses the
        rest."""
        files = []
        for path in self._root.glob("*/*"):
            with suppress(FileNotFoundError):  # another process deletes too
                files.append((path.stat().st_mtime, path, path.stat().st_size))
        total = num_bytes + sum(size for _, _, size in files)
        for modified, path, size in sorted(files):
            if total > self._max_bytes and modified < RUN_STARTED_AT:
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


def _open_shard(path: Path, *, verify: bool = False) -> Shard | None:
    """Map a shard into memory, and `verify` its content unless this run has.

    Return None where the shard is gone, or is damaged; a damaged one is deleted.
    """
    try:
        if not path.is_file():
            return None
        shard: Shard = safe_open(path, framework="pt")
        if verify and path.stat().st_mtime != RUN_STARTED_AT:
            if file_digest(path)[:24] != path.stem:
                raise SafetensorError("its digest does not agree with its name")
            _touch(path)
        return shard
    except FileNotFoundError:
        return None
    except SafetensorError as error:
        logger.warning(
            "cached vision features %s are damaged (%s): deleted and made again", path, error
        )
        path.unlink(missing_ok=True)
        return None


def _touch(path: Path) -> None:
    """Note that a shard is verified, where its file may be changed; else others verify it too."""
    with suppress(OSError):  # another user's file, or a disk that is not written to
        os.utime(path, (RUN_STARTED_AT, RUN_STARTED_AT))
