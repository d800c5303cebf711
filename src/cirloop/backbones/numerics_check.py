"""Proof, before work begins, that packed rows and compiled layers give what padded rows and plain
layers give.

A few items of unlike lengths, with the prompts of the settings and random vision tokens, go through
the language model both ways. What differs by more than rounding can is refused.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch._dynamo
from torch._dynamo.exc import TorchDynamoException

from cirloop.backbones.base import Grid, Item, VisionInput
from cirloop.types import ImageId, UserError

logger = logging.getLogger(__name__)
Stance = Literal["force_eager", "default"]
"""torch.compiler's: what is compiled runs as if it were not, or as it is."""
LIMITS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest distance of two unit-norm embeddings of an item. A sum in another order rounds otherwise
in every layer: bfloat16 by 2^-9, about six times in each of 28 layers, at random: 2^-9 * sqrt(6 *
28) = 0.025, and twice that is let pass. float16 rounds eight times finer. Rows that leak into each
other are tenths apart."""
GRADIENT_LIMITS = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.3}
"""The same of a gradient, as a share of its length: it has passed all layers twice."""
NUM_COMPILATIONS = 32
TEXTS = (
    "is red",
    None,
    "is the same one in another colour, with a longer skirt, short sleeves and no belt at all",
)
GRIDS: tuple[Grid, ...] = ((1, 4, 4), (1, 2, 6), (1, 8, 4))


def compile_layers(language_model: Any) -> None:
    """Each layer by itself and in place, which leaves names of weights alone; one compilation
    serves all layers, and all lengths. Dropout is drawn as without compiling, so that gradient
    caching draws the same twice."""
    # Embedding, training and gradient caching's first pass need some each, one-row batches others:
    # more than torch's 8, beyond which it would go on without compiling.
    torch._dynamo.config.recompile_limit = max(
        torch._dynamo.config.recompile_limit, NUM_COMPILATIONS
    )
    for layer in language_model.layers:
        layer.compile(dynamic=True, options={"fallback_random": True})


def uncompiled() -> Any:
    """Within, compiled layers run as they were written."""
    return torch.compiler.set_stance("force_eager")


def items_of(embedder: Any) -> dict[str, Any]:
    """Inputs of three items, 4 to 8 vision tokens each for Qwen's grids; random, and the same each
    time."""
    config = embedder.vlm.config.text_config
    drawn = torch.Generator().manual_seed(0)
    vision = []
    for grid in GRIDS:
        tokens = torch.randn(embedder.image_length(grid), embedder.vision_width(), generator=drawn)
        vision.append(VisionInput(tokens * config.initializer_range, grid))
    items = [Item(ImageId(str(number)), text) for number, text in enumerate(TEXTS)]
    made: dict[str, Any] = embedder.inputs(items, vision)
    return made


def prove_embeddings(embedder: Any) -> None:
    """Raises UserError where `model.packed` or `model.compile` changes embeddings."""

    def embeddings(_: str) -> torch.Tensor:
        embedder.module.eval()
        with torch.inference_mode():
            made: torch.Tensor = embedder.module(items_of(embedder))
        return made

    def apart(made: torch.Tensor, plain: torch.Tensor) -> float:
        return float((made - plain).norm(dim=-1).max())

    _compare(embedder, "embeddings", embeddings, apart, LIMITS)


def prove_gradient(embedder: Any) -> None:
    """Raises UserError where `model.packed` or `model.compile` changes the gradient of a trained
    weight."""
    weight = _small_one(embedder.trainable())

    def gradient(setting: str) -> torch.Tensor:
        """Packed rows draw another dropout than padded ones, so they are compared without."""
        embedder.module.train(setting == "compile")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            vectors = embedder.module(items_of(embedder))
        aim = torch.linspace(-1, 1, vectors.numel(), device=vectors.device).view_as(vectors)
        made = torch.autograd.grad((vectors * aim).sum(), weight, allow_unused=True)[0]
        return torch.zeros_like(weight) if made is None else made

    def apart(made: torch.Tensor, plain: torch.Tensor) -> float:
        return float((made - plain).norm() / plain.norm())

    _compare(embedder, "gradients", gradient, apart, GRADIENT_LIMITS)


def _small_one(trained: dict[str, torch.nn.Parameter]) -> torch.nn.Parameter:
    """The smallest matrix of the first layers, but no lora_A, whose gradient is zero at first, and
    rather not of keys, whose gradient is small against its rounding."""
    named = [(name, weight) for name, weight in trained.items() if "lora_A" not in name]
    return min(named, key=lambda each: (each[1].ndim < 2, each[1].numel(), "k_proj" in each[0]))[1]


def _compare(
    embedder: Any,
    what: str,
    made_with: Callable[[str], torch.Tensor],
    apart: Callable[[torch.Tensor, torch.Tensor], float],
    limits: dict[str, float],
) -> None:
    """One setting after the other, each against the same without it."""
    settings, limit = embedder.settings, limits[embedder.settings.dtype]
    for setting in ("packed", "compile"):
        if not getattr(settings, setting):
            continue
        began = time.monotonic()
        with _path(embedder, packed=settings.packed and setting != "packed", stance="force_eager"):
            plain = made_with(setting)
        with _path(
            embedder,
            packed=settings.packed,
            stance="default" if setting == "compile" else "force_eager",
        ):
            difference = apart(_compiled(made_with, setting), plain)
        if not difference <= limit:  # also where it is not a number
            raise UserError(
                f"model.{setting} changes {what}: by {difference:.2g} on a few items, at most"
                f" {limit:g} is rounding in {settings.dtype}. Set model.{setting} false."
            )
        took = time.monotonic() - began
        logger.info(
            "model.%s gives the same %s, to %.1e; checked in %.1f s",
            setting,
            what,
            difference,
            took,
        )


def _compiled(made_with: Callable[[str], torch.Tensor], setting: str) -> torch.Tensor:
    try:
        return made_with(setting)
    except TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.compile: torch.compile does not work here: {reason}\nOn a CPU it needs a C++"
            " compiler (install g++, or name one by CXX), on a GPU Triton and a C compiler. Or set"
            " model.compile false."
        ) from error


@contextmanager
def _path(embedder: Any, packed: bool, stance: Stance) -> Iterator[None]:
    before, embedder.module.packed = embedder.module.packed, packed
    modes = [(module, module.training) for module in embedder.module.modules()]
    try:
        with torch.compiler.set_stance(stance):
            yield
    finally:
        embedder.module.packed = before
        for module, mode in modes:
            module.training = mode
