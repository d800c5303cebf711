"""A run's configuration: YAML under flags, strict, one resolved copy per run.

Precedence: flags, with `--fast_mode` the config's `_fast.yaml` twin, the config file, defaults.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from cirloop.artifacts import schema
from cirloop.artifacts.store import fingerprint, write_sealed
from cirloop.backbones.config import BackboneConfig, Qwen2VLSettings
from cirloop.captioning.config import (
    CaptioningSettings,
    FoundationConfig,
    Qwen2VLFoundation,
    one_dtype,
)
from cirloop.config import cli, cli_help, notices, recipes, simulated, suggestions
from cirloop.config.base import Settings
from cirloop.config.runtime import Runtime
from cirloop.data import DataConfig, ShapesSettings, locations
from cirloop.io import parse
from cirloop.io.redact import secrets_in
from cirloop.negatives import MiningSettings
from cirloop.negatives.attributes.config import AttributeSettings
from cirloop.training.config import TrainingSettings
from cirloop.types import UserError

logger = logging.getLogger(__name__)
PROGRAM = "train_iterative.py"
TYPED = {
    "data": "dataset_name",
    "mining.strategy": "negative_strategy",
    "model": "model_backbone",
    "foundation": "foundation_model_backbone",
    "training.loss": "loss",
}
"""Groups of settings that a flag may give another type, and the flag."""
NO_SETTINGS = ("schema", "run", "digest", notices.SIMULATED)
"""What a run directory's `config.json` holds besides."""


class Evaluation(Settings):
    """What is evaluated after each iteration."""

    split: Literal["val", "test"] = Field("val", description="What iterations are evaluated on.")
    evaluate_base: bool = True
    """Also evaluate the base model, before any training."""


PLACES = (
    ("", ("data_dir", "train_dir")),
    ("runtime", ("cache_dir", "compare_with", "accelerate_config", "deepspeed")),
)
"""Settings that are paths and decide no result."""
LAST_WORD = (
    *(
        "data.allow_missing_images",
        "data.allow_symlinks",
        "data.categories",
        "mining.strategy.n_def",
    ),
    *("training.batch_size", "training.learning_rate"),
    *(
        "training.max_skipped_batches",
        "runtime.num_processes",
        "runtime.accelerate_config",
        "runtime.deepspeed",
    ),
    *("runtime.profile", "runtime.compare_with", "runtime.report_to"),
)
"""Settings whose last word alone is a flag too."""
SHORTCUTS = {
    **{name: name.rpartition(".")[2] for name in LAST_WORD},
    "model.type": "model_backbone",
    "model.path": "model_path",
    "foundation.type": "foundation_model_backbone",
    "foundation.path": "foundation_model_path",
    "data.type": "dataset_name",
    "mining.strategy.type": "negative_strategy",
    "mining.strategy.negatives_per_query": "hard_negative_k",
    "training.loss.type": "loss",
}
"""Setting -> its short flag."""


class RunConfig(BaseSettings):
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
        return None if path is None else parse.at_home(str(path))

    @model_validator(mode="before")
    @classmethod
    def _no_model(cls, content: Any) -> Any:
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

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *_: Any,
        **__: Any,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)

    @property
    def directory(self) -> Path:
        return self.experiment_dir or recipes.default_directory(self.model.type, self.data.type)

    @property
    def cache(self) -> Path:
        return self.runtime.cache_dir or self.directory.parent / "cache"

    def decisive(self) -> dict[str, Any]:
        """The settings that decide results, as JSON. `num_iterations` is not one: a run may be
        prolonged. Neither is `training.max_skipped_batches`: a finished stage left out the bad
        batches that it had, whatever the limit. Nor is `training.grad_cache_chunk_size`, so that a
        run that ran out of memory goes on: it decides no more than which dropout is drawn."""
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
            mode="json", include=keep, exclude={"training": {"max_skipped_batches", "chunk_size"}}
        )

    def resolved(self) -> dict[str, Any]:
        """Everything, as JSON, for the run directory's `config.json`."""
        asked = {
            "config",
            "fast_mode",
            "auto_resume",
            "resume_from_iteration",
            "dry_run",
            "report_only",
        }
        settings = self.model_dump(mode="json", exclude={*asked, "experiment_dir"})
        for (
            group,
            names,
        ) in PLACES:  # a run is also used from other directories than that it was begun in
            node = settings[group] if group else settings
            node |= {
                name: str(Path(node[name]).absolute()) for name in names if node[name] is not None
            }
        return settings


