"""Evaluate iterations of a run: eval_iterative.py --experiment_dir E [--iterations 1,3,5]. Flags: --help"""

import sys

from cirloop import cli


def main() -> None:
    from cirloop.evaluate_run import EvalConfig, evaluate_run

    evaluate_run(EvalConfig.parse(sys.argv[1:]))


if __name__ == "__main__":
    cli.run(main)
