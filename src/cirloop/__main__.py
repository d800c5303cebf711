"""The command `cirloop`, which is `python -m cirloop` too.

A subcommand's module is imported when it is called.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

import cirloop
from cirloop.io.pipes import quiet_when_unread

COMMANDS = {
    "train": ("cirloop.cli.train", "mine, caption, train and evaluate, round by round"),
    "plan": ("cirloop.cli.plan", "minutes of a run by stage, on a device and a number of them"),
    "eval": ("cirloop.cli.evaluate", "evaluate iterations of a run, or score a file of rankings"),
    "mine": ("cirloop.tools.add_negatives.command", "hard negatives for samples, or from vectors"),
    "search": (
        "cirloop.tools.search.command",
        "search a folder of images with a run's model or another",
    ),
    "demo": ("cirloop.tools.demo.command", "the same as a page in a browser"),
    "export": (
        "cirloop.tools.export.command",
        "a run's model for PEFT or sentence-transformers, or vectors",
    ),
    "compare": ("cirloop.tools.compare.command", "runs side by side, with tests of what differs"),
    "import": ("cirloop.tools.import_table.command", "your own spreadsheet and photographs"),
    "init": ("cirloop.tools.init_config", "write a YAML of settings for a data set and a GPU"),
    "doctor": ("cirloop.tools.doctor", "what is installed, found and missing on this machine"),
}
"""Subcommand -> the module whose `main(argv)` it calls, and what it does."""
EXAMPLES = (
    ("cirloop train --fast_mode", "a small run: no data, no model, no GPU"),
    ("cirloop import triplets.csv --images photos --val 0.2 --output shop", "your own data"),
    ("cirloop init --data_dir shop --gpu_memory 24 --output shop.yaml", "settings for it"),
    ("cirloop train --config shop.yaml --dry_run", "check everything, train nothing"),
)
WRONG = 2
"""The exit code of a subcommand that there is not, or that lacks a package."""


def help_text() -> str:
    """Return what `cirloop --help` prints."""
    rows = [f"  {name:<8} {about}" for name, (_, about) in COMMANDS.items()]
    examples = [f"  {command}\n      {about}" for command, about in EXAMPLES]
    return "\n".join(
        [
            "usage: cirloop COMMAND [flags]",
            "Trains embedders for composed image retrieval: an image and a text that changes it.",
            "",
            *rows,
            "",
            *examples,
            "",
            "cirloop COMMAND --help has the flags of a command; `-` and `_` are the same in them.",
            "",
        ]
    )


def main() -> None:
    """Run the subcommand that the command line names, and end the process with its exit code."""
    with quiet_when_unread():
        _main()


def _main() -> None:
    argv = sys.argv[1:]
    name = argv[0] if argv else "--help"
    if name in ("--help", "-h", "help"):
        sys.stdout.write(help_text())
    elif name == "--version":
        sys.stdout.write(f"cirloop {cirloop.__version__}\n")
    elif name in COMMANDS:
        _run(name, argv[1:])
    else:
        near = difflib.get_close_matches(name, COMMANDS, n=2)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        sys.stderr.write(
            f"error: {name!r:.100} is no command of cirloop.{hint} Commands:"
            f" {', '.join(COMMANDS)}\n"
        )
        sys.exit(WRONG)


def _run(name: str, argv: Sequence[str]) -> None:
    def call() -> None:
        sys.exit(importlib.import_module(COMMANDS[name][0]).main(argv))

    if name == "doctor":  # it runs without the packages that the others need
        call()
    try:
        from cirloop.cli import entry

        entry.main_wrapper(call)
    except ModuleNotFoundError as error:
        if (error.name or "cirloop").partition(".")[0] == "cirloop":
            raise
        sys.stderr.write(
            f"error: the package {error.name} is missing. cirloop doctor says what is, and for"
            " which command.\n"
        )
        sys.exit(WRONG)


if __name__ == "__main__":
    main()
