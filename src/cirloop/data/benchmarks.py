"""Benchmarks by name: `cirr_val`, `fashioniq_val`, `fashioniq_val:dress`, `circo_test`."""

from __future__ import annotations

from pathlib import Path

from cirloop.data import circo, cirr, fashioniq
from cirloop.problems import Problems
from cirloop.types import Judged, UserError

SPLITS = {"cirr": ("val", "test"), "fashioniq": ("val", "test"), "circo": ("val", "test")}


def names() -> list[str]:
    """Every name that `judged` knows."""
    plain = [f"{benchmark}_{split}" for benchmark, splits in SPLITS.items() for split in splits]
    return plain + [f"fashioniq_{s}:{category}" for s in SPLITS["fashioniq"] for category in fashioniq.CATEGORIES]


def judged(name: str, directory: Path, gallery: fashioniq.GalleryKind, problems: Problems) -> list[Judged]:
    """The parts of a benchmark's split. Raises UserError for an unknown name; adds what is wrong to `problems`."""
    if name not in names():
        raise UserError(f"--eval_dataset {name}: unknown. There are: {', '.join(names())}.")
    if not directory.is_dir():
        raise UserError(f"--data_dir {directory}: there is no such directory.")
    benchmark, _, rest = name.partition("_")
    split, _, category = rest.partition(":")
    if benchmark == "cirr":
        return cirr.judged(directory, split, problems)
    if benchmark == "circo":
        return circo.judged(directory, split, problems)
    categories = (category,) if category else fashioniq.CATEGORIES
    return fashioniq.judged(directory, split, problems, categories, gallery)


def unofficial(part: Judged) -> str:
    """How a part's counts differ from the benchmark's; empty where they do not, or where none are known."""
    benchmark, _, split = part.name.partition("_")
    official: tuple[int, int] | None = None
    if benchmark in ("cirr", "circo"):
        official = {"cirr": cirr.OFFICIAL, "circo": circo.OFFICIAL}[benchmark][split]
    elif benchmark == "fashioniq" and split == "val" and part.gallery is not None:
        queries, original, union = fashioniq.OFFICIAL[part.category]
        official = (queries, union if part.gallery.name.endswith("/union") else original)
    if official is None:
        return ""
    images = len(part.gallery.ids) if part.gallery else official[1]
    if (len(part.queries), images) == official:
        return ""
    name = f"{part.name} {part.category}".rstrip()
    return (
        f"{name} has {len(part.queries):,} queries and {images:,} images, officially {official[0]:,} and "
        f"{official[1]:,}: its numbers are not comparable with published ones"
    )
