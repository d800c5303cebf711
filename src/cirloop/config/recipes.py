"""Where a command line's settings come from under its flags: the run directory's own, --config's,
or a recipe.

A recipe is `{dataset}_{backbone}.yaml` of the checkout's `configs/`; without a data set it is the
default one.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import cirloop
from cirloop.artifacts import schema
from cirloop.backbones.config import BackboneConfig
from cirloop.backbones.weights import TINY, model_type
from cirloop.config import cli
from cirloop.data.config import DataConfig
from cirloop.io import parse
from cirloop.negatives import below_strategy
from cirloop.types import UserError

logger = logging.getLogger(__name__)
DRAWN = "shapes"
"""The data set that is drawn, whose recipe is the default one whatever the backbone."""
BACKBONE = "qwen2_vl"
"""What is trained where no flag says otherwise."""
CONFIG = "config.json"
"""A run directory's copy of its settings."""
CONFIGS = (Path(cirloop.__file__).parent / "configs").resolve()
"""The recipes: `configs/` of the checkout, or their copies in an installed package."""
EARLIER_NAMES = {
    "training.warm_up_steps": "training.iteration_0_steps",
    "training.steps": "training.steps_per_iteration",
    "captioning.candidates": "captioning.num_candidates",
    "captioning.verify": "captioning.min_verify_probability",
    "captioning.round_trip": "captioning.max_round_trip_rank",
}
"""Names that files and flags in use still have for these settings."""
Content = dict[str, Any]


@dataclass(frozen=True, slots=True)
class CommandLine:
    """The part of a command line that says where its settings come from.

    `types` holds the type that a flag gives a group of settings (`data`, `model`, ...), `paths`
    those that flags name (`model`, `foundation`), `dtypes` the groups whose dtype a flag gives.
    """

    config: Path | None
    fast_mode: bool
    experiment_dir: Path | None
    goes_on: bool
    simulated: bool
    types: Mapping[str, str]
    paths: Mapping[str, str]
    dtypes: frozenset[str] = frozenset()

    @property
    def directory(self) -> Path:
        """The run directory."""
        backbone = "simulated" if self.simulated else self.types.get("model", BACKBONE)
        return self.experiment_dir or default_directory(backbone, self.types.get("data", DRAWN))


def default_directory(backbone: str, data: str) -> Path:
    """Return the run directory where none is named."""
    return Path("experiments") / f"{backbone}_{data}_iterative"


def read_command_line(argv: Sequence[str], typed: Mapping[str, str], prog: str) -> CommandLine:
    """Read where settings come from; `typed` names the flag that gives each group of settings its
    type."""
    peek = cli.Parser(prog=prog, add_help=False, help_flag="--help_all")
    peek.add_argument("--config")
    peek.add_argument("--experiment_dir")
    for flag in ("fast_mode", "auto_resume", "report_only"):
        peek.add_argument(f"--{flag}", action="store_true")
    for flag in ("resume_from_iteration", "retrieval"):
        peek.add_argument(f"--{flag}")
    for group in ("model", "foundation"):
        long = "foundation_model_path" if group == "foundation" else "model_path"
        peek.add_argument(f"--{long}", f"--{group}.path", dest=f"{group}_path")
        peek.add_argument(f"--{group}.dtype", dest=f"{group}_dtype")
    for group, flag in typed.items():
        peek.add_argument(f"--{flag}", f"--{group}.type", dest=group)
    flags, _ = peek.parse_known_args(list(argv))
    goes_on = flags.auto_resume or flags.report_only or flags.resume_from_iteration is not None
    types = {group: getattr(flags, group) for group in typed if getattr(flags, group) is not None}
    paths = {"model": flags.model_path, "foundation": flags.foundation_path}
    named_paths = {group: path for group, path in paths.items() if path is not None}
    dtypes = frozenset(group for group in paths if getattr(flags, f"{group}_dtype") is not None)
    simulated = flags.retrieval == "simulated"
    config, directory = (
        path if path is None else parse.expand_user(path)
        for path in (flags.config, flags.experiment_dir)
    )
    return CommandLine(
        config, flags.fast_mode, directory, goes_on, simulated, types, named_paths, dtypes
    )


def current_flags(argv: Sequence[str]) -> list[str]:
    """Return a command line with flags of `EARLIER_NAMES` under the names that settings have
    now."""
    names = {f"--{name}": f"--{current}" for name, current in EARLIER_NAMES.items()}
    split = [word.partition("=") for word in argv]
    return [names.get(flag, flag) + sign + value for flag, sign, value in split]


def load_settings(command_line: CommandLine, default: Path) -> Content:
    """Load the settings under the flags, and log their source.

    `default` is the recipe of no data set; the others lie beside it. Raises UserError where there
    is no recipe, or where a file of settings cannot be read.
    """
    own = command_line.directory / CONFIG
    if (
        command_line.goes_on
        and command_line.config is None
        and not command_line.fast_mode
        and own.is_file()
    ):
        logger.info("going on with the settings of %s", own)
        return schema.read(own, "config")
    configs = default.parent
    if command_line.config is None:
        path = _recipe(command_line, default)
    else:
        path = _named_recipe(command_line.config, configs) or command_line.config
    settings = _read(path, configs)
    if command_line.fast_mode:
        settings = merge(settings, _read(_fast_twin(path, configs), configs))
    if command_line.config is None:
        logger.info("settings of the recipe %s; --config takes another", display_path(path))
        _name_embedder(command_line, settings)
    return settings


def _named_recipe(config: Path, configs: Path) -> Path | None:
    """Return the recipe that a --config names, as `jsonl_tiny` or `configs/jsonl_tiny.yaml`, where
    there is no such file; else None."""
    recipe = configs / f"{config.name.removesuffix('.yaml')}.yaml"
    if config.exists() or config.parent not in (Path(), Path("configs")) or not recipe.is_file():
        return None
    logger.info("--config %s is the recipe %s", config, display_path(recipe))
    return recipe


