"""Your own triplets and images, from a spreadsheet to a directory that a run reads.

    cirloop import triplets.csv --images photos --val 0.2 --output shop

Reads CSV, Excel workbooks, Parquet, JSON and JSON lines, finds columns and images by usual names
and spellings, splits by reference, and says what it did (docs/own-data.md).
"""

from __future__ import annotations

from collections.abc import Sequence

from cirloop.config import cli
from cirloop.tools.import_table.config import ImportConfig

PROGRAM = "cirloop import"


def main(argv: Sequence[str]) -> None:
    """Import a table. Raises UserError with all that is wrong; then nothing is written."""
    options = cli.parse_flags(ImportConfig, argv, PROGRAM)
    from cirloop.tools.import_table.pipeline import import_table

    import_table(options)
