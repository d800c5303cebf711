"""Add hard negatives to samples of images and texts, or mine them from vectors. See --help."""

import sys

from cirloop.cli import entry
from cirloop.tools.add_negatives.command import main

if __name__ == "__main__":
    entry.main_wrapper(lambda: main(sys.argv[1:]))
