"""A run's configuration: YAML under flags, strict, one resolved copy per run.

Precedence: flags, with `--fast_mode` the config's `_fast.yaml` twin, the config file, defaults.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from cirloop.artifacts import schema
from cirloop.artifacts.atomic import write_checked
from cirloop.artifacts.store import fingerprint
from cirloop.backbones.config import BackboneConfig, Qwen2VLSettings
from cirloop.captioning.config import CaptioningSettings
from cirloop.captioning.foundation import FoundationConfig, Qwen2VLFoundation, match_dtype
from cirloop.config import cli, cli_help, errors, notices, recipes, retyping, simulated
from cirloop.config.base import FlagSettings
from cirloop.config.evaluation import Evaluation
from cirloop.config.runtime import Runtime
from cirloop.config.shortcuts import PATH_SETTINGS, SHORTCUTS, UNION_FLAGS
from cirloop.data import DataConfig, DataPaths, Dataset, ShapesSettings, locations, own
from cirloop.io import parse
from cirloop.io.redact import secrets_in
from cirloop.negatives import MiningSettings
from cirloop.negatives.attributes.config import AttributeSettings
from cirloop.training.config import TrainingSettings
from cirloop.types import TrainSplit, UserError

logger = logging.getLogger(__name__)
PROGRAM = "train_iterative.py"
METADATA_KEYS = ("schema", "run", "digest", notices.SIMULATED)
"""What a run directory's `config.json` holds besides."""


class RunConfig(FlagSettings):
    """The settings of one run."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_shortcuts=SHORTCUTS,
    )

    config: Path | None = None
    """A YAML of these settings."""
    fast_mode: bool = False
    """Lay the config's `<name>_fast.yaml` over it: a small, quick run."""
    experiment_dir: Path | None = None
    """The run directory; by default experiments/{model_backbone}_{dataset_name}_iterative."""
    auto_resume: bool = False
    """Go on in a used run directory at the first stage that is not done."""
    resume_from_iteration: int | None = Field(None, ge=0)
    """Keep the iterations below this one and remake it and what follows."""
    dry_run: bool = False
    """Check configuration, data and model, print the plan, and train nothing."""
    report_only: bool = False
    """Write report.html of --experiment_dir anew from what is finished there, and do nothing
    else."""
    data_dir: Path | None = None
    """Where the data set's files are; `shapes` is drawn and needs none."""
    train_dir: Path | None = None
    """Where the files of `data.train` are, for benchmarks without a training split; by default
    --data_dir."""
    num_iterations: int = Field(3, ge=0)
    """Rounds of mine, caption, train, evaluate after the warm-up."""
    stop_on_futile_round: bool = False
    """End the run where a round cannot help (docs/when-it-stops.md); a warning says so anyway."""
    seed: int = Field(0, ge=0, description="Of all random numbers of the run.")
    retrieval: Literal["real", "simulated"] = "real"
    """`simulated`: no model; rankings are drawn from the seed, for trying the machinery on data of
    one's own. All that such a run makes says so first."""
    retrieval_fallback: Literal["none", "simulated"] = "none"
    """What ranks where the weights of a model are not to be had: nothing, the run ends; or rankings
    drawn from the seed."""
    model: BackboneConfig = Qwen2VLSettings()
    foundation: FoundationConfig = Qwen2VLFoundation()
    data: DataConfig = ShapesSettings()
    mining: MiningSettings = MiningSettings()
    attributes: AttributeSettings | None = None
    """What images show and texts ask for, for the negative strategies that compare attributes."""
    captioning: CaptioningSettings = CaptioningSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: Evaluation = Evaluation()
    runtime: Runtime = Runtime()

    @field_validator("experiment_dir", "data_dir", "train_dir")
    @classmethod
    def _home(cls, path: Path | None) -> Path | None:
        return None if path is None else parse.expand_user(str(path))

    @model_validator(mode="before")
    @classmethod
    def _no_model(cls, content: object) -> object:
        """Where retrieval is simulated no model ranks, whichever is named."""
        if isinstance(content, dict) and content.get("retrieval") == "simulated":
            return {**content, "model": {"type": "simulated", "seed": content.get("seed", 0)}}
        return content

    @model_validator(mode="after")
    def _model(self) -> Self:
        if self.retrieval == "real" and self.model.type == "simulated":
            raise ValueError(
                "retrieval is real, and the model `simulated` is none. Name a model by"
                " --model_backbone or a recipe by --config, with an --experiment_dir of its own; or"
                " give --retrieval simulated"
            )
        return self

    @property
    def directory(self) -> Path:
        return self.experiment_dir or recipes.default_directory(self.model.type, self.data.type)

    @property
    def trains(self) -> bool:
        """Whether the run takes any training step."""
        return bool(self.num_iterations or self.training.iteration_0_steps)

    @property
    def cache(self) -> Path:
        return self.runtime.cache_dir or self.directory.parent / "cache"

    def open_data(self, data_paths: DataPaths) -> Dataset:
        """Define the data set, whose splits load on first use. Raises UserError where its files are
        missing."""
        data = self.data.build(data_paths)

        def load_train() -> TrainSplit:
            train = data.load_train()
            return replace(train, judge=self.foundation.judge(train))

        return replace(data, load_train=load_train)

    def result_settings(self) -> dict[str, Any]:
        """Return the settings that decide results, as JSON.

        `num_iterations` is not one: a run may be prolonged. Neither is
        `training.max_skipped_batches`: a finished stage left out the bad batches that it had,
        whatever the limit. Nor is `training.grad_cache_chunk_size`, so that a run that ran out of
        memory can resume: it decides only which dropout is drawn. Nor are how a server of the
        foundation model is reached, and `evaluation.early_stopping` and
        `captioning.min_judge_auc`, which end a run.
        """
        keep = {
            "seed",
            "retrieval",
            "model",
            "foundation",
            "data",
            "mining",
            "attributes",
            "captioning",
            "training",
            "evaluation",
        }
        return self.model_dump(
            mode="json",
            include=keep,
            exclude={
                "training": {"max_skipped_batches", "grad_cache_chunk_size"},
                "foundation": {*self.foundation.resultless},
                "evaluation": {"early_stopping"},
                "captioning": {"min_judge_auc"},
            },
        )

    def to_json(self) -> dict[str, Any]:
        """Return all settings as JSON, for the run directory's `config.json`."""
        command_only = {
            "config",
            "fast_mode",
            "auto_resume",
            "resume_from_iteration",
            "dry_run",
            "report_only",
        }
        settings = self.model_dump(mode="json", exclude={*command_only, "experiment_dir"})
        for (
            group,
            names,
        ) in PATH_SETTINGS:  # a run is also used from other directories than that it was begun in
            node = settings[group] if group else settings
            node |= {
                name: str(Path(node[name]).absolute()) for name in names if node[name] is not None
            }
        return settings


