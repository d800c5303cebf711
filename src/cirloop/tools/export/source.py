"""What is exported: one iteration of a run. Everything that can be known to fail is found here,
before any work."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from cirloop.artifacts.store import Artifact, Store
from cirloop.backbones.config import BackboneConfig
from cirloop.backbones.model_settings import VlmSettings
from cirloop.backbones.weights import LORA_CONFIG
from cirloop.cli.iterations import BASE, BEST, LAST, done_iterations, select_iteration
from cirloop.config import notices
from cirloop.config.run import RunConfig
from cirloop.io import parse
from cirloop.stages.context import adapter_path, run_directory
from cirloop.tools.export.config import SENTENCE_TRANSFORMERS, ExportConfig
from cirloop.tools.export.prompt_spec import numbers_images_as_text
from cirloop.validation import ValidationReport

logger = logging.getLogger(__name__)
ADAPTER = "adapter"


@dataclass(frozen=True, slots=True)
class ExportSource:
    """The model of an iteration, and what was asked for it. `base` is the local directory of its
    base, `hub` the base's name there if it has one (a base without a name travels with an adapter),
    `lora` whether LoRA was trained, and not parts in full."""

    options: ExportConfig
    config: RunConfig
    settings: VlmSettings
    store: Store
    checkpoint: Artifact
    base: Path
    hub: str | None
    lora: bool

    @property
    def iteration(self) -> int:
        """The number of the iteration."""
        return int(self.options.iteration)

    @property
    def target_dir(self) -> Path:
        """The directory that the export becomes."""
        directory = self.options.experiment_dir / "export"
        return self.options.output or directory / f"iter_{self.iteration}_{self.options.format}"

    @property
    def name(self) -> str:
        """The name that the card gives the export: of its repository, or of its directory."""
        return self.options.push_to_hub or self.target_dir.name


def load_source(options: ExportConfig) -> ExportSource:
    """Load what is exported. Raises UserError with all that keeps this iteration from being
    exported to this format."""
    config, store = run_directory(options.experiment_dir)
    notices.refuse_simulated(config, "to export")
    for notice in notices.of(config):
        logger.warning("%s", notice)
    if options.iteration in (BEST, LAST):
        label = select_iteration(options.iteration, store)
        options = options.model_copy(update={"iteration": label})
    checkpoint = _checkpoint(store, options.iteration)
    trained = checkpoint is not None and adapter_path(checkpoint) is not None
    lora = checkpoint is None or (checkpoint.path / LORA_CONFIG).is_file()
    settings = config.model
    problems = ValidationReport()
    if not trained:
        problems.add(*_untrained(options, store, checkpoint))
    problem = _unexportable(settings, options.format)
    if problem:
        problems.add(f"--format {options.format}", problem)
    if options.format == ADAPTER and trained and not lora:
        problems.add(
            "--format adapter",
            "parts were trained in full, there is no LoRA. Give --format merged.",
        )
    problems.raise_if_any("Nothing was written.")
    assert isinstance(settings, VlmSettings) and checkpoint is not None
    local = settings.path == "tiny" or parse.expand_user(settings.path).exists()
    hub = None if local else settings.path
    return ExportSource(
        options, config, settings, store, checkpoint, settings.resolve_dir(), hub, lora
    )


def _checkpoint(store: Store, iteration: str) -> Artifact | None:
    """Return the checkpoint of a finished iteration, None where there is no such iteration."""
    if iteration in map(str, done_iterations(store)):
        return store.load(f"checkpoint_iter_{iteration}")
    return None


def _untrained(options: ExportConfig, store: Store, checkpoint: Artifact | None) -> tuple[str, str]:
    """Return the problem of an iteration without trained weights: the flag, and what is wrong."""
    checkpoints = [store.directory / f"checkpoint_iter_{n}" for n in done_iterations(store)]
    trained = [path.name.split("_")[-1] for path in checkpoints if [*path.glob("*.safetensors")]]
    if options.iteration == BASE:
        problem = "the base model is not trained: use it as it is."
    elif checkpoint is None:
        problem = f"no such iteration in {options.experiment_dir}."
    else:
        problem = "was trained for 0 steps, so it is the base model."
    return (
        f"--iteration {options.iteration}",
        f"{problem} There are: {', '.join(trained) or 'none'}.",
    )


def _unexportable(settings: BackboneConfig, export_format: str) -> str:
    """Return why a model with these settings cannot be had in a format; empty where it can."""
    if not isinstance(settings, VlmSettings):
        return (
            f"a model of type {settings.type} is made of parts that neither transformers nor"
            " sentence-transformers puts together without code of cirloop. Its vectors can be"
            " exported: python -m cirloop.export_vectors."
        )
    if settings.quantization != "none":
        return (
            f"the run's base has weights of {settings.quantization}; on other weights the LoRA"
            " gives other vectors. The checkpoint itself is an adapter that PEFT loads on the"
            " quantized base."
        )
    if export_format == SENTENCE_TRANSFORMERS and numbers_images_as_text(settings):
        return (
            f"model.prompt_format {settings.prompt_format} numbers the tokens of an image one after"
            " another, which sentence-transformers cannot tell the model, so vectors would be"
            " others. Give --format merged or adapter, whose card has the code."
        )
    return ""
