"""What `train_iterative.py --help` prints: the flags people use, with the values that they have;
`--help_all` the rest.

`--help WORD` prints every flag that has the word in its name.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from cirloop.config.cli import Parser
from cirloop.types import UserError

HELP = "--help"
HELP_ALL = "--help_all"
COMMON = {
    "config": (
        "config",
        "A YAML of settings; by default configs/{dataset_name}_{model_backbone}.yaml.",
    ),
    "fast_mode": ("fast_mode", "A small, quick run: the config's `_fast.yaml` laid over it."),
    "dry_run": (
        "dry_run",
        "Check everything, print the plan with memory and hours, and train nothing.",
    ),
    "experiment_dir": ("experiment_dir", "The run directory."),
    "auto_resume": ("auto_resume", "Go on with a run at the first stage that is not done."),
    "resume_from_iteration": (
        "resume_from_iteration",
        "Keep the iterations below this one and remake what follows.",
    ),
    "report_only": (
        "report_only",
        "Write the report of --experiment_dir anew and do nothing else.",
    ),
    "dataset_name": ("data.type", "The data set."),
    "data_dir": ("data_dir", "The directory of its files."),
    "allow_missing_images": ("data.allow_missing_images", "Images that may be missing or damaged."),
    "model_backbone": ("model.type", "The family of the embedder."),
    "model_path": ("model.path", "The embedder's directory or hub name."),
    "foundation_model_backbone": (
        "foundation.type",
        "The family of the model that writes modification texts.",
    ),
    "foundation_model_path": ("foundation.path", "Its directory or hub name."),
    "num_iterations": ("num_iterations", "Rounds of mine, caption, train, evaluate."),
    "early_stopping": (
        "evaluation.early_stopping",
        "Rounds without a better result on val that end the run; 0 = do all.",
    ),
    "stop_on_futile_round": (
        "stop_on_futile_round",
        "End the run where a round cannot help (docs/when-it-stops.md).",
    ),
    "negative_strategy": (
        "mining.strategy.type",
        "Which wrong images are mined (docs/negatives.md).",
    ),
    "hard_negative_k": ("mining.strategy.negatives_per_query", "Wrong images mined per query."),
    "batch_size": ("training.batch_size", "Queries per step, over all processes."),
    "learning_rate": ("training.learning_rate", "The peak of the learning rate."),
    "loss": ("training.loss.type", "The training loss."),
    "seed": ("seed", "Of all random numbers."),
    "num_processes": ("runtime.num_processes", "Processes that share every stage, one per GPU."),
    "accelerate_config": (
        "runtime.accelerate_config",
        "A file of configs/accelerate/ or of your own.",
    ),
    "deepspeed": ("runtime.deepspeed", "A file of configs/deepspeed/."),
    "report_to": ("runtime.report_to", "Trackers: tensorboard, wandb, mlflow, trackio."),
}
"""Flag -> its setting and what it is."""


def requests_help(argv: Sequence[str]) -> bool:
    """Say whether a command line asks for help."""
    return any(word in (HELP, "-h", HELP_ALL) for word in argv)


def without_help(argv: Sequence[str]) -> list[str]:
    """Return the command line without what asks for help."""
    return [
        word
        for place, word in enumerate(argv)
        if word not in (HELP, "-h", HELP_ALL) and not _is_word(argv, place)
    ]


def _is_word(argv: Sequence[str], place: int) -> bool:
    """Whether a word follows `--help` and is no flag."""
    return place > 0 and argv[place - 1] in (HELP, "-h") and not argv[place].startswith("-")


def help_text(parser: Parser, settings: Mapping[str, Any], argv: Sequence[str]) -> str:
    """Return the help that `argv` asks for. `settings` are those of a run with the other flags, as
    nested JSON.

    Raises UserError for a WORD that is in no flag.
    """
    if HELP_ALL in argv:
        return parser.format_help()
    words = [word for place, word in enumerate(argv) if _is_word(argv, place)]
    if words:
        entries = parser.help_on(words[0])
        if not entries:
            raise UserError(
                f"{HELP} {words[0]}: no flag has this in its name. All flags: {parser.prog}"
                f" {HELP_ALL}"
            )
        return entries
    rows = [
        (f"--{flag}", _value(settings, setting), description)
        for flag, (setting, description) in COMMON.items()
    ]
    width = max(len(flag) for flag, _, _ in rows)
    lines = [f"usage: {parser.prog} [flags]", "", f"{parser.description}", ""]
    for flag, value, description in rows:
        lines += textwrap.wrap(
            f"{flag:<{width}}  {description} ({value})", 100, subsequent_indent=" " * (width + 2)
        )
    lines += [
        "",
        f"In brackets is the value without the flag. {HELP} WORD: flags with WORD in their names,",
        f"and {HELP_ALL} all of them, by stage; each may stand in the YAML too.",
        "docs/commands/train_iterative.md has them as a page.",
    ]
    return "\n".join(lines) + "\n"


def _value(settings: Mapping[str, Any], setting: str) -> str:
    node: Any = settings
    for name in setting.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    if isinstance(node, bool):
        return "on" if node else "off"
    return (
        "none"
        if node in (None, [], ())
        else ", ".join(map(str, node))
        if isinstance(node, list)
        else str(node)
    )
