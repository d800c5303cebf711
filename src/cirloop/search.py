"""The command `python -m cirloop.search` (`cirloop.tools.search`)."""

import sys

from cirloop.cli import entry
from cirloop.tools.search.command import main

if __name__ == "__main__":
    entry.main_wrapper(lambda: sys.exit(main(sys.argv[1:])))
