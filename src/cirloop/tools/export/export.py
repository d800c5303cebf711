"""An export from checks to a finished directory: made aside, opened again and compared, then given
its name."""

from __future__ import annotations

import gc
import logging
import shutil
from pathlib import Path
from typing import Any

from cirloop.artifacts.atomic import write_json, write_text
from cirloop.artifacts.fs import remove_tree_quietly, sync_directory, sync_tree, with_filename
from cirloop.tools.export import hub, roundtrip
from cirloop.tools.export.card import card, code_of
from cirloop.tools.export.config import ExportConfig
from cirloop.tools.export.formats import write_files
from cirloop.tools.export.prompt_spec import read_prompt_spec
from cirloop.tools.export.source import ExportSource, load_source
from cirloop.types import UserError

logger = logging.getLogger(__name__)
EXPORT_INFO = "exported_model.json"
"""What an export is of; only a directory with it is ever replaced."""


def export(options: ExportConfig) -> Path:
    """Return the directory that was made. Raises UserError, before anything is written, where that
    cannot be."""
    if options.output is not None and options.output.resolve() == Path.cwd():
        raise UserError(
            f"--output {options.output} is the directory you are in. Give one that can be made,"
            " such as ./exported."
        )
    if options.push_to_hub is not None:
        hub.check(options.push_to_hub)
    source = load_source(options)
    target_dir = source.target_dir
    staging_dir, replaced_dir = (
        target_dir.with_name(f".{target_dir.name}.{suffix}") for suffix in ("tmp", "old")
    )
    if replaced_dir.exists() and not target_dir.exists():  # one was killed between its two renames
        logger.warning("%s: the export that was being replaced is back", target_dir)
        replaced_dir.replace(target_dir)
    _check_target_dir(target_dir, overwrite=options.overwrite)
    if staging_dir.exists():  # of one that was killed
        shutil.rmtree(staging_dir)
    staging_dir.mkdir(parents=True)
    try:
        write_export(source, staging_dir)
        sync_tree(staging_dir)
        _rename(staging_dir, target_dir, replaced_dir)
    finally:
        remove_tree_quietly(staging_dir)
    logger.info("wrote %s", target_dir)
    if options.push_to_hub is not None:
        hub.push(target_dir, options.push_to_hub, options.private)
    return target_dir


def _check_target_dir(target_dir: Path, *, overwrite: bool) -> None:
    if not target_dir.exists() or (target_dir.is_dir() and not any(target_dir.iterdir())):
        return
    if not (target_dir / EXPORT_INFO).is_file():
        raise UserError(
            f"--output {target_dir} is there already and is no export (no {EXPORT_INFO}). Give"
            " another."
        )
    if not overwrite:
        raise UserError(
            f"{target_dir} is an export already. Replace it with --overwrite, or give another"
            " --output."
        )


def write_export(source: ExportSource, directory: Path) -> None:
    """Write the files of an export, proven by the card's own code. The run's model is gone before
    the other is loaded."""
    backbone: Any = source.settings.build(source.checkpoint.path)
    prompt_spec = read_prompt_spec(backbone)
    inputs = roundtrip.inputs(prompt_spec.special_tokens)
    expected = roundtrip.vectors_of(backbone, inputs)
    fingerprint = backbone.fingerprint
    del backbone
    gc.collect()
    write_files(source, prompt_spec, directory)
    difference = roundtrip.compare(
        code_of(source, prompt_spec), str(directory), inputs, expected, source.settings.dtype
    )
    write_text(directory / "README.md", card(source, prompt_spec, difference))
    info = {
        "schema": 1,
        "format": source.options.format,
        "iteration": source.iteration,
        "checkpoint": source.checkpoint.digest,
        "model": fingerprint,
        "largest_difference": difference.largest,
    }
    write_json(directory / EXPORT_INFO, info)


def _rename(staging_dir: Path, target_dir: Path, replaced_dir: Path) -> None:
    """Give the export its name; an export that had it goes only when the new one is whole and in
    its place."""
    if replaced_dir.exists():  # of one that was killed before it was removed
        shutil.rmtree(replaced_dir)
    with with_filename(target_dir):
        if target_dir.exists():
            target_dir.replace(replaced_dir)
        try:
            staging_dir.replace(target_dir)
        except OSError:
            if replaced_dir.exists():
                replaced_dir.replace(target_dir)
            raise
    sync_directory(target_dir.parent)
    remove_tree_quietly(replaced_dir)