def _recipe(command_line: CommandLine, default: Path) -> Path:
    """Return the recipe's path. Raises UserError with the data set's recipes where the backbone has
    none."""
    data = command_line.types.get("data", DRAWN)
    backbone = command_line.types.get("model", BACKBONE)
    if (
        data == DRAWN
        or data not in type_names(DataConfig)
        or backbone not in type_names(BackboneConfig)
    ):
        return default  # an unknown name is refused with the known ones when the settings are read
    path = default.with_name(f"{data}_{backbone}.yaml")
    if path.is_file():
        return path
    recipes = [
        recipe for recipe in sorted(default.parent.glob("*.yaml")) if _is_recipe_of(recipe, data)
    ]
    raise UserError(
        f"no recipe for the data set {data} with the backbone {backbone}"
        f" ({display_path(path)}). Recipes for {data}:"
        f" {', '.join(map(display_path, recipes)) or 'none'}. Give one of them by --config, or a"
        " YAML of your own."
    )


def _is_recipe_of(path: Path, data: str) -> bool:
    settings = parse.read_yaml(path)
    named = settings.get("data") if isinstance(settings, dict) else None
    return isinstance(named, dict) and named.get("type") == data


def _fast_twin(path: Path, configs: Path) -> Path:
    """Return what --fast_mode lays over a file of settings. Raises UserError where there is
    nothing."""
    twin = path.with_name(f"{path.stem}_fast{path.suffix}")
    if not twin.is_file():
        twins = ", ".join(display_path(file) for file in sorted(configs.glob("*_fast.yaml")))
        raise UserError(
            f"--fast_mode needs {display_path(twin)}, to lay over {path.name}: there is no such"
            f" file. There is: {twins or 'none'}. Write it, or leave --fast_mode out and give"
            " smaller numbers by flags, such as --num_iterations 1 --training.iteration_0_steps 10"
            " --training.steps_per_iteration 10."
        )
    return twin


def _name_embedder(command_line: CommandLine, settings: Content) -> None:
    """Let --foundation_model_path name the embedder's weights too, where nothing else does and the
    families agree."""
    path = command_line.paths.get("foundation")
    data = command_line.types.get("data", DRAWN)
    if path is None or path == TINY or data == DRAWN or "model" in command_line.paths:
        return
    model = settings.get("model", {})
    family = model_type(path)
    embedder_type = model.get("type", BACKBONE)
    if family is None:  # a name on the hub: the foundation's own check reads its config.json
        family = command_line.types.get(
            "foundation", settings.get("foundation", {}).get("type", BACKBONE)
        )
    if family != embedder_type:
        logger.info(
            "--foundation_model_path %s is of type %s, the embedder of type %s: it stays %s",
            path,
            family,
            embedder_type,
            model.get("path", "as it is"),
        )
        return
    settings["model"] = {**model, "path": path}
    logger.info(
        "--foundation_model_path %s also names the embedder's weights; --model_path names others",
        path,
    )


def _read(path: Path, configs: Path) -> Content:
    """Read a YAML of settings. Raises UserError, with files of a similar name where there is no
    such file."""
    if not path.is_file():
        raise UserError(_describe_missing(path, configs))
    try:
        settings = parse.read_yaml(path)
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} must be a mapping of settings, found {type(settings).__name__}.")
    odd = [key for key in settings if not isinstance(key, str)]
    if odd:
        raise UserError(f"{path}: names of settings are words, found {odd[0]!r}.")
    for name, current in EARLIER_NAMES.items():
        group, _, setting = name.partition(".")
        current_setting = current.rpartition(".")[2]
        own = settings.get(group)
        # With both names in a file the earlier one stays, and is refused as unknown.
        if isinstance(own, dict) and setting in own and current_setting not in own:
            own[current_setting] = own.pop(setting)
    if isinstance(settings.get("mining"), dict):
        settings["mining"] = below_strategy(settings["mining"])
    for flag in {"config", "fast_mode"} & settings.keys():
        raise UserError(
            f"{path}: `{flag}` is for the command line, not for a file. Give it as --{flag}."
        )
    return settings


def _describe_missing(path: Path, configs: Path) -> str:
    """Describe a --config that does not exist, with files of a similar name or all beside it."""
    folder = path if path.is_dir() else path.parent
    beside = sorted(folder.glob("*.yaml"))
    recipes = sorted(configs.glob("*.yaml"))
    stems = {file.stem: file for file in [*recipes, *beside]}
    near = [display_path(stems[stem]) for stem in difflib.get_close_matches(path.stem, stems, n=2)]
    listed = ", ".join(file.name for file in beside) or "no YAML files"
    rest = (
        f"Did you mean {' or '.join(near)}?"
        if near
        else f"Recipes: {', '.join(map(display_path, recipes))}."
    )
    if path.is_dir():
        return f"--config: {path}: is a directory. In {folder}: {listed}. {rest}"
    return f"--config: {path}: there is no such file. In {folder}: {listed}. {rest}"


def merge(settings: Content, over: Content) -> Content:
    """Lay settings over others, group by group."""
    out = dict(settings)
    for name, value in over.items():
        old = out.get(name)
        out[name] = (
            merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return out


def type_names(union: object) -> list[str]:
    """Return the type names of a union of settings."""
    return [kind.model_fields["type"].default for kind in get_args(get_args(union)[0])]


def display_path(path: Path) -> str:
    """Return a path relative to the working directory, where it lies below."""
    cwd = Path.cwd()
    return str(path.relative_to(cwd) if path.is_relative_to(cwd) else path)
