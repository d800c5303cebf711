"""Evaluate iterations of a run, --experiment_dir E [--iterations 1,3,5], or score --rankings FILE. Flags: --help"""

import sys

from cirloop import cli, launch


def main() -> None:
    launch.alone(sys.argv)
    from cirloop.evaluate_run import EvalConfig, evaluate

    evaluate(EvalConfig.parse(sys.argv[1:]))


if __name__ == "__main__":
    cli.run(main)
