"""The whole model in the run's dtype: a LoRA merged into its base, or parts trained in full in
their places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from cirloop.artifacts.fs import translate_safetensors_error
from cirloop.backbones.weights import PARTS_WEIGHTS
from cirloop.tools.export.source import ExportSource

SHARD = "5GB"


def write(model: ExportSource, directory: Path) -> None:
    """`config.json` and safetensors, as `from_pretrained` reads them."""
    whole = merged(model)
    with translate_safetensors_error(directory):
        whole.save_pretrained(directory, max_shard_size=SHARD)


def merged(model: ExportSource) -> Any:
    """Return the base with what was trained in it, on the CPU."""
    base: Any = AutoModelForImageTextToText.from_pretrained(
        model.base,
        dtype=getattr(torch, model.settings.dtype),
        trust_remote_code=False,
        use_safetensors=True,
    )
    if not model.lora:
        found = base.load_state_dict(load_file(model.checkpoint.path / PARTS_WEIGHTS), strict=False)
        assert not found.unexpected_keys, f"no place for {found.unexpected_keys[:3]}"
        return base.eval()
    from peft import PeftModel

    return (
        PeftModel.from_pretrained(base, str(model.checkpoint.path))
        .merge_and_unload(safe_merge=True)
        .eval()
    )
