"""Where an engine's models come from: a run, or one model as it was published (zero-shot)."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from pydantic import TypeAdapter, ValidationError

from cirloop.artifacts.store import Store
from cirloop.backbones.base import Backbone
from cirloop.backbones.config import (
    BackboneConfig,
    Blip2Settings,
    ClipCombinerSettings,
    LlavaSettings,
    Qwen2VLSettings,
    Qwen3VLSettings,
    Qwen25VLSettings,
)
from cirloop.backbones.model_settings import VlmSettings
from cirloop.backbones.weights import TINY, model_type, resolve
from cirloop.cli.iterations import BASE, BEST, done_iterations, find_best, select_iteration
from cirloop.config import notices
from cirloop.config.run_dir import CONFIG
from cirloop.config.runtime import Runtime
from cirloop.evaluation.best import Best
from cirloop.io import parse
from cirloop.stages.context import adapter_path, run_directory
from cirloop.tools.search.config import SearchOptions
from cirloop.types import UserError

DEFAULT_CACHE = Path("experiments") / "cache"
"""Where vectors are kept without a run: where runs in `experiments/` keep theirs."""
OPEN_CLIP = "open_clip_config.json"
Family = Blip2Settings | LlavaSettings | Qwen2VLSettings | Qwen25VLSettings | Qwen3VLSettings
FAMILIES: dict[str, type[Family]] = {
    "qwen2_vl": Qwen2VLSettings,
    "qwen2_5_vl": Qwen25VLSettings,
    "qwen3_vl": Qwen3VLSettings,
    "llava": LlavaSettings,
    "llava_next": LlavaSettings,
    "llava_onevision": LlavaSettings,
    "blip-2": Blip2Settings,
}
"""What a config.json says of its `model_type` -> settings of that family."""


class ModelSource(Protocol):
    """The models that an engine may load, by their labels; `name` is shown on the page."""

    name: str
    notices: list[str]
    cache: Path
    runtime: Runtime

    def labels(self) -> list[str]: ...

    def label(self, iteration: str) -> str: ...

    def best(self) -> Best | None: ...

    def build(self, label: str) -> Backbone: ...


class RunModels:
    """The base model of a run and those of its finished iterations; the run may go on."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.config, _ = run_directory(directory)
        notices.refuse_simulated(self.config, "to search with")
        self.name = f"the models of {directory.absolute().name}"
        self.notices = notices.of(self.config)
        self.cache = self.config.cache
        self.runtime = self.config.runtime
        self._best: dict[frozenset[str], str] = {}
        """The best iteration, by the artifacts that there are."""

    def labels(self) -> list[str]:
        """Return the models there are by now: `base`, and the finished iterations."""
        return [BASE, *map(str, done_iterations(self._store()))]

    def label(self, iteration: str) -> str:
        """Return the label of an iteration by name. Raises UserError for one that there is not."""
        store = self._store()
        if iteration != BEST:
            return select_iteration(iteration, store)
        names = frozenset(store.names)
        if names not in self._best:
            self._best = {names: select_iteration(BEST, store)}
        return self._best[names]

    def best(self) -> Best | None:
        """Return what the best iteration is by now; None where none is evaluated."""
        return find_best(self._store())

    def build(self, label: str) -> Backbone:
        """Load a model's weights."""
        checkpoint = None if label == BASE else self._store().load(f"checkpoint_iter_{label}")
        return self.config.model.build(adapter_path(checkpoint))

    def _store(self) -> Store:
        return run_directory(self._directory)[1]


class NamedModel:
    """A model that no run has trained."""

    def __init__(self, name: str) -> None:
        self._settings = settings_of(name)
        self._settings.resolve_dir()
        self.name = f"the model {Path(name).name}, which no run has trained (zero-shot)"
        is_tiny = self._settings.path == TINY
        self.notices = [notices.TINY_ON_PHOTOGRAPHS.format("embedder")] if is_tiny else []
        self.cache = DEFAULT_CACHE
        self.runtime = Runtime()

    def labels(self) -> list[str]:
        return [BASE]

    def label(self, iteration: str) -> str:
        """Return the one label. Raises UserError for another."""
        if iteration not in (BASE, BEST):
            raise UserError(f"iteration {iteration}: {self.name} has none.")
        return BASE

    def best(self) -> Best | None:
        return None

    def build(self, label: str) -> Backbone:
        """Load the weights."""
        assert label == BASE
        return self._settings.build()


def source_of(options: SearchOptions) -> ModelSource:
    """Return what the flags name. Raises UserError where it cannot be used."""
    if options.experiment_dir is not None:
        return RunModels(options.experiment_dir)
    assert options.model is not None
    return NamedModel(options.model)


def settings_of(name: str) -> BackboneConfig:
    """Return the settings of a model: of a directory, a hub name, `tiny`, open_clip's
    ARCHITECTURE:TAG, or the `model` of a recipe. Raises UserError for one that is none of them."""
    path = parse.expand_user(name)
    if path.suffix in (".yaml", ".yml"):
        return _of_recipe(path)
    if (path / CONFIG).is_file() and (path / "manifest.json").is_file():
        raise UserError(f"--model {name} is a run. Give it by --experiment_dir {name}.")
    if (path / OPEN_CLIP).is_file():
        return ClipCombinerSettings(path=name, combiner="sum")
    architecture, colon, tag = name.partition(":")
    if colon and not path.exists():
        return ClipCombinerSettings(clip=architecture, path=tag, combiner="sum")
    directory = resolve(name)
    family = FAMILIES.get(model_type(str(directory)) or "")
    if family is None:
        raise UserError(
            f"--model {name}: its config.json says model_type {model_type(str(directory))!r}; the"
            f" families read are {', '.join(FAMILIES)}, and open_clip's by {OPEN_CLIP}."
        )
    return _on_this_machine(family(path=name))


def _on_this_machine(settings: BackboneConfig) -> BackboneConfig:
    """Return the settings in float32 where there is no GPU: processors emulate bfloat16."""
    if torch.cuda.is_available() or not isinstance(settings, VlmSettings):
        return settings
    return settings.model_copy(update={"dtype": "float32"})


def _of_recipe(path: Path) -> BackboneConfig:
    """Return a recipe's model. Raises UserError where it has none, or one that needs training."""
    try:
        content = parse.read_yaml(path)
        settings: BackboneConfig = TypeAdapter(BackboneConfig).validate_python(content["model"])
    except (ValidationError, KeyError, TypeError) as error:
        raise UserError(f"--model {path} has no `model` that can be used: {error}") from None
    if settings.type == "simulated":
        raise UserError(f"--model {path}: simulated retrieval has no model to search with.")
    if isinstance(settings, ClipCombinerSettings) and (
        settings.combiner != "sum" or settings.project_images
    ):
        raise UserError(
            f"--model {path}: the weights of a combiner and of project_images are drawn until a run"
            " trains them. Set combiner: sum and no project_images."
        )
    return settings
