"""The command `python -m cirloop.demo` (`cirloop.tools.demo`)."""

import sys

from cirloop.cli import entry
from cirloop.tools.demo.command import main

if __name__ == "__main__":
    entry.main_wrapper(lambda: main(sys.argv[1:]))
