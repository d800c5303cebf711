"""CIRR (Liu et al., ICCV 2021, arXiv 2108.04024), annotations `rc2`, in its official layout.

captions/cap.rc2.<split>.json and image_splits/split.rc2.<split>.json (image name -> path). The
gallery of a split is all its images. An entry: pairid, reference, caption, target_hard (test1:
none), img_set.members (six, with the reference). A caption may be blank, as that of pairid 27098 of
test1 is.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

from cirloop.data.images import escapes_root
from cirloop.data.splits import FileSettings, QueryFiles, warn_blank_texts
from cirloop.types import (
    EvalProtocol,
    Gallery,
    ImageId,
    LabeledQueries,
    Query,
    QueryId,
    Relevance,
)
from cirloop.validation import Entry, ValidationReport

SPLITS = {"train": "train", "val": "val", "test": "test1"}
OFFICIAL = {"train": (28225, 16939), "val": (4181, 2297), "test": (4148, 2315)}
"""Queries and images."""
PROTOCOL = EvalProtocol(
    "CIRR: gallery of the split's images, reference removed, target_hard; subset: five group"
    " members",
    primary_metric="recall@1",
    reported=("recall@1", "recall@5", "recall@10", "recall@50", "recall_subset@1"),
)


class CirrSettings(FileSettings):
    """CIRR in its official layout."""

    type: Literal["cirr"] = "cirr"
    protocol: ClassVar[EvalProtocol] = PROTOCOL

    def read(self, directory: Path, split: str) -> tuple[QueryFiles, ValidationReport]:
        """Read train, val or test1, with images at the paths of the split files, under `img_raw/`
        or beside it."""
        problems = ValidationReport(
            f"Put CIRR's annotations (rc2) under --data_dir {directory}; docs/datasets.md has the"
            " layout."
        )
        raw = directory / "img_raw"
        image_root = raw if raw.is_dir() else directory
        names = image_files(directory, split, ValidationReport())
        files = {image: image_root / path for image, path in names.items()}
        return [(part, files) for part in load_queries(directory, split, problems)], problems


def image_files(directory: Path, split: str, problems: ValidationReport) -> dict[ImageId, str]:
    """Read the paths of the split's images, relative to the image folder, by name."""
    path = directory / "image_splits" / f"split.rc2.{SPLITS[split]}.json"
    content = problems.json(path)
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
        problems.add(path, "must be an object of image name -> path")
        return {}
    if not content:
        problems.add(path, "holds no images")
    for name, file in content.items():
        if escapes_root(file):
            problems.add(path, f"the path of {name!r} leads out of the image folder: {file!r}")
    return {ImageId(name): file for name, file in content.items() if not escapes_root(file)}


def load_queries(directory: Path, split: str, problems: ValidationReport) -> list[LabeledQueries]:
    """Read the queries, targets and groups of `split`; what is wrong is added to `problems`."""
    images = image_files(directory, split, problems)
    path = directory / "captions" / f"cap.rc2.{SPLITS[split]}.json"
    queries: dict[QueryId, Query] = {}
    targets: dict[QueryId, ImageId] = {}
    groups: dict[QueryId, tuple[ImageId, ...]] = {}
    blanks: list[str] = []
    for where, entry in problems.entries(path):
        pair = entry.get("pairid", int)
        reference = entry.get("reference", str)
        text = entry.get("caption", str, blank=True)
        target = entry.get("target_hard", str, optional=split == "test")
        members = _members(entry, problems)
        roles = {"reference": reference, "target_hard": target}
        _check_names(entry, roles, members, images, split, problems)
        if pair is None or reference is None or text is None:
            continue
        query = QueryId(str(pair))
        if query in queries:
            problems.add(where, f"pairid {pair} is there more than once")
        queries[query] = Query(query, ImageId(reference), text)
        blanks += [] if text.strip() else [f"pairid {pair}"]
        groups[query] = tuple(ImageId(m) for m in members if m != reference)
        if target is not None:
            targets[query] = ImageId(target)
    if targets and len(targets) < len(queries):
        problems.add(
            path, f"{len(queries) - len(targets)} of {len(queries)} entries have no target"
        )
    warn_blank_texts(path, blanks)
    labeled = LabeledQueries(
        f"cirr_{split}",
        tuple(queries.values()),
        Relevance(targets) if targets else None,
        Gallery(f"cirr/{split}", tuple(sorted(images))),
        PROTOCOL,
        groups=groups,
        official=OFFICIAL[split],
    )
    return [labeled]


def _check_names(
    entry: Entry,
    roles: Mapping[str, str | None],
    members: Sequence[str],
    images: Container[str],
    split: str,
    problems: ValidationReport,
) -> None:
    """Report images that are not of the split, or not of the query's group."""
    for role, image in (*roles.items(), *(("member", member) for member in members)):
        if image is not None and images and image not in images:
            problems.add(entry.where, f"{role} {image!r} is not in split.rc2.{SPLITS[split]}.json")
    for role, image in roles.items():
        if members and image is not None and image not in members:
            problems.add(entry.where, f"{role} {image!r} is not among img_set's members")
    target = roles["target_hard"]
    if target is not None and target == roles["reference"]:
        problems.add(entry.where, f"reference and target are the same image, {target!r}")


def _members(entry: Entry, problems: ValidationReport) -> list[str]:
    group = entry.get("img_set", dict)
    if group is None:
        return []
    members = Entry(group, f"{entry.where} img_set", problems).list_of("members", str) or []
    if members and len(set(members)) != 6:
        problems.add(
            entry.where, f"img_set must have six different members, found {len(set(members))}"
        )
    return members
