"""The command `python -m cirloop.export` (`cirloop.tools.export`)."""

import sys

from cirloop.cli import entry
from cirloop.tools.export.command import main

if __name__ == "__main__":
    entry.main_wrapper(lambda: main(sys.argv[1:]))
