"""Add hard negatives to samples of images and texts, or mine them from vectors."""

from __future__ import annotations

import sys
from collections.abc import Sequence

VECTORS = ("--query-embeddings", "--gallery-embeddings")
"""Flags that only mining from vectors alone has."""


def main(argv: Sequence[str]) -> None:
    """Write negatives. Raises UserError for what is wrong with the flags, the samples or the
    vectors."""
    if any(word.split("=")[0].replace("_", "-") in VECTORS for word in argv):
        from cirloop.cli.mine_embeddings import main as mine_vectors

        mine_vectors(argv)
        return
    from cirloop.tools.add_negatives.config import AddNegativesConfig

    options = AddNegativesConfig.parse(argv)  # before torch is loaded
    from cirloop.tools.add_negatives.pipeline import add_negatives

    report = add_negatives(options)
    num = report["samples"] - report["negatives"]["none"]
    sys.stdout.write(
        f"{num} of {report['samples']} samples have a negative: {options.output}, and the report"
        f" {options.report}\n"
    )
