"""Check, before work begins, that packing and compiling change no embedding and no gradient.

A few items of unequal lengths, with the prompts of the settings and random vision tokens, go
through the language model both ways. A difference larger than rounding is refused.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Literal

import torch
import torch._dynamo
from torch._dynamo.exc import TorchDynamoException

from cirloop.backbones.base import EmbedInput, Grid, ImageFeatures, Inputs
from cirloop.types import ImageId, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cirloop.backbones.vlm import VlmEmbedder

logger = logging.getLogger(__name__)
Stance = Literal["force_eager", "default"]
"""Stance of torch.compiler: compiled layers run as written, or compiled."""
LIMITS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest distance of two unit-norm embeddings of an item, by dtype.

A sum in another order is rounded differently in every layer: bfloat16 by 2^-9, about six times in
each of 28 layers, at random: 2^-9 * sqrt(6 * 28) = 0.025, and twice that is allowed. float16 rounds
eight times finer. Rows that leak into each other differ by tenths."""
GRADIENT_LIMITS = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.3}
"""Largest distance of two gradients, as a share of their norm: they pass all layers twice."""
NUM_COMPILATIONS = 32
TEXTS = (
    "is red",
    None,
    "is the same one in another colour, with a longer skirt, short sleeves and no belt at all",
)
GRIDS: tuple[Grid, ...] = ((1, 4, 4), (1, 2, 6), (1, 8, 4))


def compile_layers(language_model: PreTrainedModel) -> None:
    """Compile each layer by itself and in place, which leaves the names of weights alone.

    One compilation serves all layers and all lengths. Dropout is drawn as without compiling, so
    that gradient caching draws the same twice.
    """
    # Embedding, training and gradient caching's first pass need some each, one-row batches others:
    # more than torch's 8, beyond which it would continue without compiling.
    torch._dynamo.config.recompile_limit = max(  # no public name
        torch._dynamo.config.recompile_limit,
        NUM_COMPILATIONS,
    )
    for layer in language_model.layers:
        layer.compile(dynamic=True, options={"fallback_random": True})


def eager_mode() -> AbstractContextManager[None]:
    """Run compiled layers as they were written."""
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def probe_batch(embedder: VlmEmbedder) -> Inputs:
    """Return inputs of three items, with 4 to 8 vision tokens each for Qwen's grids.

    The vision tokens are random, and the same each time.
    """
    config = embedder.vlm.config.text_config
    generator = torch.Generator().manual_seed(0)
    width = embedder.vision_width()
    vision = []
    for grid in GRIDS:
        tokens = torch.randn(embedder.num_image_tokens(grid), width, generator=generator)
        vision.append(ImageFeatures(tokens * config.initializer_range, grid))
    items = [EmbedInput(ImageId(str(number)), text) for number, text in enumerate(TEXTS)]
    return embedder.inputs(items, vision)


def check_embeddings(embedder: VlmEmbedder) -> None:
    """Raise UserError where `model.packed` or `model.compile` changes embeddings."""

    def embeddings(_: str) -> torch.Tensor:
        embedder.module.eval()
        with torch.inference_mode():
            vectors: torch.Tensor = embedder.module(probe_batch(embedder))
        return vectors

    def distance(vectors: torch.Tensor, expected: torch.Tensor) -> float:
        return float((vectors - expected).norm(dim=-1).max())

    _compare(embedder, "embeddings", embeddings, distance, LIMITS)


def check_gradient(embedder: VlmEmbedder) -> None:
    """Raise UserError where `model.packed` or `model.compile` changes a weight's gradient."""
    weight = _probe_weight(embedder.trainable())

    def gradient(setting: str) -> torch.Tensor:
        """Compute a gradient; packed rows draw another dropout than padded ones, so without it."""
        embedder.module.train(setting == "compile")
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            vectors = embedder.module(probe_batch(embedder))
        direction = torch.linspace(-1, 1, vectors.numel(), device=vectors.device)
        loss = (vectors * direction.view_as(vectors)).sum()
        gradient = torch.autograd.grad(loss, weight, allow_unused=True)[0]
        return torch.zeros_like(weight) if gradient is None else gradient

    def distance(gradient: torch.Tensor, expected: torch.Tensor) -> float:
        return float((gradient - expected).norm() / expected.norm())

    _compare(embedder, "gradients", gradient, distance, GRADIENT_LIMITS)


def _probe_weight(trainable: dict[str, torch.nn.Parameter]) -> torch.nn.Parameter:
    """Return the smallest matrix of the first layers.

    lora_A is left out, since its gradient is zero at first. Matrices of keys come last, since their
    gradient is small compared to its rounding.
    """
    named = [(name, weight) for name, weight in trainable.items() if "lora_A" not in name]
    return min(named, key=lambda pair: (pair[1].ndim < 2, pair[1].numel(), "k_proj" in pair[0]))[1]


def _compare(
    embedder: VlmEmbedder,
    quantity: str,
    compute: Callable[[str], torch.Tensor],
    distance: Callable[[torch.Tensor, torch.Tensor], float],
    limits: dict[str, float],
) -> None:
    """Compare the result of `compute` with and without each setting, one after the other."""
    settings = embedder.settings
    limit = limits[settings.dtype]
    for setting in ("packed", "compile"):
        if not getattr(settings, setting):
            continue
        began = time.monotonic()
        with _forced_path(embedder, settings.packed and setting != "packed", "force_eager"):
            expected = compute(setting)
        stance: Stance = "default" if setting == "compile" else "force_eager"
        with _forced_path(embedder, settings.packed, stance):
            difference = distance(_compute_compiled(compute, setting), expected)
        if not difference <= limit:  # also where it is not a number
            raise UserError(
                f"model.{setting} changes {quantity}: by {difference:.2g} on a few items, at most"
                f" {limit:g} is rounding in {settings.dtype}. Set model.{setting} false."
            )
        logger.info(
            "model.%s gives the same %s, to %.1e; checked in %.1f s",
            setting,
            quantity,
            difference,
            time.monotonic() - began,
        )


def _compute_compiled(compute: Callable[[str], torch.Tensor], setting: str) -> torch.Tensor:
    try:
        return compute(setting)
    except TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.compile: torch.compile does not work here: {reason}\nOn a CPU it needs a C++"
            " compiler (install g++, or name one by CXX), on a GPU Triton and a C compiler. Or set"
            " model.compile false."
        ) from error


@contextmanager
def _forced_path(embedder: VlmEmbedder, packed: bool, stance: Stance) -> Iterator[None]:
    """Run the module packed or not and compiled or not; restore it and its modes afterwards."""
    before = embedder.module.packed
    embedder.module.packed = packed
    modes = [(module, module.training) for module in embedder.module.modules()]
    try:
        with torch.compiler.set_stance(stance):
            yield
    finally:
        embedder.module.packed = before
        for module, mode in modes:
            module.training = mode
