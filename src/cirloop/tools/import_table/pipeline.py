"""From a table to a directory: read, find the columns, find the images, split, write, tell."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from cirloop.data.folder import UNSUPPORTED, FolderScan, scan_folder
from cirloop.data.image_check import WORKERS, unreadable_images
from cirloop.data.names import find_copies
from cirloop.data.triplets import MAX_TEXT
from cirloop.monitoring.console import progress, table
from cirloop.tools.import_table import columns, write
from cirloop.tools.import_table import split as splitting
from cirloop.tools.import_table.columns import REFERENCE, TARGET, TEXT
from cirloop.tools.import_table.config import ImportConfig
from cirloop.tools.import_table.images import EXACT, ImageFinder
from cirloop.tools.import_table.split import Triple
from cirloop.tools.import_table.tables import Row, Table, read
from cirloop.types import ImageId, UserError
from cirloop.validation import ValidationReport, counted, group_by_cause

logger = logging.getLogger(__name__)
FEW = 30
"""References below which standard errors are too small (docs/datasets.md)."""
LISTS = "Lists are read from JSON, JSON lines and Parquet. Rename the column to leave it out."
WAY_OUT = (
    "Nothing was written. --skip_rows N leaves up to N rows out; docs/own-data.md has the rest."
)


@dataclass
class FolderImages:
    """The images of the folder, those that cannot be used, and how names were understood."""

    scan: FolderScan
    finder: ImageFinder
    unreadable: Mapping[ImageId, str]
    copy_of: Mapping[ImageId, ImageId]
    hows: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def find(self, name: str, role: str, row: Row, problems: ValidationReport) -> ImageId | None:
        """Return the image that a name stands for; None, with the problem reported, for none."""
        match = self.finder.find(name)
        if match.image is None:
            problems.add(row.where, f"{role} {name!r} {match.how}")
            return None
        if match.image in self.unreadable:
            wrong = self.unreadable[match.image]
            problems.add(row.where, f"{role} {match.image!r} {wrong}")
            return None
        self.hows[match.how] += 1
        example = repr(name) if match.how == EXACT else f"{name!r} is {match.image!r}"
        self.examples.setdefault(match.how, example)
        return match.image


def import_table(options: ImportConfig) -> None:
    """Write the directory and say what was done. Raises UserError with every problem."""
    problems = ValidationReport()
    write.check_output(options.output, options.images, problems)
    tables = _tables(options, problems)
    by_flag = {name: getattr(options, name) for name in (*columns.ROLES, "id", "category")}
    roles = [columns.roles_of(each, by_flag, problems) for each in tables]
    scan = _scan(options, problems)
    problems.raise_if_any()
    known = _look(options.images, scan)
    bad = ValidationReport(WAY_OUT)
    parts = [_triples(*pair, known, bad) for pair in zip(tables, roles, strict=True)]
    _refuse_bad(options, tables, parts, bad)
    splits = _splits(options, parts)
    copies = scan.files if options.copy_images else None
    write.write(options.output, splits, options.images, copies)
    _tell(options, list(zip(tables, roles, strict=True)), known, splits)


def _tables(options: ImportConfig, problems: ValidationReport) -> list[Table]:
    """Read the table, and that of val where there is one."""
    paths = [options.table]
    if _share(options.val) is None:
        paths.append(Path(options.val))
    tables = []
    for path in paths:
        try:
            tables.append(read(path, options.sheet, options.encoding, problems))
        except UserError as error:
            problems.merge(error, "the table" if path == options.table else "--val")
    return tables


def _share(val: str) -> float | None:
    """Return the share that --val gives; None where it names a file. Raises UserError for one out
    of bounds."""
    try:
        share = float(val)
    except ValueError:
        return None
    if not 0 < share < 1:
        raise UserError(f"--val {val}: the share of rows for evaluation is between 0 and 1, as 0.2")
    return share


def _scan(options: ImportConfig, problems: ValidationReport) -> FolderScan:
    """List the images of the folder, and warn of files that are none."""
    if not options.images.is_dir():
        problems.add(f"--images {options.images}", "there is no such directory")
        return FolderScan()
    scan = scan_folder(options.images, options.allow_symlinks, problems)
    unsupported = scan.skipped(UNSUPPORTED)
    if unsupported:
        logger.warning("passed over, since they are not read: %s. Convert them", unsupported)
    if not scan.files:
        others = scan.skipped() or "nothing"
        problems.add(f"--images {options.images}", f"holds no images, but {others}")
    return scan


def _look(folder: Path, scan: FolderScan) -> FolderImages:
    """Decode every image, and find those of equal bytes, which a run takes for one."""
    looked_at = partial(progress, title="look at images")
    unreadable = unreadable_images(scan.files, WORKERS, looked_at)
    return FolderImages(scan, ImageFinder(scan.files, folder), unreadable, find_copies(scan.files))


def _triples(
    source: Table, roles: Mapping[str, str], known: FolderImages, problems: ValidationReport
) -> list[Triple]:
    """Return the rows in which nothing is wrong."""
    if not source.rows:
        problems.add(source.path, "has no rows but the names of its columns")
    triples = []
    ids: set[object] = set()
    for row in source.rows:
        before = len(problems.rows)
        fields = {role: row.cells.get(column, "") for role, column in roles.items()}
        if "id" in fields and fields["id"] in ids:
            problems.add(row.where, f"the id {fields['id']!r} is there more than once")
        ids.add(fields.get("id"))
        triple = _triple(row, fields, known, problems)
        if triple is not None and len(problems.rows) == before:
            triples.append(triple)
    return triples


def _triple(
    row: Row, cells: Mapping[str, object], known: FolderImages, problems: ValidationReport
) -> Triple | None:
    """Return a row's line; report what is wrong with it."""
    fields = _texts(row, cells[TEXT], problems)
    images = {}
    for role in (REFERENCE, TARGET):
        name = cells[role]
        if not isinstance(name, str) or not name:
            kind = "is empty" if name in ("", []) else f"is no name of an image: {name!r:.60}"
            problems.add(row.where, f"{role} {kind}")
            continue
        image = known.find(name, role, row, problems)
        if image is not None:
            images[role] = image
    fields |= _optional(row, cells, known, problems)
    if len(images) < 2:
        return None
    groups = [known.copy_of.get(image, image) for image in images.values()]
    if groups[0] == groups[1]:
        problems.add(row.where, f"reference and target are the same image, {images[TARGET]!r}")
    return Triple(row.where, groups[0], {REFERENCE: images[REFERENCE], **fields, **images})


