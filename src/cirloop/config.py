"""A run's configuration: YAML under flags, strict, one resolved copy per run.

Precedence: flags, then with `--fast_mode` the config's `_fast.yaml` twin, then the config file, then the defaults.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError
from pydantic_settings import BaseSettings, CliApp, CliSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict, YamlConfigSettingsSource

from cirloop.backbones.config import BackboneConfig, Qwen2VLSettings
from cirloop.captioning.config import CaptioningSettings, FoundationConfig, Qwen2VLFoundation
from cirloop.data.config import DataConfig, ShapesSettings
from cirloop.negatives import MinerConfig, TopK
from cirloop.settings import Settings
from cirloop.training.config import TrainingSettings
from cirloop.types import UserError


class Evaluation(Settings):
    """What is evaluated after each iteration."""

    split: Literal["val", "test"] = "val"
    base: bool = True
    """Also evaluate the base model, before any training."""


class Runtime(Settings):
    """Settings that cannot change results; outside every fingerprint."""

    embed_batch_size: int = Field(64, ge=1)
    caption_batch_size: int = Field(32, ge=1)
    search: Literal["exact", "faiss"] = "exact"
    num_processes: int = Field(1, ge=1)
    """Processes of a training stage; more than one run in a child under `accelerate launch`."""
    accelerate_config: Path | None = None
    """An `accelerate launch --config_file`."""
    deepspeed: Path | None = None
    """A DeepSpeed JSON; the training stage runs under DeepSpeed."""
    cache_dir: Path | None = None
    """Where vision features are kept; by default `cache/` beside the run directory."""
    save_every: int = Field(50, ge=0)
    """Steps between step checkpoints; 0 = none."""


class RunConfig(BaseSettings):
    """The settings of one run."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_shortcuts={
            "model.type": "model_backbone",
            "model.path": "model_path",
            "foundation.type": "foundation_model_backbone",
            "foundation.path": "foundation_model_path",
            "data.type": "dataset_name",
            "mining.type": "negative_strategy",
            "mining.k": "hard_negative_k",
            "training.batch_size": "batch_size",
            "training.learning_rate": "learning_rate",
            "runtime.num_processes": "num_processes",
            "runtime.accelerate_config": "accelerate_config",
            "runtime.deepspeed": "deepspeed",
        },
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
    data_dir: Path | None = None
    """Where the data set's files are; `shapes` is drawn and needs none."""
    num_iterations: int = Field(3, ge=0)
    """Rounds of mine, caption, train, evaluate after the warm-up."""
    seed: int = Field(0, ge=0)
    model: BackboneConfig = Qwen2VLSettings()
    foundation: FoundationConfig = Qwen2VLFoundation()
    data: DataConfig = ShapesSettings()
    mining: MinerConfig = TopK()
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
        """The settings that decide results, as JSON. `num_iterations` is not among them: a run may be prolonged."""
        keep = {"seed", "model", "foundation", "data", "mining", "captioning", "training", "evaluation"}
        return self.model_dump(mode="json", include=keep)

    def resolved(self) -> dict[str, Any]:
        """Everything, as JSON, for the run directory's `config.json`."""
        return self.model_dump(mode="json", exclude={"auto_resume", "resume_from_iteration", "dry_run", "experiment_dir"})


class _Parser(argparse.ArgumentParser):
    """argparse, with errors as UserError and without guessing at shortened flags."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"allow_abbrev": False}))

    def error(self, message: str) -> NoReturn:
        unknown = [word.split("=")[0] for word in message.split() if word.startswith("--")]
        flags = [flag for action in self._actions for flag in action.option_strings]
        near = sorted({n for word in unknown for n in difflib.get_close_matches(word, flags, n=2)})
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"{message}.{hint} All flags: {self.prog} --help")


def load(argv: Sequence[str], default_config: Path) -> RunConfig:
    """The configuration of a command line. Raises UserError with every problem found."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--config", type=Path, default=default_config)
    peek.add_argument("--fast_mode", action="store_true")
    known, _ = peek.parse_known_args(list(argv))
    files = [known.config]
    if known.fast_mode:
        files.append(known.config.with_name(f"{known.config.stem}_fast{known.config.suffix}"))
    for path in files:
        _check_yaml(path, fast=path != known.config)

    class Parsed(RunConfig):
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (init_settings, YamlConfigSettingsSource(settings_cls, yaml_file=files, deep_merge=True))

    Parsed.__doc__ = RunConfig.__doc__
    try:
        source: Any = CliSettingsSource(Parsed, root_parser=_Parser(prog="train_iterative.py", description=RunConfig.__doc__))
        config = CliApp.run(Parsed, cli_args=list(argv), cli_settings_source=source)
    except ValidationError as error:
        raise UserError(explain(error)) from None
    if config.data_dir is not None and config.data.type == "shapes":
        raise UserError("--data_dir: the data set `shapes` is drawn and reads no files. Leave the flag out.")
    return config


def from_json(path: Path, **changes: Any) -> RunConfig:
    """The configuration a run directory was made with."""
    try:
        return RunConfig(**(json.loads(path.read_text("utf-8")) | changes))
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error)}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}). Restore it, or use another --experiment_dir.") from None


def _check_yaml(path: Path, fast: bool) -> None:
    if not path.is_file():
        flag = "--fast_mode needs" if fast else "--config:"
        there = ", ".join(sorted(p.name for p in path.parent.glob("*.yaml"))) if path.parent.is_dir() else ""
        raise UserError(f"{flag} {path}: there is no such file. In {path.parent}: {there or 'no YAML files'}.")
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must be a mapping of settings, found {type(content).__name__}.")


def explain(error: ValidationError) -> str:
    """Every problem of a validation error, a line each, with the nearest right name for an unknown one."""
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "unknown setting"
            near = difflib.get_close_matches(where.split(".")[-1], _names(), n=2)
            message += f"; did you mean {' or '.join(near)}?" if near else ""
        else:
            message += f" (given: {problem['input']!r})" if not isinstance(problem["input"], (dict, BaseModel)) else ""
        lines.append(f"  {where or 'settings'}: {message}")
    return f"{len(lines)} problem{'s' * (len(lines) > 1)} in the configuration:\n" + "\n".join(lines) + "\nAll settings: train_iterative.py --help"


def _names() -> set[str]:
    names: set[str] = set()

    def walk(model: type[BaseModel]) -> None:
        for name, field in model.model_fields.items():
            names.add(name)
            for kind in (field.annotation, *get_args(field.annotation)):
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    walk(kind)

    walk(RunConfig)
    return names


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines `setting: old -> new`."""
    lines = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines


def settings_key(config: RunConfig, *names: str) -> Any:
    """The part of the decisive settings a stage depends on."""
    return {name: config.decisive()[name] for name in names} | {"seed": config.seed}


