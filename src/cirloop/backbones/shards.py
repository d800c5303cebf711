"""Tensors kept on disk in shards, safetensors files of many, shared by processes and held to a size.

A shard is written aside and renamed, so several processes may write at once and a killed one leaves nothing
half-written behind. Shards are read mapped into memory; one that is open stays readable when another process deletes
its file, one that is not is found gone and what it held is reported missing. A shard's time of change is the time of
its last use, kept to within a minute: the least recently used are deleted first.
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

from cirloop.artifacts import fingerprint, sync_directory
from cirloop.disk import save_tensors, sweep
from cirloop.types import UserError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
BEGAN = float(os.environ.setdefault("CIRLOOP_BEGAN", str(time.time())))
"""When this run began, in seconds; its child processes have it from the environment."""
TOUCH_EVERY = 60.0
"""Seconds after which the use of a shard is noted again."""
RECENT = 600.0
"""Seconds for which a shard that any process has used counts as needed."""


class Shards:
    """The shards in `root / name`. Keys are `digest@...`; a digest is what is asked for. `max_bytes` is of all of
    `root`, 0 = no limit; what was used since `began` stays also beyond it.
    """

    def __init__(self, root: Path, name: str, max_bytes: int = 0, began: float = BEGAN) -> None:
        self._root, self._directory, self._max_bytes, self._began = root, root / name, max_bytes, began
        self._index: dict[str, tuple[Path, str]] = {}
        self._known: set[Path] = set()
        self._open: dict[Path, Any] = {}
        self._noted: dict[Path, float] = {}
        self._told = False
        sweep(self._directory)
        self._refresh()

    def missing(self, digests: Collection[str]) -> list[str]:
        """Those of `digests` that no shard holds. The others can be read from now on, whoever deletes their files."""
        if any(digest not in self._index for digest in digests):
            self._refresh()  # another process may have made them meanwhile
        while True:
            used = dict.fromkeys(self._index[digest][0] for digest in digests if digest in self._index)
            gone = {path for path in used if not self._use(path)}
            if not gone:
                return [digest for digest in digests if digest not in self._index]
            logger.info("%d shards of vision features are gone; what is needed of them is made again", len(gone))
            self._known -= gone
            self._index = {digest: at for digest, at in self._index.items() if at[0] not in gone}
            self._refresh()

    def key(self, digest: str) -> str:
        return self._index[digest][1]

    def read(self, digest: str) -> torch.Tensor:
        """The tensor of a digest that is not `missing`, mapped from its file."""
        path, key = self._index[digest]
        tensor: torch.Tensor = self._open[path].get_tensor(key)
        return tensor

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """One shard of `tensors`, by key; with a limit, after room is made for it."""
        self._make_room(sum(tensor.nbytes for tensor in tensors.values()))
        self._directory.mkdir(parents=True, exist_ok=True)
        name = fingerprint(sorted(tensors))[:24]
        path = self._directory / f"{name}.safetensors"
        aside = self._directory / f".{name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        try:
            save_tensors(aside, tensors)
            sync_directory(aside)
            self._open[path] = _opened(aside)  # before others see it, and could delete it
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        self._known.add(path)
        self._noted[path] = time.time()
        self._index |= {key.split("@")[0]: (path, key) for key in tensors}

    def _refresh(self) -> None:
        for path in sorted({*self._directory.glob("*.safetensors")} - self._known):
            try:
                shard = _opened(path)
            except FileNotFoundError:  # deleted since it was listed
                continue
            self._known.add(path)
            for key in shard.keys():  # noqa: SIM118 - not a dict
                self._index.setdefault(key.split("@")[0], (path, key))

    def _use(self, path: Path) -> bool:
        """Open a shard, if it is still there, and note that it is used."""
        if path not in self._open:
            try:
                self._open[path] = _opened(path)
            except FileNotFoundError:
                return False
        now = time.time()
        if now - self._noted.get(path, 0) > TOUCH_EVERY:
            self._noted[path] = now
            if os.access(path, os.W_OK):  # others' shards, and read-only ones, are not ours to delete either
                with suppress(FileNotFoundError):
                    os.utime(path)
        return True

    def _make_room(self, num_bytes: int) -> None:
        if not self._max_bytes:
            return
        left = evict(self._root, self._max_bytes - num_bytes, self._began)
        if left + num_bytes > self._max_bytes and not self._told:
            self._told = True
            logger.warning(
                "the vision features in use take %.3g GB in %s, more than runtime.cache_gb %.3g; they stay",
                (left + num_bytes) / 1e9, self._root, self._max_bytes / 1e9,
            )  # fmt: skip


def _opened(path: Path) -> Any:
    """A shard mapped into memory. Raises FileNotFoundError, and UserError where it is damaged."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise UserError(
            f"cached vision features {path} are damaged ({error}). Delete the file; it is remade."
        ) from None


def evict(root: Path, max_bytes: int, began: float) -> int:
    """Delete shards under `root`, the least recently used first, until `max_bytes` are left or all that are left were
    used since `began` or lately. What killed processes left half-written counts as a shard. Returns the bytes left.
    """
    found = []
    for path in root.glob("*/*"):
        if path.suffix == ".safetensors" or path.name.startswith("."):
            with suppress(FileNotFoundError):  # another process deletes too
                stat = path.stat()
                found.append((stat.st_mtime, path, stat.st_size))
    left, keep_from = sum(size for _, _, size in found), min(began, time.time() - RECENT)
    deleted = 0
    for used, path, size in sorted(found):
        if left <= max_bytes or used >= keep_from:
            break
        try:
            path.unlink(missing_ok=True)
        except PermissionError:  # another user's
            continue
        left, deleted = left - size, deleted + 1
    if deleted:
        logger.info("deleted %d shards of vision features not used for longest; %.3g GB left", deleted, left / 1e9)
    return left
