"""One model in memory: a captioner on the embedder's weights, with the embedder's adapter off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from cirloop.backbones.numerics_check import eager_mode

if TYPE_CHECKING:
    from cirloop.backbones.adapter import TrainableWeights
    from cirloop.backbones.vlm import VlmEmbedder
    from cirloop.captioning.foundation import Foundation


def can_share_weights(embedder: VlmEmbedder, foundation: Foundation) -> bool:
    """Return whether an embedder with its adapter off is the model that `foundation` asks for.

    That is the same base, with nothing trained but LoRAs on the language model. Parameters trained
    in full cannot be switched off, and vision tokens computed through a LoRA on the vision tower
    must not be cached as the base's.
    """
    if not foundation.shares_base_with(embedder.settings):
        return False
    adapted = [
        name
        for name, layer in embedder.root_module.named_modules()
        if isinstance(layer, BaseTunerLayer)
    ]
    return not embedder.trainable_patterns and all("language_model" in name for name in adapted)


@contextmanager
def adapter_disabled(embedder: TrainableWeights | None) -> Iterator[None]:
    """Run the embedder's model as its base, in evaluation mode, without gradients or compilation.

    Layers are compiled for whole texts only. The adapter, modes and trainable weights are restored
    afterwards. None stands for a captioner with a model of its own.
    """
    if embedder is None:
        with torch.no_grad():
            yield
        return
    root = embedder.root_module
    trainable = {name for name, parameter in root.named_parameters() if parameter.requires_grad}
    modes = [(module, module.training) for module in root.modules()]
    enabled = any(
        isinstance(layer, BaseTunerLayer) and not layer.disable_adapters for layer in root.modules()
    )
    embedder.set_adapter_enabled(False)
    root.eval()
    try:
        with torch.no_grad(), eager_mode():
            yield
    finally:
        embedder.set_adapter_enabled(enabled)
        for name, parameter in root.named_parameters():
            parameter.requires_grad_(name in trainable)
        for module, mode in modes:
            module.training = mode
