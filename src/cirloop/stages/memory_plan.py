"""Peak memory of each stage by arithmetic (`resources.py`), for the plan of a dry run."""

from __future__ import annotations

import torch

from cirloop.backbones.model_settings import VlmSettings
from cirloop.config.run import RunConfig
from cirloop.stages import resources

TEXT_TOKENS = 40
PROMPT_TOKENS = 220
"""Taken for a query's words with their prompt, and for those of a question to the foundation
model."""


def rows_at_once(config: RunConfig) -> int:
    """Return the rows whose activations a training step holds at once.

    These are all rows, or with gradient caching a chunk of each side.
    """
    training = config.training
    return 2 * training.grad_cache_chunk_size or training.batch_size * (
        2 + training.negatives_in_batch
    )


def peak_memory(config: RunConfig, tokens: float) -> dict[str, dict[str, int]]:
    """Return bytes by stage (`embed`, `train`, `caption`) and part, for rows of `tokens` vision
    tokens.

    The arithmetic covers LoRAs on vision-language models; other models and full finetuning give no
    stages.
    """
    model = config.model
    if not isinstance(model, VlmSettings):
        return {}
    training = config.training
    lora = training.lora
    sizes = resources.model_sizes(model.resolve_dir())
    weights = resources.weight_bytes(sizes, model.dtype, model.quantization)
    adapters = resources.adapter_weights(
        sizes, lora.r, lora.target_modules, training.finetuning == "dora"
    )
    row = round(tokens) + TEXT_TOKENS
    batch = config.runtime.max_tokens_per_batch or config.runtime.embed_batch_size * row
    working = resources.working_bytes(sizes, model.dtype, "float32")
    stages = {
        "embed": {"weights": weights, "adapters": 4 * adapters, "working space": batch * working}
    }
    if training.finetuning != "full" and config.trains:
        stages["train"] = {
            "weights": weights,
            **_training_parts(config, model, sizes, adapters, row),
        }
    captioning = config.captioning
    if captioning.enabled and config.num_iterations and config.foundation.shares_base_with(model):
        question = 2 * round(tokens) + PROMPT_TOKENS
        kept = resources.caption_bytes(
            sizes, model.dtype, captioning.batch_size, question, captioning.max_new_tokens
        )
        working = resources.working_bytes(sizes, model.dtype)
        stages["caption"] = {
            "weights": weights,
            "keys and values": kept,
            "working space": captioning.batch_size * question * working,
        }
    return stages


def _training_parts(
    config: RunConfig, model: VlmSettings, sizes: resources.Sizes, adapters: int, row: int
) -> dict[str, int]:
    """Return bytes by part of a training step with rows of `row` tokens, beside the weights."""
    lora = config.training.lora
    half = lora.dtype == "base"
    adapter_dtype = model.dtype if half else "float32"
    per_token = resources.activation_bytes(
        sizes,
        model.dtype,
        adapter_dtype,
        lora.r,
        lora.target_modules,
        lora.dropout,
        not model.packed,
        row if model.attention == "eager" else 0,
        not torch.cuda.is_available(),
    )
    if model.gradient_checkpointing:
        per_token = resources.checkpointed_bytes(sizes, model.dtype, per_token)
    step_tokens = rows_at_once(config) * row
    working = resources.working_bytes(sizes, model.dtype, adapter_dtype)
    trained = resources.trained_bytes(adapters, resources.BYTES[model.dtype] if half else 0)
    return {
        "adapters and optimizer": trained,
        "activations": step_tokens * per_token,
        "working space": step_tokens * working,
    }
