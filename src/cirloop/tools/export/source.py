"""What is exported: one iteration of a run. Everything that can be known to fail is found here,
before any work."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from cirloop.artifacts.store import Artifact, Store
from cirloop.backbones.model_settings import VlmSettings
from cirloop.backbones.weights import LORA_CONFIG
from cirloop.cli.evaluate import BASE
from cirloop.cli.runner import done_iterations
from cirloop.config import notices
from cirloop.config.run import RunConfig
from cirloop.io import parse
from cirloop.stages.context import adapter_path, run_directory
from cirloop.tools.export.prompt_spec import numbered
from cirloop.validation import ValidationReport

logger = logging.getLogger(__name__)
ADAPTER = "adapter"
MERGED = "merged"
SENTENCE_TRANSFORMERS = "sentence-transformers"


@dataclass(frozen=True, slots=True)
class ExportSource:
    """The model of an iteration. `base` is the local directory of its base, `hub` the base's name
    there if it has one (a base without a name travels with an adapter), `lora` whether LoRA was
    trained, and not parts in full."""

    config: RunConfig
    settings: VlmSettings
    store: Store
    iteration: int
    checkpoint: Artifact
    base: Path
    hub: str | None
    lora: bool


def trained(directory: Path, iteration: str, to: str) -> ExportSource:
    """Load what is exported. Raises UserError with all that keeps this iteration from being
    exported to format `to`."""
    config, store = run_directory(directory)
    notices.refuse_simulated(config, "to export")
    for notice in notices.of(config):
        logger.warning("%s", notice)
    done = done_iterations(store)
    problems = ValidationReport()
    found = {
        number: store.load(f"checkpoint_iter_{number}")
        for number in done
        if str(number) == iteration
    }
    have = [
        str(n)
        for n in done
        if any((store.directory / f"checkpoint_iter_{n}").glob("*.safetensors"))
    ]
    there = f"There are: {', '.join(have) or 'none'}."
    if iteration == BASE:
        problems.add("--iteration base", f"the base model is not trained: use it as it is. {there}")
    elif not found:
        problems.add(f"--iteration {iteration}", f"no such iteration in {directory}. {there}")
    elif adapter_path(found[int(iteration)]) is None:
        problems.add(
            f"--iteration {iteration}", f"was trained for 0 steps, so it is the base model. {there}"
        )
    settings = config.model
    if not isinstance(settings, VlmSettings):
        problems.add(
            f"--format {to}",
            f"a model of type {settings.type} is made of parts that neither transformers nor"
            " sentence-transformers puts together without code of cirloop. Its vectors can be"
            " exported: python -m cirloop.export_vectors.",
        )
    elif settings.quantization != "none":
        problems.add(
            f"--format {to}",
            f"the run's base has weights of {settings.quantization}; on other weights the LoRA"
            " gives other vectors. The checkpoint itself is an adapter that PEFT loads on the"
            " quantized base.",
        )
    elif to == SENTENCE_TRANSFORMERS and numbered(settings):
        problems.add(
            f"--format {to}",
            f"model.prompt_format {settings.prompt_format} numbers the tokens of an image one after"
            " another, which sentence-transformers cannot tell the model, so vectors would be"
            " others. Give --format merged or adapter, whose card has the code.",
        )
    lora = all((artifact.path / LORA_CONFIG).is_file() for artifact in found.values())
    if to == ADAPTER and found and not lora and adapter_path(found[int(iteration)]) is not None:
        problems.add(
            "--format adapter",
            "parts were trained in full, there is no LoRA. Give --format merged.",
        )
    problems.raise_if_any("Nothing was written.")
    assert isinstance(settings, VlmSettings)
    number = int(iteration)
    base = settings.resolve_dir()
    local = settings.path == "tiny" or parse.expand_user(settings.path).exists()
    return ExportSource(
        config, settings, store, number, found[number], base, None if local else settings.path, lora
    )