def load(given: Sequence[str], default_config: Path) -> RunConfig:
    """The configuration of a command line. Raises UserError with every problem found; prints the
    help asked for."""
    argv = recipes.current_flags(cli_help.rest(given))
    asked = recipes.asked(argv, TYPED, PROGRAM)
    content = recipes.content(asked, default_config)
    for name in NO_SETTINGS if "schema" in content else ():
        content.pop(name, None)
    for group, type_ in asked.types.items():
        *outer, name = group.split(".")
        node: Any = content
        for part in outer:
            node = node.setdefault(part, {}) if isinstance(node, dict) else node
        if isinstance(node, dict):
            node[name] = recipes.of_type(RunConfig, node.get(name, {}), group, type_)
    if asked.simulated:
        content |= simulated.settings(
            content, foundation_named="foundation" in {*asked.types, *asked.paths}
        )

    class Parsed(RunConfig):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            *_: Any,
            **__: Any,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (init_settings, InitSettingsSource(settings_cls, content))

    parser = cli.Parser(prog=PROGRAM, description=RunConfig.__doc__, help_flag=cli_help.HELP_ALL)
    try:
        config = cli.parse(Parsed, argv, parser)
    except ValidationError as error:
        raise UserError(explain(error)) from None
    if cli_help.asked(given):
        sys.stdout.write(cli_help.text(parser, config.model_dump(mode="json"), given))
        sys.exit()
    if "foundation" not in asked.dtypes:
        foundation = one_dtype(config.foundation, config.model, by_flag="model" in asked.dtypes)
        config = config.model_copy(update={"foundation": foundation})
    named = ", ".join(secrets_in(config.resolved()))
    if named:
        raise UserError(
            f"{named}: a secret, and settings are copied to {config.directory}. Give tokens as"
            " HF_TOKEN."
        )
    return config if config.report_only else completed(config)


def completed(config: RunConfig) -> RunConfig:
    """The configuration with the usual place of its data, and without a model where that is asked
    for and none is here.

    Raises UserError for `tiny` on photographs where nobody named it, and for a data directory that
    is not read.
    """
    if config.data_dir is not None and config.data.type == recipes.DRAWN:
        raise UserError(
            f"--data_dir {config.data_dir}: the data set is `shapes`, which is drawn and reads no"
            " files. Name what lies there by --dataset_name, such as jsonl for triplets of your"
            " own (docs/datasets.md), or by --config."
        )
    notices.refuse_unnamed(config)
    if config.retrieval_fallback == "simulated" and config.retrieval == "real":
        config = simulated.instead(config)
    return config.model_copy(
        update=locations.with_default_dirs(config.data, config.data_dir, config.train_dir)
    )


def from_json(path: Path, **changes: Any) -> RunConfig:
    """The configuration a run directory was made with. Raises UserError for a copy that is damaged
    or was changed."""
    content = schema.read(path, "config")
    try:
        return RunConfig(
            **{name: value for name, value in content.items() if name not in NO_SETTINGS}, **changes
        )
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error)}") from None


def save(config: RunConfig, path: Path) -> str:
    """Write a run directory's copy; returns the run's name, a digest of what decides results in its
    first copy."""
    run = run_of(path) if path.exists() else fingerprint(config.decisive())
    write_sealed(path, "config", notices.mark(config) | {"run": run, **config.resolved()})
    return run


def run_of(path: Path) -> str:
    """The name in a run directory's copy."""
    name: str = schema.read(path, "config")["run"]
    return name


def explain(error: ValidationError, program: str = PROGRAM) -> str:
    """Every problem of a validation error, a line each, with the nearest right name for an unknown
    one."""
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            near = suggestions.settings_like(where, RunConfig)
            message = "unknown setting" + (f"; did you mean {' or '.join(near)}?" if near else "")
        elif problem["type"] == "union_tag_invalid":
            where += ".type"
            given, tags = problem["ctx"]["tag"], problem["ctx"]["expected_tags"]
            near = suggestions.types_like(str(given), [tag.strip(" '") for tag in tags.split(",")])
            message = (
                f"should be one of {tags} (given: {given!r}{f'; see {near[0]}' if near else ''})"
            )
        else:
            message += (
                f" (given: {problem['input']!r:.200})"
                if not isinstance(problem["input"], (dict, BaseModel))
                else ""
            )
        lines.append(f"  {where or 'settings'}: {message}")
    return (
        f"{len(lines)} problem{'s' * (len(lines) > 1)} in the configuration:\n"
        + "\n".join(lines)
        + f"\nAll settings: {program} {cli_help.HELP_ALL if program == PROGRAM else cli_help.HELP}"
    )