def _optional(
    row: Row, cells: Mapping[str, object], known: FolderImages, problems: ValidationReport
) -> dict[str, object]:
    """Return the lists of images, id and category of a row, as far as there are columns of them."""
    fields: dict[str, object] = {}
    for role in columns.LISTS:
        names = cells.get(role) or []
        if not isinstance(names, list):
            problems.add(row.where, f"{role} is no list: {names!r:.60}", LISTS)
        elif names:
            listed = [known.find(str(name), role, row, problems) for name in names]
            fields[role] = [image for image in listed if image is not None]
    for role in ("id", "category"):
        if role in cells:
            fields[role] = cells[role]
        if cells.get(role) == "":
            problems.add(row.where, f"{role} is empty")
    return fields


def _texts(row: Row, cell: object, problems: ValidationReport) -> dict[str, object]:
    """Return the text, or the list of texts, as a field."""
    texts = [text for text in (cell if isinstance(cell, list) else [cell]) if text]
    if not texts:
        problems.add(row.where, "text is empty")
    for text in texts:
        if not isinstance(text, str) or len(text) > MAX_TEXT:
            kind = "is no text" if not isinstance(text, str) else f"is longer than {MAX_TEXT:,}"
            problems.add(row.where, f"text {kind}: {text!r:.60}")
    return {"texts": texts} if len(texts) > 1 else {TEXT: texts[0] if texts else ""}


