"""Add hard negatives to samples of images and texts, or mine them from vectors. See --help."""

import sys

from cirloop.cli import entry

VECTORS = ("--query-embeddings", "--gallery-embeddings")
"""Flags that only mining from vectors alone has."""


def main() -> None:
    argv = sys.argv[1:]
    if any(word.split("=")[0].replace("_", "-") in VECTORS for word in argv):
        from cirloop.cli.mine_embeddings import main as mine_vectors

        mine_vectors(argv)
        return
    from cirloop.tools.add_negatives.config import AddNegativesConfig

    options = AddNegativesConfig.parse(argv)  # before torch is loaded
    from cirloop.tools.add_negatives.pipeline import add_negatives

    report = add_negatives(options)
    num = report["samples"] - report["negatives"]["none"]
    print(
        f"{num} of {report['samples']} samples have a negative: {options.output}, and the report"
        f" {options.report}"
    )


if __name__ == "__main__":
    entry.main_wrapper(main)
