"""A run's configuration: YAML under flags, strict, one resolved copy per run.

Precedence: flags, with `--fast_mode` the config's `_fast.yaml` twin, the config file, defaults.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from cirloop import flags, reading, schemas
from cirloop.artifacts import fingerprint, write_sealed
from cirloop.backbones.config import BackboneConfig, Qwen2VLSettings
from cirloop.captioning.config import CaptioningSettings, FoundationConfig, Qwen2VLFoundation
from cirloop.data.config import DataConfig, ShapesSettings
from cirloop.negatives import MinerConfig, TopK
from cirloop.negatives.attributes.config import AttributeSettings
from cirloop.runtime import Runtime
from cirloop.settings import Settings
from cirloop.shown import secrets_in
from cirloop.training.config import TrainingSettings
from cirloop.types import UserError

logger = logging.getLogger(__name__)
PROGRAM = "train_iterative.py"
TYPED = {
    "data": "dataset_name",
    "mining": "negative_strategy",
    "model": "model_backbone",
    "foundation": "foundation_model_backbone",
    "training.loss": "loss",
}
"""Groups of settings that a flag may give another type, and the flag."""
NO_SETTINGS = ("schema", "run", "digest")
"""What a run directory's `config.json` holds besides."""


class Evaluation(Settings):
    """What is evaluated after each iteration."""

    split: Literal["val", "test"] = Field("val", description="What iterations are evaluated on.")
    base: bool = True
    """Also evaluate the base model, before any training."""


LAST_WORD = (
    *("data.allow_missing_images", "data.categories", "mining.n_def", "training.batch_size", "training.learning_rate"),
    *("training.skip_bad_batches", "runtime.num_processes", "runtime.accelerate_config", "runtime.deepspeed"),
    *("runtime.profile", "runtime.control", "runtime.report_to", "runtime.allow_symlinks"),
)
"""Settings whose last word alone is a flag too."""
SHORTCUTS = {
    **{name: name.rpartition(".")[2] for name in LAST_WORD},
    "model.type": "model_backbone",
    "model.path": "model_path",
    "foundation.type": "foundation_model_backbone",
    "foundation.path": "foundation_model_path",
    "data.type": "dataset_name",
    "mining.type": "negative_strategy",
    "mining.k": "hard_negative_k",
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
    """Write report.html of --experiment_dir anew from what is finished there, and do nothing else."""
    data_dir: Path | None = None
    """Where the data set's files are; `shapes` is drawn and needs none."""
    train_dir: Path | None = None
    """Where the files of `data.train` are, for benchmarks without a training split; by default --data_dir."""
    num_iterations: int = Field(3, ge=0)
    """Rounds of mine, caption, train, evaluate after the warm-up."""
    seed: int = Field(0, ge=0, description="Of all random numbers of the run.")
    model: BackboneConfig = Qwen2VLSettings()
    foundation: FoundationConfig = Qwen2VLFoundation()
    data: DataConfig = ShapesSettings()
    mining: MinerConfig = TopK()
    attributes: AttributeSettings | None = None
    """What images show and texts ask for, for the negative strategies that compare attributes."""
    captioning: CaptioningSettings = CaptioningSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: Evaluation = Evaluation()
    runtime: Runtime = Runtime()

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)

    @property
    def directory(self) -> Path:
        return self.experiment_dir or Path("experiments") / f"{self.model.type}_{self.data.type}_iterative"

    @property
    def cache(self) -> Path:
        return self.runtime.cache_dir or self.directory.parent / "cache"

    def decisive(self) -> dict[str, Any]:
        """The settings that decide results, as JSON. `num_iterations` is not one: a run may be prolonged. Neither is
        `training.skip_bad_batches`: a finished stage left out the bad batches that it had, whatever the limit."""
        keep = {"seed", "model", "foundation", "data", "mining", "attributes", "captioning", "training", "evaluation"}
        return self.model_dump(mode="json", include=keep, exclude={"training": {"skip_bad_batches"}})

    def resolved(self) -> dict[str, Any]:
        """Everything, as JSON, for the run directory's `config.json`."""
        asked = {"config", "fast_mode", "auto_resume", "resume_from_iteration", "dry_run", "report_only"}
        return self.model_dump(mode="json", exclude={*asked, "experiment_dir"})


