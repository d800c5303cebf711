"""What a GPU does with Qwen2-VL-2B: images embedded, triplets trained on and captions a second, against its limits.

The architecture is Qwen2-VL-2B's, the weights are random, in bfloat16. The limits are measured first: FLOP/s of a large
product of matrices, and bytes/s of a copy within the device's memory. Three parts, whose sides run in turn, `--repeats`
times:

    embed     gallery pictures by a plain transformers loop (benchmarks/embed_against_plain_loop.py), by `embed` with an
              empty cache, and with a full one
    train     a step's forward and backward pass with gradient caching, its chunks from pixels, and from kept features
    caption   texts for a query's mined images by transformers' `generate`, one at a time, and as a round writes them

Prints per side seconds, how many a second, the ratio to the part's first side with its standard error, and for ours
the FLOP/s by formula (`cirloop.backbones.flops`) as a share of the limit, the bytes/s of weights that were read (each
pass of a tower or language model reads all of its own; keys and values are left out) as a share of the other, and the
largest memory. Results are compared loosely: in bfloat16 the sides differ by rounding.

Pictures are those below `--photos`; without it, JPEG files of noise, 640 x 480. Under ten minutes.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --size small --dtype float32 --num 16 --batch 8 --chunk 4 --queries 2     without a GPU
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from captions_against_one_at_a_time import Work as Captions
from embed_against_plain_loop import FromPixels, Plain
from mid_model import SIZES, Work, apart, gradient, in_turn, photographs, write_model
from PIL import Image
from torch import nn

from cirloop import cost
from cirloop.backbones import Item
from cirloop.backbones.flops import limit
from cirloop.cost import Cost
from cirloop.report.terminal import table
from cirloop.retrieval.embed import embed

ON_GPU = torch.cuda.is_available()
HEAD = ("side", "seconds", "a second", "times the first", "TFLOP/s", "of limit", "GB/s of weights", "of limit", "GB")


def noise(directory: Path, num: int) -> None:
    """JPEG files whose contents are as dear to decode as those of photographs."""
    random = np.random.default_rng(0)
    for number in range(num):
        rough = Image.fromarray(random.integers(0, 256, (60, 80, 3), np.uint8)).resize(
            (640, 480), Image.Resampling.BICUBIC
        )
        rough.save(directory / f"{number:04d}.jpg", quality=90)


def copy_limit(seconds: float = 0.5) -> float:
    """Bytes/s that a copy within the device's memory reads and writes, at its best."""
    there = torch.empty(2**30 if ON_GPU else 2**27, dtype=torch.uint8, device="cuda" if ON_GPU else "cpu").random_()
    here, best, until = torch.empty_like(there), float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        here.copy_(there)
        if ON_GPU:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * there.numel() / best


class Meter:
    """What each side cost, and the bytes of weights that the parts of a model have read meanwhile."""

    def __init__(self) -> None:
        self.costs: dict[str, list[Cost]] = defaultdict(list)
        self.read: dict[str, list[int]] = defaultdict(list)

    @contextmanager
    def reading(self, vlm: Any, read: list[int]) -> Iterator[None]:
        def seen(part: nn.Module, *_: Any) -> None:  # of the embedding, few rows are read
            embedding = getattr(part, "embed_tokens", None)
            read[-1] += sum(weights.nbytes for weights in part.parameters())
            read[-1] -= 0 if embedding is None else embedding.weight.nbytes

        parts = (vlm.model.visual, vlm.model.language_model, vlm.lm_head)
        hooks = [part.register_forward_pre_hook(seen) for part in parts]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def of(self, name: str, vlm: Any, work: Callable[[int], Any]) -> Callable[[int], Any]:
        """`work`, metered."""

        def metered(repeat: int) -> Any:
            self.read[name].append(0)
            with self.reading(vlm, self.read[name]), cost.metering() as spent:
                made = work(repeat)
            self.costs[name].append(spent)
            return made

        return metered

    def report(self, title: str, taken: Mapping[str, list[float]], num: Mapping[str, int], limits: Any) -> None:
        """`num`: how many items a side has done."""
        names, rows = [*taken], []
        first = np.array(taken[names[0]]) / num[names[0]]
        for name in names:
            each = np.array(taken[name])
            ratios = first / (each / num[name])
            error = f"{np.std(ratios, ddof=1) / len(ratios) ** 0.5:.2f}" if len(ratios) > 1 else "unknown"
            row = [name, f"{each.mean():.2f}", f"{num[name] / each.mean():.1f}", f"{ratios.mean():.2f} ± {error}"]
            if name in self.costs:
                assert not any(spent.flops_unknown for spent in self.costs[name])
                flops = np.array([sum(spent.flops.values()) for spent in self.costs[name]]) / each
                read = np.array(self.read[name]) / each
                memory = max(spent.gpu_bytes or spent.memory_bytes for spent in self.costs[name])
                shares = [f"{(rate / most).mean():.0%}" for rate, most in zip((flops, read), limits, strict=True)]
                row += [
                    f"{flops.mean() / 1e12:.3g}",
                    shares[0],
                    f"{read.mean() / 1e9:.3g}",
                    shares[1],
                    f"{memory / 1e9:.1f}",
                ]
            rows.append((*row, *[""] * (len(HEAD) - len(row))))
        table(title, HEAD, rows)


