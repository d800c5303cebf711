"""An export from checks to a finished directory: made aside, opened again and compared, then given
its name."""

from __future__ import annotations

import gc
import logging
import shutil
from pathlib import Path

from cirloop.artifacts.atomic import write_json, write_text
from cirloop.artifacts.fs import remove_tree_quietly, sync_directory, sync_tree, with_filename
from cirloop.tools.export import adapter, hub, merged, roundtrip, sentence_transformers
from cirloop.tools.export.card import card, code_of
from cirloop.tools.export.prompt_spec import PromptSpec, reading_of
from cirloop.tools.export.source import ADAPTER, SENTENCE_TRANSFORMERS, ExportSource, trained
from cirloop.types import UserError

logger = logging.getLogger(__name__)
EXPORT_INFO = "exported_model.json"
"""What an export is of; only a directory with it is ever replaced."""


def export(
    directory: Path,
    iteration: str,
    to: str,
    output: Path | None = None,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
    data_license: str | None = None,
) -> Path:
    """Return the directory that was made. Raises UserError, before anything is written, where that
    cannot be."""
    if output is not None and output.resolve() == Path.cwd():
        raise UserError(
            f"--output {output} is the directory you are in. Give one that can be made, such as"
            " ./exported."
        )
    if push_to_hub is not None:
        hub.check(push_to_hub)
    model = trained(directory, iteration, to)
    goal = output or directory / "export" / f"iter_{model.iteration}_{to}"
    aside, old = (goal.parent / f".{goal.name}.{what}" for what in ("tmp", "old"))
    if old.exists() and not goal.exists():  # one was killed between its two renames
        logger.warning("%s: the export that was being replaced is back", goal)
        old.replace(goal)
    _check_goal(goal, overwrite, to)
    where = push_to_hub or goal.name
    if aside.exists():  # of one that was killed
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    try:
        _make(model, to, aside, where, push_to_hub is not None, data_license)
        sync_tree(aside)
        _rename(aside, goal, old)
    finally:
        remove_tree_quietly(aside)
    logger.info("wrote %s", goal)
    if push_to_hub is not None:
        hub.push(goal, push_to_hub, private)
    return goal


def _check_goal(goal: Path, overwrite: bool, to: str) -> None:
    if not goal.exists() or (goal.is_dir() and not any(goal.iterdir())):
        return
    if not (goal / EXPORT_INFO).is_file():
        raise UserError(
            f"--output {goal} is there already and is no export (no {EXPORT_INFO}). Give another."
        )
    if not overwrite:
        raise UserError(
            f"{goal} is an export already. Replace it with --overwrite, or give another --output."
        )


def _make(
    model: ExportSource, to: str, aside: Path, where: str, pushed: bool, data_license: str | None
) -> None:
    """Write the files of an export, proven by the card's own code. The run's model is gone before
    the other is loaded."""
    backbone = model.settings.build(model.checkpoint.path)  # type: ignore[attr-defined]
    reading = reading_of(backbone)
    given = roundtrip.inputs(reading.signs)
    expected = roundtrip.vectors_of(backbone, given)
    fingerprint = backbone.fingerprint
    del backbone
    gc.collect()
    _write(model, to, reading, aside)
    code = code_of(model, to, reading, where, pushed)
    found = roundtrip.compared(code, str(aside), given, expected, model.settings.dtype)
    write_text(aside / "README.md", card(model, to, reading, where, pushed, found, data_license))
    said = {
        "schema": 1,
        "format": to,
        "iteration": model.iteration,
        "checkpoint": model.checkpoint.digest,
        "model": fingerprint,
        "largest_difference": found.largest,
    }
    write_json(aside / EXPORT_INFO, said)


def _write(model: ExportSource, to: str, reading: PromptSpec, directory: Path) -> None:
    if to == ADAPTER:
        adapter.write(model, directory)
    elif to == SENTENCE_TRANSFORMERS:
        sentence_transformers.write(model, reading, directory)
    else:
        merged.write(model, directory)
    reading.save(directory)


def _rename(aside: Path, goal: Path, old: Path) -> None:
    """Under its name; an export that had it goes only when the new one is whole and in its
    place."""
    if old.exists():  # of one that was killed before it was removed
        shutil.rmtree(old)
    with with_filename(goal):
        if goal.exists():
            goal.replace(old)
        try:
            aside.replace(goal)
        except OSError:
            if old.exists():
                old.replace(goal)
            raise
    sync_directory(goal.parent)
    remove_tree_quietly(old)
