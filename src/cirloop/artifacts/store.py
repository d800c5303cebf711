"""The store of a run: build an artifact once, load it afterwards.

An artifact is a file or directory of a run directory. It is finished when the manifest lists it and
its bytes agree. The fingerprint covers the stage's settings and the content digests of its inputs,
never paths or times. An artifact is written to a scratch directory, synced and renamed, and the
manifest entry is written last: killed at any moment, a run directory holds whole artifacts only.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cirloop.artifacts import schema
from cirloop.artifacts.atomic import write_text
from cirloop.artifacts.fs import (
    remove_tree_quietly,
    sync_directory,
    sync_tree,
)
from cirloop.types import UserError

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
SCRATCH = ".work"
READER_SCRATCH = ".reading"
"""As `WORK`, of those who only read: a run clears its own away when it is done."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """A finished artifact. `digest` identifies its content."""

    name: str
    path: Path
    digest: str
    made_now: bool = False

    def read(self) -> dict[str, Any]:
        """Read the artifact's content. Raises UserError as `schema.read` does."""
        return schema.read(self.path, schema.kind_of(self.name))


def fingerprint(value: object) -> str:
    """Return the SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digests(path: Path) -> dict[str, str]:
    """Return the digest of each file, by its path relative to `path` ("." for a single file)."""
    if path.is_file():
        return {".": file_digest(path)}
    return {
        p.relative_to(path).as_posix(): file_digest(p)
        for p in sorted(path.rglob("*"))
        if p.is_file()
    }


def _readable_digests(path: Path) -> dict[str, str]:
    """Return `file_digests` of the files that can be read; for one that cannot, the reason."""
    out = {}
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        name = "." if file == path else file.relative_to(path).as_posix()
        try:
            out[name] = file_digest(file)
        except OSError as error:
            out[name] = f"cannot be read: {error.strerror}"
    return out


class Store:
    """The artifacts of one run directory."""

    def __init__(self, directory: Path, reading: bool = False) -> None:
        """Open the store of a run directory.

        With `reading`, the store changes nothing: another process may be at work on the run.
        """
        self.directory = directory
        self._work = READER_SCRATCH if reading else SCRATCH
        self._manifest = self._read_manifest()
        if not reading:
            self._finish_moves()

    def _read_manifest(self) -> dict[str, Any]:
        path = self.directory / MANIFEST
        if not path.exists():
            artifacts = [
                p.name
                for name in ("*_iter_*", "evaluation_base.json")
                for p in self.directory.glob(name)
            ]
            if artifacts:
                raise UserError(
                    f"{path} is missing, which says what of {', '.join(sorted(artifacts)[:3])} is"
                    " finished. Restore it from a backup, start anew in another --experiment_dir,"
                    " or delete those to make them again."
                )
            return {"artifacts": {}}
        return schema.read(path)

    def _write_manifest(self) -> None:
        content = {name: value for name, value in self._manifest.items() if name != "schema"}
        text = json.dumps(schema.with_checksum("manifest", content), indent=1, sort_keys=True)
        write_text(self.directory / MANIFEST, text + "\n")

    def initialize(self, run: str, settings: Path) -> None:
        """Bind the directory to a run and write the manifest before the first artifact.

        From then on a manifest that does not exist is missing.
        """
        self.bind_to_run(run, settings)
        self._write_manifest()

    def bind_to_run(self, run: str, settings: Path) -> None:
        """Record which run this directory belongs to.

        Raises UserError where the manifest belongs to another run than `settings`.
        """
        if self._manifest.setdefault("run", run) != run:
            raise UserError(
                f"{settings} is of another run than {self.directory / MANIFEST}. Restore that which"
                " is not its own."
            )

    @property
    def names(self) -> list[str]:
        return list(self._manifest["artifacts"])

    def iteration_of(self, name: str) -> int | None:
        number: int | None = self._manifest["artifacts"][name]["iteration"]
        return number

    def scratch_dir(self, name: str) -> Path:
        """Return where a stage keeps what it needs while it works, such as step checkpoints.

        The directory is removed when the stage is done.
        """
        return self.directory / self._work / name

    def load(self, name: str) -> Artifact:
        """Load a finished artifact and verify its bytes. Raises UserError where it is unknown or
        damaged."""
        entry = self._manifest["artifacts"].get(name)
        if entry is None:
            names = ", ".join(sorted(self.names)) or "none"
            raise UserError(f"{self.directory} has no artifact {name!r}; it has: {names}.")
        path = self.directory / name
        damaged = []
        digests = _readable_digests(path)
        for file in sorted({*entry["files"], *digests}):
            if digests.get(file) != entry["files"].get(file):
                absent = "missing" if file not in digests else "not part of it"
                state = "altered" if file in digests and file in entry["files"] else absent
                state = digests[file] if " " in digests.get(file, "") else state
                damaged.append(f"{path if file == '.' else path / file} ({state})")
        if damaged:
            again = f"--resume_from_iteration {entry['iteration'] or 0}"
            raise UserError(
                "artifact does not agree with the manifest:\n  "
                + "\n  ".join(damaged)
                + f"\nRestore it from a backup, or remake it and what follows from it with {again}."
            )
        return Artifact(name, path, fingerprint(entry["files"]))

    def get_or_build(
        self,
        name: str,
        settings: object,
        inputs: Iterable[str],
        build: Callable[[Path], None],
        iteration: int | None = None,
    ) -> Artifact:
        """Return the artifact `name`: the finished one if its fingerprint agrees, else what
        `build(path)` writes.

        `settings` is JSON that decides the result, `inputs` the content digests that the artifact
        is made from. Raises UserError where the finished one was made with other settings or
        inputs.
        """
        key = fingerprint({"name": name, "settings": settings, "inputs": list(inputs)})
        entry = self._manifest["artifacts"].get(name)
        if entry is not None:
            if entry["fingerprint"] != key:
                raise UserError(
                    f"{self.directory / name} was made with other settings or from other inputs"
                    " than this run has now. Remake it with --resume_from_iteration"
                    f" {entry['iteration'] or 0}, or use another --experiment_dir."
                )
            return self.load(name)
        path = self.directory / name
        aside = self.directory / SCRATCH / "new" / name
        for stale in (path, aside):  # an unfinished or unlisted one, made by a run that was stopped
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink(missing_ok=True)
        aside.parent.mkdir(parents=True, exist_ok=True)
        build(aside)
        sync_tree(aside)
        files = file_digests(aside)
        aside.replace(path)
        sync_directory(self.directory)
        self._manifest["artifacts"][name] = {
            "fingerprint": key,
            "iteration": iteration,
            "files": files,
        }
        self._write_manifest()
        remove_tree_quietly(self.scratch_dir(name))
        return Artifact(name, path, fingerprint(files), made_now=True)

    def remove_scratch(self) -> None:
        """Remove every scratch directory, once all artifacts are finished."""
        remove_tree_quietly(self.directory / SCRATCH)

    def archive_from(self, from_iteration: int, also: Iterable[str] = ()) -> Path | None:
        """Move the artifacts of `from_iteration` and later to `replaced_<n>/`, and return that
        directory.

        Returns None if there are none. An artifact of no iteration (the base model's evaluation) is
        moved with iteration 0.
        """
        entries = self._manifest["artifacts"]
        names = [n for n, e in entries.items() if (e["iteration"] or 0) >= from_iteration]
        files = [n for n in also if (self.directory / n).exists()]
        if not names:
            return None
        matches = [
            re.fullmatch(r"replaced_(\d+)", p.name) for p in self.directory.glob("replaced_*")
        ]
        number = 1 + max((int(match[1]) for match in matches if match), default=0)
        self._manifest["moving"] = {"to": f"replaced_{number}", "names": [*names, *files]}
        for name in names:
            del entries[name]
        self._write_manifest()
        self._finish_moves()
        return self.directory / f"replaced_{number}"

    def _finish_moves(self) -> None:
        moving = self._manifest.get("moving")
        if moving is None:
            return
        goal = self.directory / moving["to"]
        goal.mkdir(exist_ok=True)
        for name in moving["names"]:
            if (self.directory / name).exists() and not (goal / name).exists():
                (self.directory / name).replace(goal / name)
        if (self.directory / SCRATCH).exists():  # step checkpoints of what was moved
            shutil.rmtree(self.directory / SCRATCH)
        del self._manifest["moving"]
        self._write_manifest()