def load(argv: Sequence[str], default_config: Path) -> RunConfig:
    """The configuration of a command line. Raises UserError with every problem found."""
    peek = flags.Parser(prog=PROGRAM, add_help=False)
    peek.add_argument("--config", type=Path, default=default_config)
    peek.add_argument("--fast_mode", action="store_true")
    for group, flag in TYPED.items():
        peek.add_argument(f"--{flag}", f"--{group}.type", dest=group)
    known, _ = peek.parse_known_args(list(argv))
    types = {group: getattr(known, group) for group in TYPED if getattr(known, group) is not None}
    files = [known.config]
    if known.fast_mode:
        files.append(known.config.with_name(f"{known.config.stem}_fast{known.config.suffix}"))
    for path in files:
        _check_yaml(path, fast=path != known.config)

    class Parsed(RunConfig):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            *_: Any,
            **__: Any,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            source = YamlConfigSettingsSource(settings_cls, yaml_file=files, deep_merge=True)
            for name in NO_SETTINGS if "schema" in source.init_kwargs else ():
                source.init_kwargs.pop(name, None)
            for group, type_ in types.items():
                *outer, name = group.split(".")
                node: Any = source.init_kwargs
                for part in outer:
                    node = node.setdefault(part, {}) if isinstance(node, dict) else node
                if isinstance(node, dict):
                    node[name] = _of_type(node.get(name, {}), group, type_)
            return (init_settings, source)

    Parsed.__doc__ = RunConfig.__doc__
    try:
        config = flags.parse(Parsed, argv, PROGRAM)
    except ValidationError as error:
        raise UserError(explain(error)) from None
    named = ", ".join(secrets_in(config.resolved()))
    if named:
        raise UserError(f"{named}: a secret, and settings are copied to {config.directory}. Give tokens as HF_TOKEN.")
    return config


def _of_type(settings: Any, group: str, type_: str) -> Any:
    """A file's settings of a group whose type a flag changes: those that the new type has too."""
    if not isinstance(settings, dict) or settings.get("type") == type_:
        return settings
    union: Any = RunConfig
    for part in group.split("."):
        union = union.model_fields[part].annotation
    known = {n for kind in get_args(union) if kind.model_fields["type"].default == type_ for n in kind.model_fields}
    left = [name for name in settings if name not in known]
    if left and known:
        logger.info("%s.type is %s by flag: the file's %s left out", group, type_, ", ".join(sorted(left)))
    return {name: value for name, value in settings.items() if name in known or not known}


def from_json(path: Path, **changes: Any) -> RunConfig:
    """The configuration a run directory was made with. Raises UserError for a copy that is damaged or was changed."""
    content = schemas.read(path, "config")
    try:
        return RunConfig(**{name: value for name, value in content.items() if name not in NO_SETTINGS}, **changes)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error)}") from None


def save(config: RunConfig, path: Path) -> str:
    """Write a run directory's copy; returns the run's name, a digest of what decides results in its first copy."""
    run = run_of(path) if path.exists() else None
    run = run or fingerprint(config.decisive())
    write_sealed(path, "config", {"run": run, **config.resolved()})
    return run


def run_of(path: Path) -> str | None:
    """The name in a run directory's copy; None in one of an older version."""
    name: str | None = schemas.read(path, "config").get("run")
    return name


def _check_yaml(path: Path, fast: bool) -> None:
    if not path.is_file():
        flag = "--fast_mode needs" if fast else "--config:"
        there = ", ".join(sorted(p.name for p in path.parent.glob("*.yaml"))) if path.parent.is_dir() else ""
        raise UserError(f"{flag} {path}: there is no such file. In {path.parent}: {there or 'no YAML files'}.")
    try:
        content = reading.yaml_file(path)
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must be a mapping of settings, found {type(content).__name__}.")
    odd = [key for key in content if not isinstance(key, str)]
    if odd:
        raise UserError(f"{path}: names of settings are words, found {odd[0]!r}.")
    for flag in {"config", "fast_mode"} & content.keys():
        raise UserError(f"{path}: `{flag}` is for the command line, not for a file. Give it as --{flag}.")


def explain(error: ValidationError, program: str = PROGRAM) -> str:
    """Every problem of a validation error, a line each, with the nearest right name for an unknown one."""
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            near = _near(where)
            message = "unknown setting" + (f"; did you mean {' or '.join(near)}?" if near else "")
        elif problem["type"] == "union_tag_invalid":
            where += ".type"
            message = f"should be one of {problem['ctx']['expected_tags']} (given: {problem['ctx']['tag']!r})"
        else:
            message += (
                f" (given: {problem['input']!r:.200})" if not isinstance(problem["input"], (dict, BaseModel)) else ""
            )
        lines.append(f"  {where or 'settings'}: {message}")
    return (
        f"{len(lines)} problem{'s' * (len(lines) > 1)} in the configuration:\n"
        + "\n".join(lines)
        + f"\nAll settings: {program} --help"
    )


def _near(where: str) -> list[str]:
    """At most two settings, dotted, with a name like the last part of `where`; those of its group first."""
    group, _, name = where.rpartition(".")
    names = _names() - {where}
    like = difflib.get_close_matches(name, {n.rpartition(".")[2] for n in names})
    near = [n for n in names if n.rpartition(".")[2] in like]
    near.sort(key=lambda n: (n.rpartition(".")[0] != group, like.index(n.rpartition(".")[2]), n))
    return near[:2]


def _names() -> set[str]:
    """Every setting, dotted; where a group has a type, with the type between as pydantic names it."""
    names: set[str] = set()

    def walk(model: type[BaseModel], prefix: str) -> None:
        for name, field in model.model_fields.items():
            names.add(prefix + name)
            kinds = get_args(field.annotation) if field.discriminator else (field.annotation,)
            for kind in kinds:
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    tag = f"{kind.model_fields['type'].default}." if field.discriminator else ""
                    walk(kind, f"{prefix}{name}.{tag}")

    walk(RunConfig, "")
    return names
