"""Mine, caption, train, evaluate; round by round."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cirloop.config import recipes, run
from cirloop.distributed import launcher
from cirloop.report import builder


def main(argv: Sequence[str]) -> None:
    """Train as the flags say. Raises UserError for what is wrong with them, the data or the run
    directory."""
    launcher.refuse_nested_launch(sys.argv)
    settings = run.load(argv, recipes.CONFIGS / "shapes.yaml")
    if settings.report_only:
        builder.rebuild(settings)
        return
    # torch and transformers load here, after the flags are known to be right
    from cirloop.cli import runner

    if settings.dry_run:
        runner.dry_run(settings)
    else:
        runner.run(settings)
