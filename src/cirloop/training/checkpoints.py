"""Step checkpoints of a training stage: one complete directory, or none.

The checkpoint before is kept until the new one is complete.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cirloop.artifacts import schema
from cirloop.artifacts.atomic import write_checked
from cirloop.artifacts.fs import save_tensors, sync_directory, sync_tree
from cirloop.artifacts.store import file_digest
from cirloop.training.log import Row
from cirloop.types import UserError

logger = logging.getLogger(__name__)
STATE = "state.safetensors"
RECORD = "state.json"


class StepCheckpoints:
    """The step checkpoints in `directory`; `key` identifies all that decides the stage's result."""

    def __init__(self, directory: Path, key: str) -> None:
        self._directory = directory
        self._key = key

    def write(self, step: int, state: dict[str, Tensor], log: list[Row]) -> None:
        """Keep `state` and `log` after `step` steps, and then no others."""
        path = self._directory / f"step_{step:06d}"
        aside = self._directory / "new"
        _remove(aside)
        aside.mkdir(parents=True)
        save_tensors(aside / STATE, state)
        record = {"key": self._key, "step": step, "tensors": file_digest(aside / STATE), "log": log}
        write_checked(aside / RECORD, "state", record)
        sync_tree(aside)
        _remove(path)  # an incomplete one: from a complete one, training would have resumed
        aside.replace(path)
        sync_directory(self._directory)
        for old in set(self._all()) - {path}:
            old.replace(aside)  # in one move, so that no half of it is taken for a checkpoint
            _remove(aside)

    def newest(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Return the record and state to resume from; None = from the start.

        A directory without one of its files is the rest of an interrupted removal, and is skipped.
        Raises UserError, with the file named, where one is damaged or of another stage.
        """
        for path in reversed(self._all()):
            if not all(os.path.lexists(path / name) for name in (RECORD, STATE)):
                logger.warning("%s is not whole and is passed over", path)
                continue
            record = schema.read(path / RECORD)
            if record.get("key") != self._key:
                raise UserError(
                    f"{path} is of a training stage with other settings or inputs. Delete it to"
                    " train from the start."
                )
            return record, _read_tensors(path / STATE, record.get("tensors"))
        return None

    def _all(self) -> list[Path]:
        return sorted(self._directory.glob("step_*"))


def _read_tensors(path: Path, digest: object) -> dict[str, Tensor]:
    """Read a state file. Raises UserError where it is not the one with `digest`."""
    try:
        if not path.is_file() or file_digest(path) != digest:
            raise UserError(f"{path} is altered. Delete {path.parent} to train from the start.")
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read ({error}). Delete {path.parent} to train from the start."
        ) from None


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
