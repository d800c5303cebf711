"""What settings come to that are left to the program (None): for the report, beside what was
set."""

from __future__ import annotations

from cirloop.backbones.config import Blip2Settings, ClipCombinerSettings
from cirloop.backbones.model_settings import VlmSettings
from cirloop.config.run import RunConfig


def used(config: RunConfig) -> dict[str, str]:
    """Return by dotted name what is used of automatic settings that were left out. Raises UserError
    for a prompt that does not exist."""
    values = {
        "training.finetuning": "lora" if isinstance(config.model, VlmSettings) else "full",
        "runtime.cache_dir": str(config.cache),
        "runtime.report_examples": "4 won, 4 lost, 6 mined, 4 texts",
        "training.augmented_rounds": "all",
        "captioning.max_per_iteration": "all",
        "captioning.max_per_query_in_all": "any number",
    }
    if isinstance(config.model, VlmSettings):
        values["model.query_prompt"] = f"that of {config.model.prompt_format}"
        values["model.document_prompt"] = f"that of {config.model.prompt_format}"
    if isinstance(config.model, Blip2Settings):
        values["model.pad_ratio"] = "squeezed into a square"
    if isinstance(config.model, ClipCombinerSettings):
        values["model.cache_texts"] = "yes, but for CLIP's own text tower"
    if isinstance(config.model, ClipCombinerSettings | Blip2Settings):
        values["training.trainable_patterns"] = "the model's own"
    if config.captioning.enabled:
        prompts = config.captioning.prompts(config.foundation)
        values["captioning.rewrite_prompt"] = prompts.rewrite.name
        values["captioning.verify_prompt"] = prompts.verify.name
    if config.data_dir is not None:
        values["train_dir"] = str(config.data_dir)
    return values
