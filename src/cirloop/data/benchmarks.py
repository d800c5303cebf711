"""Benchmarks by name: `cirr_val`, `fashioniq_val`, `fashioniq_val:dress`, `circo_test`."""

from __future__ import annotations

from pathlib import Path

from cirloop.data import circo, cirr, fashioniq
from cirloop.data.circo import CircoSettings
from cirloop.data.cirr import CirrSettings
from cirloop.data.config import DataConfig
from cirloop.data.fashioniq import FashionIQSettings
from cirloop.data.grocery.load import GrocerySettings
from cirloop.data.hp_fashioniq import HpFashionIQSettings
from cirloop.data.shapes.load import ShapesSettings
from cirloop.types import LabeledQueries, UserError, benchmark_of
from cirloop.validation import ValidationReport

SPLITS = ("val", "test")
QUERY_LOADERS = {"cirr": cirr.load_queries, "circo": circo.load_queries}
"""Besides FashionIQ, the benchmarks whose annotations are enough to score a file of rankings."""


def benchmark_names() -> list[str]:
    """List every name that `load_queries` accepts."""
    plain = [
        f"{benchmark}_{split}" for benchmark in ("cirr", "fashioniq", "circo") for split in SPLITS
    ]
    return plain + [
        f"fashioniq_{split}:{category}" for split in SPLITS for category in fashioniq.CATEGORIES
    ]


def settings_for_benchmark(
    name: str, gallery: fashioniq.GalleryKind, allow_missing_images: int = 0
) -> tuple[DataConfig, str] | None:
    """Return settings and split of an evaluation name such as `cirr_val` or
    `fashioniq_val:dress`; None for no such name."""
    benchmark, split, categories = _parts(name)
    allow = allow_missing_images
    settings: dict[str, DataConfig] = {
        "cirr": CirrSettings(allow_missing_images=allow),
        "circo": CircoSettings(allow_missing_images=allow),
        "hp_fashioniq": HpFashionIQSettings(allow_missing_images=allow),
        "fashioniq": FashionIQSettings(
            categories=categories, gallery=gallery, allow_missing_images=allow
        ),
        "grocery": GrocerySettings(allow_missing_images=allow),
        "shapes": ShapesSettings(),
    }
    if split not in SPLITS or benchmark not in settings or not categories:
        return None
    if ":" in name and benchmark != "fashioniq":
        return None
    return settings[benchmark], split


def load_queries(
    name: str, directory: Path, gallery: fashioniq.GalleryKind, problems: ValidationReport
) -> list[LabeledQueries]:
    """Read the queries of a benchmark's split by category. Raises UserError for an unknown name;
    what is wrong is added to `problems`."""
    if name not in benchmark_names():
        raise UserError(
            f"--eval_dataset {name}: unknown. There are: {', '.join(benchmark_names())}."
        )
    if not directory.is_dir():
        raise UserError(f"--data_dir {directory}: there is no such directory.")
    benchmark, split, categories = _parts(name)
    if benchmark in QUERY_LOADERS:
        return QUERY_LOADERS[benchmark](directory, split, problems)
    return fashioniq.load_queries(directory, split, problems, categories, gallery)


def _parts(name: str) -> tuple[str, str, tuple[fashioniq.Category, ...]]:
    """Split a name into benchmark, split, and FashionIQ's categories: the one named, or all."""
    benchmark = benchmark_of(name)
    split, _, category = name.removeprefix(f"{benchmark}_").partition(":")
    return benchmark, split, tuple(c for c in fashioniq.CATEGORIES if category in ("", c))
