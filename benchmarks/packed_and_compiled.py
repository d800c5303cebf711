"""What `model.packed`, `model.compile` and adapters in the base's dtype save, against padded rows,
plain layers and adapters in float32, and how far results are apart.

A random Qwen2-VL (benchmarks/_model.py) four times: plain, packed, compiled, and both; in bfloat16
a fifth, plain, whose adapters are trained in bfloat16 too. In turn, as often as `--repeats`, from
vision features in memory, with images of 16 to 256 visual tokens and texts of 2 to 60 words:

    embed     queries in batches sorted by length, as every stage embeds them
    train     a step's forward and backward pass over batches in random order, with gradient caching

Prints seconds, items a second, ratios with their standard error over the repeats, and the largest
distance of results. Building a model, with its self-test and compilation, is not in the seconds and
is printed apart. The GPU is used where there is one.

    python benchmarks/packed_and_compiled.py
    python benchmarks/packed_and_compiled.py --size small --num 24 --batch 8 --repeats 2
    python benchmarks/packed_and_compiled.py --dtype bfloat16 --sides plain packed adapters
    python benchmarks/packed_and_compiled.py --dtype bfloat16 --num 2048 --batch 256 --chunk 64
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from _model import SIZES, report, write_model

from cirloop.backbones import EmbedInput, LoraSettings, Qwen2VLSettings
from cirloop.backbones.base import Grid, ImageFeatures
from cirloop.distributed.worker import create_accelerator
from cirloop.reproducibility import prepare_process
from cirloop.retrieval.embed import embed
from cirloop.training.batches import BatchSampler
from cirloop.training.config import TrainingSettings
from cirloop.training.trainer import Trainer
from cirloop.types import ImageId, Query, QueryId, Triplet

SIDES = {
    "plain": {},
    "packed": {"packed": True},
    "compiled": {"compile": True},
    "both": {"packed": True, "compile": True},
    "adapters": {},
}
"""Settings of the model. Adapters of the side `adapters` have its dtype; in float32 all do."""
WORDS = (
    "the",
    "same",
    "red",
    "blue",
    "long",
    "short",
    "dress",
    "sleeves",
    "with",
    "without",
    "more",
    "stripes",
    "and",
)


class Features:
    """Vision tokens, drawn, of images of unlike sizes, in memory; stands where `VisionCache`
    does."""

    def __init__(self, num: int, width: int, dtype: torch.dtype) -> None:
        drawn = random.Random(0)
        self.ids = [ImageId(f"{number:05d}") for number in range(num)]
        sides = [(1, 2 * drawn.randint(4, 16), 2 * drawn.randint(4, 16)) for _ in self.ids]
        noise = torch.Generator().manual_seed(0)
        self.made = {
            image: ImageFeatures(
                (torch.randn(h * w // 4, width, generator=noise) * 0.02).to(dtype), (1, h, w)
            )
            for image, (_, h, w) in zip(self.ids, sides, strict=True)
        }

    def precompute(self, images: Sequence[ImageId], progress: Callable[[Any], Any] = iter) -> None:
        assert all(image in self.made for image in images)

    def grids(self, images: Sequence[ImageId]) -> list[Grid]:
        return [self.made[image].grid for image in images]

    def get(self, images: Sequence[ImageId]) -> list[ImageFeatures]:
        return [self.made[image] for image in images]


def queries_of(features: Features) -> list[Query]:
    drawn = random.Random(1)
    texts = [" ".join(drawn.choices(WORDS, k=drawn.randint(2, 60))) for _ in features.ids]
    return [Query(QueryId(i), i, text) for i, text in zip(features.ids, texts, strict=True)]


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    made = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, made


def in_turn(
    sides: dict[str, Callable[[], np.ndarray[Any, Any]]], repeats: int, what: str, num: int
) -> None:
    """Each side once unmeasured, which compiles what is left to compile; `num` items are worked
    through."""
    made = {name: side() for name, side in sides.items()}
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            took, made[name] = seconds(side)
            taken[name].append(took)
    report(what, taken)
    plain = made["plain"]
    assert np.isfinite(plain).all() and plain.any()
    for name, each in made.items():
        apart = np.linalg.norm(each - plain, axis=-1).max() / np.linalg.norm(plain, axis=-1).max()
        print(
            f"{name}: {num / np.mean(taken[name]):.1f} items/s, {apart:.1e} of its length from"
            " plain at most"
        )


def trainer_of(
    side: str,
    backbone: Any,
    features: Any,
    queries: list[Query],
    args: argparse.Namespace,
    directory: Path,
) -> Trainer:
    targets = features.ids[1:] + features.ids[:1]
    triplets = [Triplet(query, target) for query, target in zip(queries, targets, strict=True)]
    lora = LoraSettings(dropout=0.0, dtype="base" if side == "adapters" else "float32")
    settings = TrainingSettings(batch_size=args.batch, grad_cache_chunk_size=args.chunk, lora=lora)
    work = directory / f"steps of {side}"
    backbone.make_trainable(settings, 0)
    batches = BatchSampler(triplets, [], [], args.batch, 0.0, 0, 0)
    trainer = Trainer(
        backbone, features, batches, settings, 1, 0, "", work, 0, create_accelerator()
    )
    trainer.module.train()
    return trainer


def gradient(trainer: Trainer) -> np.ndarray[Any, Any]:
    trainer.engine.backward(0)
    parts = [
        weight.grad.flatten() for weight in trainer.parameters.values() if weight.grad is not None
    ]
    made: np.ndarray[Any, Any] = torch.cat(parts).float().cpu().numpy()
    trainer.optimizer.zero_grad()
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", choices=SIZES, default="mid", help="of the model; small = to try it out"
    )
    parser.add_argument("--path", help="a model directory in its place")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--attention", choices=("sdpa", "eager", "flash_attention_2"), default="sdpa"
    )
    parser.add_argument("--sides", choices=SIDES, nargs="+", default=[*SIDES])
    parser.add_argument("--num", type=int, default=256, help="queries to embed")
    parser.add_argument("--rows", type=int, default=64, help="runtime.embed_batch_size")
    parser.add_argument("--batch", type=int, default=32, help="queries of the training step")
    parser.add_argument("--chunk", type=int, default=8, help="training.grad_cache_chunk_size")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # all are measured against plain; in float32 adapters have the base's dtype already
    wanted = {"plain", *args.sides} - ({"adapters"} if args.dtype == "float32" else set())
    with TemporaryDirectory() as name:
        if args.path is None:
            print(write_model(Path(name), args.size), flush=True)
        shared = {"path": args.path or name, "dtype": args.dtype, "attention": args.attention}
        backbones: dict[str, Any] = {}
        for side in (side for side in SIDES if side in wanted):
            more = SIDES[side]
            took, backbones[side] = seconds(
                lambda more=more: Qwen2VLSettings(**shared, **more).build()
            )
            print(f"{side}: built in {took:.1f} s", flush=True)
        features: Any = Features(
            args.num, backbones["plain"].vision_width(), getattr(torch, args.dtype)
        )
        queries = queries_of(features)
        items = [EmbedInput(query.reference, query.text) for query in queries]
        sides = {
            side: lambda each=each: embed(each, features, items, args.rows, lambda b, _: b, "embed")
            for side, each in backbones.items()
            if side != "adapters"  # it embeds as plain does
        }
        in_turn(sides, args.repeats, f"embed: {args.num} queries, batches of {args.rows}", args.num)
        trainers = {
            side: trainer_of(side, each, features, queries, args, Path(name))
            for side, each in backbones.items()
        }
        steps = {side: lambda each=each: gradient(each) for side, each in trainers.items()}
        in_turn(
            steps,
            args.repeats,
            f"train: {args.batch} queries, chunks of {args.chunk}",
            2 * args.batch,
        )


if __name__ == "__main__":
    prepare_process()
    main()