def load(arguments: Sequence[str], default_config: Path) -> RunConfig:
    """Load the configuration of a command line; print the help if it is requested.

    Raises UserError with every problem.
    """
    arguments = cli.underscored(arguments)
    argv = recipes.current_flags(cli_help.without_help(arguments))
    command_line = recipes.read_command_line(argv, UNION_FLAGS, PROGRAM)
    content = recipes.load_settings(command_line, default_config)
    for name in METADATA_KEYS if "schema" in content else ():
        content.pop(name, None)
    _change_types(content, command_line.types)
    if command_line.simulated:
        content |= simulated.settings(
            content, foundation_named="foundation" in {*command_line.types, *command_line.paths}
        )

    class Parsed(RunConfig):
        file_content: ClassVar[dict[str, Any]] = content

    parser = cli.Parser(prog=PROGRAM, description=RunConfig.__doc__, help_flag=cli_help.HELP_ALL)
    try:
        config = cli.parse(Parsed, argv, parser)
    except ValidationError as error:
        raise UserError(_message(error)) from None
    if cli_help.requests_help(arguments):
        sys.stdout.write(cli_help.help_text(parser, config.model_dump(mode="json"), arguments))
        sys.exit()
    if "foundation" not in command_line.dtypes:
        foundation = match_dtype(
            config.foundation, config.model, by_flag="model" in command_line.dtypes
        )
        config = config.model_copy(update={"foundation": foundation})
    return config if config.report_only else complete(config)


def _change_types(content: dict[str, Any], types: Mapping[str, str]) -> None:
    """Give groups of settings the types that flags name, and keep of each what the new type has."""
    for group, type_ in types.items():
        *outer, name = group.split(".")
        node: Any = content
        for part in outer:
            node = node.setdefault(part, {}) if isinstance(node, dict) else node
        if isinstance(node, dict):
            node[name] = retyping.change_type(RunConfig, node.get(name, {}), group, type_)


def complete(config: RunConfig) -> RunConfig:
    """Add the usual place of the data, and drop a model that is missing where that is allowed.

    Raises UserError for `tiny` on photographs where nobody named it, for a data directory that is
    not read, and for a secret among the settings.
    """
    secrets = ", ".join(secrets_in(config.to_json()))
    if secrets:
        raise UserError(
            f"{secrets}: a secret, and settings are copied to {config.directory}. Give tokens as"
            " HF_TOKEN."
        )
    own.refuse_unread(config.data.type, config.data_dir)
    notices.refuse_unnamed(config)
    if config.retrieval_fallback == "simulated" and config.retrieval == "real":
        config = simulated.fall_back(config)
    return config.model_copy(
        update=locations.with_default_dirs(config.data, config.data_dir, config.train_dir)
    )


def from_json(path: Path, **changes: Any) -> RunConfig:
    """Load the configuration of a run directory. Raises UserError for a damaged or altered copy."""
    content = schema.read(path, "config")
    try:
        return RunConfig(
            **{name: value for name, value in content.items() if name not in METADATA_KEYS},
            **changes,
        )
    except ValidationError as error:
        raise UserError(f"{path}: {_message(error)}") from None


def save(config: RunConfig, path: Path) -> str:
    """Write a run directory's copy; return the run's id, a digest of its first copy's result
    settings."""
    run = read_run_id(path) if path.exists() else fingerprint(config.result_settings())
    write_checked(path, "config", notices.mark(config) | {"run": run, **config.to_json()})
    return run


def read_run_id(path: Path) -> str:
    """Read the run's id from a run directory's copy."""
    name: str = schema.read(path, "config")["run"]
    return name


def _message(error: ValidationError) -> str:
    return errors.format_errors(error, RunConfig, f"{cli.program(PROGRAM)} {cli_help.HELP_ALL}")