def embedding(work: Work, args: argparse.Namespace, limits: tuple[float, float]) -> None:
    items, plain, meter = [Item(image) for image in work.ids], Plain(work), Meter()

    def ours(repeat: int) -> torch.Tensor:  # opening the cache is part of it
        features = work.features(f"embed {repeat}", args.workers, args.vision_batch)
        return torch.from_numpy(embed(work.backbone, features, items, args.rows, lambda batches, _: batches, "embed"))

    plain.embed(work.ids[:8])  # what is only slow the first time
    cold, warm = (meter.of(name, work.backbone.vlm, ours) for name in ("empty cache", "full cache"))
    sides = {"plain loop": lambda _: plain.embed(work.ids), "empty cache": cold, "full cache": warm}
    taken, made = in_turn(sides, args.repeats)
    first, last = made["plain loop"][0], made["full cache"][-1]
    alike = float((first * last).sum(1).min())
    meter.report(
        f"embed {len(items)} pictures; cosine of a picture's two vectors at least {alike:.4f}, of two pictures' "
        f"{float((last[1:] * last[:-1]).sum(1).median()):.4f}", taken, dict.fromkeys(sides, len(items)), limits,
    )  # fmt: skip


def training(work: Work, args: argparse.Namespace, limits: tuple[float, float]) -> None:
    pixels, trainer, meter = FromPixels(Plain(work)), work.trainer(args.batch, args.chunk, temperature=0.02), Meter()
    kept: Any = trainer.features
    kept.ensure(work.ids)

    def step(features: Any, repeat: int) -> torch.Tensor:
        trainer.features = features
        trainer._backward(0)
        return gradient(trainer)

    kept_step = meter.of("kept features", work.backbone.vlm, partial(step, kept))
    kept_step(0)  # what is only slow the first time
    meter.costs.clear(), meter.read.clear()
    taken, made = in_turn({"from pixels": partial(step, pixels), "kept features": kept_step}, args.repeats)
    differ = apart(made["kept features"][0].float(), made["from pixels"][0].float())
    meter.report(
        f"train on {args.batch} triplets in chunks of {args.chunk}; gradients differ by {differ:.1e} of their length",
        taken, dict.fromkeys(taken, args.batch), limits,
    )  # fmt: skip


def captioning(directory: Path, args: argparse.Namespace, limits: tuple[float, float]) -> None:
    work, meter = Captions(args, directory, args.dtype), Meter()
    plain, asks = args.plain, work.asks

    def one_at_a_time(_: int) -> Any:
        work.asks = asks[:plain]
        made = work.plain()
        work.asks = asks
        return made

    work.ours(args.batch_size, share=True)  # the cache is full in all that follows, as after mining
    name = f"batches of {args.batch_size}"
    ours = meter.of(name, work.captioner.vlm, lambda _: work.ours(args.batch_size, share=True))
    taken, made = in_turn({"one at a time": one_at_a_time, name: ours}, args.repeats)
    equal = sum(a == b for a, b in zip(made["one at a time"][0], made[name][0], strict=False))
    meter.report(
        f"{len(asks)} captions of {args.new_tokens} tokens, {plain} of them one at a time: {equal} of {plain} equal",
        taken, {"one at a time": plain, name: len(asks)}, limits,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="a directory of pictures, searched with its folders")
    parser.add_argument("--size", choices=SIZES, default="2b", help="of the model")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--parts", choices=("embed", "train", "caption"), nargs="+", default=["embed", "train", "caption"]
    )
    parser.add_argument("--tokens", type=int, default=256, help="visual tokens of an image, at most")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num", type=int, default=512, help="pictures to embed")
    parser.add_argument("--workers", type=int, default=8, help="runtime.num_workers")
    parser.add_argument("--vision_batch", type=int, default=32, help="runtime.vision_batch_size")
    parser.add_argument("--rows", type=int, default=64, help="runtime.embed_batch_size")
    parser.add_argument("--batch", type=int, default=256, help="queries of the training step")
    parser.add_argument("--chunk", type=int, default=64, help="training.chunk_size")
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--k", type=int, default=3, help="mined images per query")
    parser.add_argument("--batch_size", type=int, default=64, help="captioning.batch_size")
    parser.add_argument("--plain", type=int, default=24, help="captions written one at a time")
    parser.add_argument("--new_tokens", type=int, default=32, help="tokens of a caption")
    args = parser.parse_args()
    args.candidates = 1
    args.plain = min(args.plain, args.queries * args.k)
    if args.size == "2b" and not ON_GPU:
        sys.exit(
            "torch sees no GPU, and Qwen2-VL-2B on a CPU takes hours. To try this out: --size small --dtype float32"
        )
    limits = limit(f"{'cuda' if ON_GPU else 'cpu'} {args.dtype}", 1.0), copy_limit()
    device = torch.cuda.get_device_name() if ON_GPU else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}: {limits[0] / 1e12:.4g} TFLOP/s in {args.dtype}, {limits[1] / 1e9:.4g} GB/s", flush=True)
    with TemporaryDirectory() as name:
        directory, needed = Path(name) / "model", max(args.num, args.batch, args.queries * (args.k + 1))
        if args.photos is None:
            args.photos = Path(name) / "photos"
            args.photos.mkdir()
            noise(args.photos, needed)
        print(write_model(directory, args.size, args.dtype), flush=True)
        if "embed" in args.parts:
            embedding(Work(directory, photographs(args.photos, args.num), args.tokens, args.dtype), args, limits)
        if "train" in args.parts:
            training(Work(directory, photographs(args.photos, args.batch), args.tokens, args.dtype), args, limits)
        if "caption" in args.parts:
            captioning(directory, args, limits)


if __name__ == "__main__":
    main()
