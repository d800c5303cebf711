"""One model in memory: a captioner on the embedder's weights, with the embedder's adapter off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from cirloop.backbones.numerics_check import uncompiled

if TYPE_CHECKING:
    from cirloop.captioning.config import Foundation


def lends(embedder: Any, foundation: Foundation) -> bool:
    """Whether an embedder with its adapter off is the model `foundation` asks for: the same base,
    and nothing trained but LoRAs on the language model. Parts trained in full cannot be switched
    off, and what a LoRA on the vision tower sees must not be kept as what the base sees."""
    if not foundation.shares(embedder.settings):
        return False
    adapted = [
        name for name, layer in embedder.core.named_modules() if isinstance(layer, BaseTunerLayer)
    ]
    return not embedder.trained_parts and all("language_model" in name for name in adapted)


@contextmanager
def base_of(embedder: Any | None) -> Iterator[None]:
    """Within, the embedder's model is its base, in evaluation mode, without gradients and as
    written, also where its layers are compiled, which is for whole texts; after, what it was."""
    if embedder is None:
        with torch.no_grad():
            yield
        return
    core = embedder.core
    learning = {name for name, parameter in core.named_parameters() if parameter.requires_grad}
    modes = [(module, module.training) for module in core.modules()]
    on = any(
        isinstance(layer, BaseTunerLayer) and not layer.disable_adapters for layer in core.modules()
    )
    embedder.switch_adapter(False)
    core.eval()
    try:
        with torch.no_grad(), uncompiled():
            yield
    finally:
        embedder.switch_adapter(on)
        for name, parameter in core.named_parameters():
            parameter.requires_grad_(name in learning)
        for module, mode in modes:
            module.training = mode
