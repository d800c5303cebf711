"""Evaluate iterations of a run (--iterations 1,3,5), or score --rankings FILE. See --help."""

import sys

from cirloop.cli import entry


def main() -> None:
    from cirloop.cli import evaluate  # torch loads here

    evaluate.main(sys.argv[1:])


if __name__ == "__main__":
    entry.main_wrapper(main)
