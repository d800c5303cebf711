"""Settings for a data set and a GPU, as a commented YAML: the recipe that fits, with what a person
sets first.

    cirloop init --data_dir shop --gpu_memory 24 --output shop.yaml

All numbers are the recipe's, and so is the memory that it needs.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from cirloop.artifacts.atomic import write_text
from cirloop.backbones.weights import TINY
from cirloop.config import cli, recipes
from cirloop.data.config import DataConfig
from cirloop.io import parse
from cirloop.types import UserError
from cirloop.validation import ValidationReport

logger = logging.getLogger(__name__)
PROGRAM = "cirloop init"
MEMORY = re.compile(r"^# Memory[^:]*: (?:about )?(\d+) GB( of a GPU)?", re.MULTILINE)
"""What a recipe's comment says of the memory that it needs."""
HEAD = """\
# {command}
# made this from the recipe {name}.yaml, which needs {memory} GB; its own comments are below.
# Check it, with memory, disk and hours:  cirloop train --config {output} --dry_run
# Run it:                                 cirloop train --config {output}
# A flag wins over a line here. All settings: cirloop train --help_all

data_dir: {data_dir}
experiment_dir: {experiment_dir} # what the run writes; each run has its own
seed: 0 # of all random numbers
# runtime: {{num_processes: 2}} # one for each GPU
# evaluation: {{split: test}} # the split that iterations are compared on; val without this line

"""


class InitConfig(cli.Flags):
    """Writes settings for a data set and a GPU: the recipe that fits, as a commented YAML."""

    data_dir: Path
    """The directory of the data set's files, such as the one that cirloop import made."""
    gpu_memory: float = Field(ge=0)
    """Memory of one GPU, in GB; 0 = there is no GPU."""
    dataset_name: str = "jsonl"
    """The data set; `jsonl` is your own triplets."""
    model_backbone: str | None = None
    """Only a recipe of this family of embedders."""
    model_path: str | None = None
    """A directory or hub name of weights, in place of the recipe's."""
    experiment_dir: Path | None = None
    """The run directory; by default experiments/NAME, as --output is called."""
    output: Path
    """The YAML to write, which is not there yet."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe, and the memory in GB that it says it needs, of a GPU or without one."""

    name: str
    text: str
    settings: dict[str, Any]
    memory: int
    on_gpu: bool

    def fits(self, gpu_memory: float) -> bool:
        """Return whether a GPU of so much memory is enough. The embedded model is for no GPU."""
        if gpu_memory == 0:
            return not self.on_gpu
        return self.memory <= gpu_memory and self.settings["model"].get("path") != TINY

    def describe(self) -> str:
        return f"{self.name} ({self.memory} GB{' of a GPU' if self.on_gpu else ''})"


def main(argv: Sequence[str]) -> None:
    """Write the file. Raises UserError for wrong flags, or where no recipe fits."""
    options = cli.parse_flags(InitConfig, argv, PROGRAM)
    _check(options)
    candidates = recipes_of(options.dataset_name, options.model_backbone)
    fitting = [recipe for recipe in candidates if recipe.fits(options.gpu_memory)]
    if not fitting:
        listed = ", ".join(recipe.describe() for recipe in candidates) or "none"
        raise UserError(
            f"no recipe for {options.dataset_name} fits --gpu_memory {options.gpu_memory:g}. There"
            f" are: {listed}. --config takes one by its name all the same; --gpu_memory 0 takes one"
            " that needs no GPU."
        )
    usual = f"{options.dataset_name}_{options.model_backbone or recipes.BACKBONE}"
    chosen = max(fitting, key=lambda recipe: (recipe.name == usual, recipe.memory))
    write_text(options.output, content(options, chosen, shlex.join(["cirloop", "init", *argv])))
    others = [recipe.describe() for recipe in candidates if recipe is not chosen]
    logger.info("%s; others: %s", chosen.describe(), ", ".join(others) or "none")
    logger.info(
        "wrote %s. Next: cirloop train --config %s --dry_run", options.output, options.output
    )


def _check(options: InitConfig) -> None:
    problems = ValidationReport()
    names = [name for name in recipes.type_names(DataConfig) if name != recipes.DRAWN]
    if options.dataset_name not in names:
        problems.add(f"--dataset_name {options.dataset_name}", f"is none of {', '.join(names)}")
    if not options.data_dir.is_dir():
        problems.add(f"--data_dir {options.data_dir}", "there is no such directory")
    if options.output.exists():
        problems.add(f"--output {options.output}", "is there already; give another name")
    problems.raise_if_any()


def recipes_of(data_set: str, backbone: str | None) -> list[Recipe]:
    """Return the recipes of a data set that say what memory they need."""
    matching = []
    for path in sorted(recipes.CONFIGS.glob("*.yaml")):
        text = parse.read_text(path)
        settings = parse.parse_yaml(text)
        memory = MEMORY.search(text)
        if memory is None or settings.get("data", {}).get("type") != data_set:
            continue
        if backbone is None or settings["model"]["type"] == backbone:
            matching.append(Recipe(path.stem, text, settings, int(memory[1]), bool(memory[2])))
    return matching


def content(options: InitConfig, recipe: Recipe, command: str) -> str:
    """Return the text of the file: the head, and the recipe with the weights that were named."""
    directory = options.experiment_dir or Path("experiments") / options.output.stem
    head = HEAD.format(
        command=command,
        name=recipe.name,
        memory=recipe.memory,
        output=shlex.quote(str(options.output)),
        data_dir=_quoted(options.data_dir.absolute()),
        experiment_dir=_quoted(directory),
    )
    text = recipe.text
    path = recipe.settings["model"].get("path")
    if options.model_path is not None and path is not None:
        text = text.replace(f"path: {path}", f"path: {_quoted(options.model_path)}")
    return head + text


def _quoted(value: object) -> str:
    """Return a text for YAML, in quotes where it needs them."""
    text = str(value)
    return text if re.fullmatch(r"[\w./][\w./-]*", text) else json.dumps(text, ensure_ascii=False)
