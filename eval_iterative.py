"""Evaluate iterations of a run (--iterations 1,3,5), or score --rankings FILE. See --help."""

import sys

from cirloop.cli import entry
from cirloop.distributed import launcher


def main() -> None:
    launcher.refuse_nested_launch(sys.argv)
    from cirloop.cli.evaluate import EvalConfig, evaluate

    evaluate(EvalConfig.parse(sys.argv[1:]))


if __name__ == "__main__":
    entry.main_wrapper(main)
