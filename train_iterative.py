"""Mine, caption, train, evaluate; round by round. Flags: train_iterative.py --help"""

import sys
from pathlib import Path

from cirloop.cli import entry
from cirloop.config import run
from cirloop.distributed import launcher
from cirloop.report import builder


def main() -> None:
    launcher.refuse_nested_launch(sys.argv)
    settings = run.load(sys.argv[1:], Path(__file__).resolve().parent / "configs" / "shapes.yaml")
    if settings.report_only:
        builder.rebuild(settings)
        return
    from cirloop.cli import (
        runner,
    )  # torch and transformers load here, after the flags are known to be right

    if settings.dry_run:
        runner.dry_run(settings)
    else:
        runner.run(settings)


if __name__ == "__main__":
    entry.main_wrapper(main)
