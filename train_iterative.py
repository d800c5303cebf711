"""Mine, caption, train, evaluate; round by round. Flags: train_iterative.py --help"""

import sys
from pathlib import Path

from cirloop import cli, config, launch, report_run


def main() -> None:
    launch.alone(sys.argv)
    settings = config.load(sys.argv[1:], Path(__file__).resolve().parent / "configs" / "shapes.yaml")
    if settings.report_only:
        report_run.rebuild(settings)
        return
    from cirloop import experiment  # torch and transformers load here, after the flags are known to be right

    if settings.dry_run:
        experiment.dry_run(settings)
    else:
        experiment.run(settings)


if __name__ == "__main__":
    cli.run(main)
