"""Your own triplets and images, from a spreadsheet to a directory that a run reads.

    cirloop import triplets.csv --images photos --val 0.2 --output shop

Reads CSV, Excel workbooks, Parquet, JSON and JSON lines, finds columns and images by usual names
and spellings, splits by reference, and says what it did (docs/own-data.md).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pydantic import ValidationError

from cirloop.cli import entry
from cirloop.config import cli
from cirloop.config.run import format_validation_error
from cirloop.tools.import_table.config import ImportConfig
from cirloop.types import UserError

PROGRAM = "cirloop import"


def main(argv: Sequence[str]) -> None:
    """Import a table. Raises UserError with all that is wrong; then nothing is written."""
    try:
        options = cli.parse(ImportConfig, argv, PROGRAM)
    except ValidationError as error:
        raise UserError(format_validation_error(error, PROGRAM)) from None
    from cirloop.tools.import_table.pipeline import import_table

    import_table(options)


if __name__ == "__main__":
    entry.main_wrapper(lambda: main(sys.argv[1:]))
