"""What galleries of 1 M, 10 M and 1 B images need, from measured seconds: the table of
docs/scaling.md, in Markdown.

Bytes are exact arithmetic. Times are the measured ones multiplied: those per item by the number of
items, those of mining by (G / G0)^b and Q / Q0, where `benchmarks/mine_a_million.py` gives the
seconds at G0 images for Q0 queries and the exponent b. `benchmarks/cost_per_item.py` prints the
flags for seconds per item. What is not given is left out.

    python benchmarks/scaling_table.py --dimensions 1536
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

SIZES = (1_000_000, 10_000_000, 1_000_000_000)
NAMES = {1_000_000: "1 M", 10_000_000: "10 M", 1_000_000_000: "1 B"}


@dataclass(frozen=True)
class Measured:
    """Seconds per item, bytes, and the seconds that mining took at `mined` images for
    `mined_queries` queries."""

    dimensions: int = 1536
    m: int = 0
    """Codes of 8 bits per vector; 0 = a quarter of the dimensions."""
    image: float | None = None
    query: float | None = None
    caption: float | None = None
    features: float | None = None
    top_k: float | None = None
    top_k_exponent: float = 1.0
    band: float | None = None
    band_exponent: float = 1.0
    mined: int = 1_000_000
    mined_queries: int = 20_000
    queries: int = 20_000
    captions: int = 5
    """Captions per query."""
    hours: float = 24.0
    """In which the gallery is to be embedded; says how many processes that takes."""


def lists(size: int) -> int:
    """Of an IVF index by default."""
    return int(4 * size**0.5)


def rows_of(given: Measured, sizes: Sequence[int] = SIZES) -> list[tuple[str, list[str]]]:
    """Per quantity its name and a value for each size."""
    width, codes = given.dimensions, given.m or given.dimensions // 4
    rows = [
        ("vectors, float32", [amount(4 * width * size) for size in sizes]),
        ("vectors, float16", [amount(2 * width * size) for size in sizes]),
        (
            "IVF-Flat in memory",
            [amount((4 * width + 8) * size + 4 * width * lists(size)) for size in sizes],
        ),
        (
            f"IVF-PQ in memory, {codes} bytes a vector",
            [amount((codes + 8) * size + 4 * width * lists(size)) for size in sizes],
        ),
        (
            "IVF training sample, 64 a list",
            [amount(4 * width * 64 * lists(size)) for size in sizes],
        ),
        ("scores of one query", [amount(4 * size) for size in sizes]),
    ]
    if given.features is not None:
        rows.append(("kept vision features", [amount(given.features * size) for size in sizes]))
    if given.image is not None:
        seconds = [given.image * size for size in sizes]
        rows.append(("embed the gallery, one process", [duration(s) for s in seconds]))
        rows.append(
            (
                f"processes for {given.hours:g} h",
                [f"{math.ceil(s / 3600 / given.hours):,}" for s in seconds],
            )
        )
    if given.query is not None:
        rows.append(
            (
                f"embed {given.queries:,} queries",
                [duration(given.query * given.queries)] * len(sizes),
            )
        )
    for name, taken, exponent in (
        ("top_k", given.top_k, given.top_k_exponent),
        ("band", given.band, given.band_exponent),
    ):
        if taken is not None:
            each = taken * given.queries / given.mined_queries
            made = [duration(each * (size / given.mined) ** exponent) for size in sizes]
            rows.append((f"mine {given.queries:,} queries by {name}", made))
    if given.caption is not None:
        num = given.queries * given.captions
        rows.append((f"write {num:,} captions", [duration(given.caption * num)] * len(sizes)))
    return rows


def amount(num_bytes: float) -> str:
    """In units of 1000, three digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} PB"


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whole = ("dimensions", "m", "mined", "mined_queries", "queries", "captions")
    for name, field in Measured.__dataclass_fields__.items():
        kind = int if name in whole else float
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=field.default)
    rows = rows_of(Measured(**vars(parser.parse_args())))
    print("| | " + " | ".join(NAMES[size] for size in SIZES) + " |")
    print("| --- |" + " --- |" * len(SIZES))
    for name, values in rows:
        print(f"| {name} | " + " | ".join(values) + " |")


if __name__ == "__main__":
    main()