def _refuse_bad(
    options: ImportConfig,
    tables: Sequence[Table],
    parts: Sequence[Sequence[Triple]],
    bad: ValidationReport,
) -> None:
    """Raise ValidationFailed for more bad rows than may be left out, or where nothing is left."""
    num_bad = sum(len(each.rows) for each in tables) - sum(map(len, parts))
    if num_bad > options.skip_rows or not all(parts):
        bad.raise_if_any()
    for where, what in group_by_cause(bad.rows):
        logger.warning("left out, by --skip_rows %d: %s: %s", options.skip_rows, where, what)


def _splits(
    options: ImportConfig, parts: Sequence[Sequence[Triple]]
) -> dict[str, Sequence[Triple]]:
    share = _share(options.val)
    if share is None:
        return dict(zip(("train", "val"), parts, strict=True))
    train, val = splitting.split(parts[0], share, options.seed)
    return {"train": train, "val": val}


def _tell(
    options: ImportConfig,
    sources: Sequence[tuple[Table, Mapping[str, str]]],
    known: FolderImages,
    splits: Mapping[str, Sequence[Triple]],
) -> None:
    """Print what was read, how names were understood, what was written, and what comes next."""
    rows = []
    for source, roles in sources:
        rows.append((str(source.path), f"{source.form}, {counted(len(source.rows), 'row')}"))
        rows += [(role, f"column {column!r}") for role, column in roles.items()]
        others = [repr(name) for name in source.columns if name not in roles.values()]
        rows += [("not used", ", ".join(others))] if others else []
    table("Read", ("what", "from"), rows, numbers=False)
    names = [(how, num, known.examples[how]) for how, num in known.hows.most_common()]
    label = f"Names of images: {EXACT}, or what differs"
    table(label, ("how", "names", "such as"), names, numbers=False)
    references = {name: {row.group for row in part} for name, part in splits.items()}
    counts = [(name, len(part), len(references[name])) for name, part in splits.items()]
    table("Written", ("split", "rows", "references"), counts)
    if len(references["val"]) < FEW:
        logger.warning(
            "val has %s: with fewer than %d a difference between models says little",
            counted(len(references["val"]), "reference"),
            FEW,
        )
    shared = references["train"] & references["val"]
    if shared:
        logger.warning(
            "%s of val are references of train too, such as %r: val then says less. --val 0.2 in"
            " place of a file splits by reference",
            counted(len(shared), "reference"),
            min(shared),
        )
    _tell_images(options, known)
    output = options.output
    logger.info("wrote %s", output)
    logger.info("a first try, in minutes: cirloop train --config jsonl_tiny --data_dir %s", output)
    logger.info(
        "settings for a GPU of 24 GB: cirloop init --data_dir %s --gpu_memory 24 --output %s.yaml",
        output,
        output,
    )


def _tell_images(options: ImportConfig, known: FolderImages) -> None:
    """Log where the images are, and which of them a run will refuse."""
    num = counted(len(known.scan.files), "image")
    if options.copy_images:
        logger.info("%s copied to %s", num, options.output / write.IMAGES)
    else:
        place = options.images.resolve()
        logger.info("%s stay in %s, linked: keep them there", num, place)
    if known.unreadable:
        image, wrong = min(known.unreadable.items())
        logger.warning(
            "%s of the gallery cannot be used, such as %r, which %s. A run refuses them: mend or"
            " remove them, or give it --allow_missing_images %d",
            counted(len(known.unreadable), "image"),
            image,
            wrong,
            len(known.unreadable),
        )
    if options.allow_symlinks and not options.copy_images:
        logger.info("a run needs --allow_symlinks too")
