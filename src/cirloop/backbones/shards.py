"""Tensors kept on disk in shards, safetensors files of many, shared by processes and held to a size.

A shard is written aside and renamed, so several processes may write at once and a killed one leaves nothing
half-written behind. Shards are read mapped into memory; one that is open stays readable when another process deletes
its file, one that is not is found gone and what it held is reported missing. A shard's time of change is the time of
its last use, kept to within a minute: the least recently used are deleted first.

A shard is named by its keys, and its metadata hold a checksum of every tensor (CRC-32, against what disks and copies do
to files), which a process compares when it first reads the tensor.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import stat
import time
import zlib
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from cirloop.artifacts import fingerprint
from cirloop.disk import save_tensors, sweep, sync_directory
from cirloop.types import UserError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
BEGAN = float(os.environ.setdefault("CIRLOOP_BEGAN", str(time.time())))
"""When this run began, in seconds; its child processes have it from the environment."""
TOUCH_EVERY = 60.0
"""Seconds after which the use of a shard is noted again."""
SUMS = "crc32"
"""The entry of a shard's metadata that holds the checksums, as JSON by key."""
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
        self._sums: dict[Path, dict[str, str]] = {}
        self._proven: set[str] = set()
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
        """The tensor of a digest that is not `missing`, mapped from its file. Raises UserError where it was altered."""
        path, key = self._index[digest]
        tensor: torch.Tensor = self._open[path].get_tensor(key)
        if key not in self._proven:
            if self._sums[path].get(key) != checksum(key, tensor):
                raise _damaged(path, f"the checksum of {key} does not agree")
            self._proven.add(key)
        return tensor

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """One shard of `tensors`, by key; with a limit, after room is made for it."""
        self._make_room(sum(tensor.nbytes for tensor in tensors.values()))
        self._directory.mkdir(parents=True, exist_ok=True)
        name = _name(tensors)
        path = self._directory / f"{name}.safetensors"
        aside = self._directory / f".{name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        try:
            sums = {key: checksum(key, tensor) for key, tensor in sorted(tensors.items())}
            save_tensors(aside, tensors, {SUMS: json.dumps(sums)})  # one entry: several come in any order
            sync_directory(aside)
            self._take(path, _opened(aside))  # before others see it, and could delete it
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        self._known.add(path)
        self._noted[path] = time.time()
        self._index |= {key.split("@")[0]: (path, key) for key in tensors}

    def _refresh(self) -> None:
        old = 0
        for path in sorted({*self._directory.glob("*.safetensors")} - self._known):
            try:
                shard = _opened(path)
            except FileNotFoundError:  # deleted since it was listed
                continue
            self._known.add(path)
            if shard.metadata() is None:
                old += 1
                continue
            keys = _checksums(path, shard)
            self._index |= {key.split("@")[0]: (path, key) for key in keys if key.split("@")[0] not in self._index}
        if old:
            logger.warning(
                "%d shards in %s are of an older cirloop and have no checksums: not used, made again. Delete them.",
                old, self._directory,
            )  # fmt: skip

    def _use(self, path: Path) -> bool:
        """Open a shard, if it is still there, and note that it is used."""
        if path not in self._open:
            try:
                self._take(path, _opened(path))
            except FileNotFoundError:
                return False
        now = time.time()
        if now - self._noted.get(path, 0) > TOUCH_EVERY:
            self._noted[path] = now
            if os.access(path, os.W_OK):  # others' shards, and read-only ones, are not ours to delete either
                with suppress(FileNotFoundError):
                    os.utime(path)
        return True

    def _take(self, path: Path, shard: Any) -> None:
        self._open[path], self._sums[path] = shard, _checksums(path, shard)

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
        if not stat.S_ISREG(path.stat().st_mode):
            raise _damaged(path, "it is no regular file")
        path.open("rb").close()  # safetensors takes whatever it may not open for gone
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise _damaged(path, str(error)) from None


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"cached vision features {path} are damaged ({why}). Delete the file; it is remade.")


def _name(keys: Collection[str]) -> str:
    return fingerprint(sorted(keys))[:24]


def _checksums(path: Path, shard: Any) -> dict[str, str]:
    """Of a shard's tensors by key. Raises UserError where its name or its metadata are of other keys."""
    keys = list(shard.keys())
    try:
        sums = json.loads((shard.metadata() or {})[SUMS])
        if path.stem == _name(keys) and sums.keys() == {*keys}:
            return dict(sums)
    except (KeyError, ValueError, AttributeError) as error:
        raise _damaged(path, f"its checksums cannot be read: {error!r}") from None
    raise _damaged(path, "its name or its checksums are of other keys")


def checksum(key: str, tensor: torch.Tensor) -> str:
    """Of a tensor's key, type, shape and bytes."""
    import torch

    began = zlib.crc32(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
    content: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{zlib.crc32(content, began):08x}"


def evict(root: Path, max_bytes: int, began: float) -> int:
    """Delete shards under `root`, the least recently used first, until `max_bytes` are left or all that are left were
    used since `began` or lately. What killed processes left half-written counts as a shard. Returns the bytes left.
    """
    found = []
    for path in root.glob("*/*"):
        if path.suffix == ".safetensors" or path.name.startswith("."):
            with suppress(FileNotFoundError):  # another process deletes too
                seen = path.stat()
                found.append((seen.st_mtime, path, seen.st_size))
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
