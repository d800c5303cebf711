"""Mine, caption, train, evaluate; round by round. Flags: train_iterative.py --help"""

import sys

from cirloop.cli import entry
from cirloop.cli.train import main

if __name__ == "__main__":
    entry.main_wrapper(lambda: main(sys.argv[1:]))
