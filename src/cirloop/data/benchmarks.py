"""Benchmarks by name: `cirr_val`, `fashioniq_val`, `fashioniq_val:dress`, `circo_test`."""

from __future__ import annotations

from pathlib import Path

from cirloop.data import circo, cirr, fashioniq
from cirloop.problems import Problems
from cirloop.types import Judged, UserError, benchmark_of

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
    benchmark = benchmark_of(name)
    split, _, category = name.removeprefix(f"{benchmark}_").partition(":")
    if benchmark == "cirr":
        return cirr.judged(directory, split, problems)
    if benchmark == "circo":
        return circo.judged(directory, split, problems)
    categories = (category,) if category else fashioniq.CATEGORIES
    return fashioniq.judged(directory, split, problems, categories, gallery)
