"""The command `python -m cirloop.export_vectors` (`cirloop.tools.export_embeddings`)."""

import sys

from cirloop.cli import entry
from cirloop.tools.export_embeddings import main

if __name__ == "__main__":
    entry.main_wrapper(lambda: main(sys.argv[1:]))
