"""What a GPU does with Qwen2-VL-2B: its architecture with random weights in bfloat16, against the
device's limits.

Run it by scripts/gpu_check.sh, which sees to packages. Parts, in this order, each with a limit of
time; every line is printed and written to `--output` as soon as it is known, so that a run that is
cut off still tells:

    limits     FLOP/s of a large product of matrices, bytes/s of a copy within the device
    patches    the patch embedding as a Conv3d and as a product, and their shares of the tower
    embed      images a second with an empty and a full cache, by image size and batch size
    train      a training step with kept features: attention, packing, compilation, type of the
               adapters
    captions   texts a second as a round writes them, for a query's mined images
    decode     tokens of such texts a second, as they are decoded and by CUDA graphs
    mine       the best of a million images for 20,000 queries, exact whatever TF32 is allowed
    equality   embeddings of a few items against the same weights in float32
    round      this device's rates for `cirloop plan`, and a round of CIRR's size from them:
               28,225 queries, 16,939 images, 20,000 texts, one epoch

`of limit` is the share of the measured FLOP/s (FLOPs by torch's counter), `waiting` that of time in
which the host waited for pixels or features, `halved` the batches that memory did not hold. Ends
with 1 where a part failed.

    scripts/gpu_check.sh
    scripts/gpu_check.sh --extend_rates src/cirloop/stages/rates.json
    scripts/gpu_check.sh --size small --dtype float32 --num 4 --tokens 9 16 --batches 2 4
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from _gpu_round import cirr_round, decoding, mining
from _model import SIZES, Work, best, noise, photographs, text_of, wait, write_model
from accelerate.utils.memory import clear_device_cache
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import is_flash_attn_2_available

from cirloop.backbones import EmbedInput
from cirloop.captioning.base import CaptionRequest
from cirloop.captioning.batched_captioner import BatchedCaptioner
from cirloop.captioning.config import CaptioningSettings
from cirloop.captioning.foundation import Qwen2VLFoundation
from cirloop.captioning.prompts import Prompt
from cirloop.monitoring import oom, profiling
from cirloop.reproducibility import prepare_process
from cirloop.retrieval.embed import embed
from cirloop.types import UserError

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Values = dict[str, Any]


class OutOfTimeError(Exception):
    """A part's time is over."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises OutOfTimeError where what runs within takes longer."""

    def late(*_: Any) -> None:
        raise OutOfTimeError(f"its {seconds:.3g} s are over")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class Check:
    """The arguments, the model's directory, the images of each size, and the lines so far."""

    def __init__(self, args: argparse.Namespace, directory: Path) -> None:
        self.args, self.directory, self.model = args, directory, directory / "model"
        self.rows: list[Values] = []
        self.began, self.limit = time.monotonic(), float("nan")
        self.machine = {
            "device": (
                torch.cuda.get_device_name()
                if DEVICE == "cuda"
                else f"CPU, {torch.get_num_threads()} threads"
            ),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "size": args.size,
            "dtype": args.dtype,
        }

    def tell(self, part: str, case: str, values: Values) -> None:
        row = {
            "part": part,
            "case": case,
            **values,
            "after": round(time.monotonic() - self.began, 1),
        }
        self.rows.append(row)
        shown = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())
        print(f"{row['after']:6.1f} s  {part}: {case}: {shown}", flush=True)
        self.args.output.parent.mkdir(parents=True, exist_ok=True)
        self.args.output.write_text(
            json.dumps({**self.machine, "rows": self.rows}, indent=1), "utf-8"
        )

    def case(self, part: str, name: str, work: Callable[[], Values]) -> None:
        """What `work` gives, or that memory did not suffice, or why it cannot be had."""
        try:
            values = work()
        except UserError as error:
            values = {"refused": str(error)}
        except (MemoryError, RuntimeError) as error:
            if not oom.is_oom(error) and not isinstance(error, TorchDynamoException):
                raise
            kind = "out_of_memory" if oom.is_oom(error) else "not_compiled"
            values = {kind: oom.first_line(error)}
        clear_device_cache(garbage_collection=True)
        self.tell(part, name, values)

    def metered(self, work: Callable[[], Any], num: int, what: str) -> Values:
        """Of `num` things that `work` does."""
        with profiling.metering() as spent:
            work()
            wait()
        values = {
            f"{what}_a_second": round(num / spent.seconds, 2), "seconds": round(spent.seconds, 3),
            "GB": round((spent.gpu_bytes or spent.memory_bytes) / 1e9, 2),
            "waiting": round(spent.waiting / spent.seconds, 3),
        }  # fmt: skip
        return {**values, "halved": spent.splits} if spent.splits else values

    def pictures(self, tokens: int) -> Path:
        """`--num` images that make so many tokens or a few less, half as large again as the model
        sees them."""
        directory = self.directory / f"images {tokens}"
        if not directory.exists():
            sides = [
                (tokens // high, high)
                for high in range(1, tokens + 1)
                if high <= tokens // high <= 2 * high
            ]
            wide, high = (
                3 * 28 * side // 2 for side in max(sides, key=lambda side: side[0] * side[1])
            )
            noise(directory, self.args.num, wide, high)
        return directory

    def captioner(self) -> tuple[Any, Any, Prompt, list[CaptionRequest]]:
        """The captioner on an embedder's weights, its images, and what it is asked about `--k`
        mined images each of some queries."""
        args, work = self.args, self.work(max(self.args.tokens))
        foundation = Qwen2VLFoundation(
            path=str(self.model), dtype=args.dtype, max_pixels=work.max_pixels
        )
        captioner: Any = foundation.build(work.backbone)
        assert captioner.shared_embedder is not None, (
            "two models, where one can_share_weights its weights"
        )
        generation = captioner.vlm.generation_config
        generation.eos_token_id = None  # a random model does not say when it is done
        generation.pad_token_id = captioner.processor.tokenizer.pad_token_id
        prompt, num = CaptioningSettings().prompts(foundation).rewrite, args.num // (args.k + 1)
        mined = [
            (query, num + query * args.k + place) for query in range(num) for place in range(args.k)
        ]
        requests = [
            CaptionRequest(work.ids[query], work.ids[image], text_of(query))
            for query, image in mined
        ]
        return captioner, work.features("captions"), prompt, requests

    def work(self, tokens: int, dtype: str = "", **settings: Any) -> Work:
        clear_device_cache(garbage_collection=True)
        files = photographs(self.pictures(tokens), self.args.num)
        return Work(self.model, files, tokens, dtype or self.args.dtype, **settings)


def limits(check: Check) -> None:
    size = 8192 if DEVICE == "cuda" else 1024
    matrix = torch.randn(size, size, device=DEVICE).to(getattr(torch, check.args.dtype))
    check.limit = 2 * size**3 / best(partial(torch.mm, matrix, matrix), 10)
    check.tell(
        "limits", f"product in {check.args.dtype}", {"TFLOP/s": round(check.limit / 1e12, 3)}
    )
    source = torch.empty(
        2**30 if DEVICE == "cuda" else 2**26, dtype=torch.uint8, device=DEVICE
    ).random_()
    taken = best(partial(torch.empty_like(source).copy_, source), 10)
    check.tell("limits", "copy", {"GB/s": round(2 * source.numel() / taken / 1e9, 1)})


@torch.inference_mode()
def patches(check: Check) -> None:
    tokens, num = max(check.args.tokens), min(check.args.batches)
    backbone, side = check.work(tokens).backbone, 2 * int(tokens**0.5)
    tower = backbone.vlm.model.visual
    pixels = torch.randn(
        num * side * side, tower.patch_embed.proj.weight[0].numel(), device=DEVICE
    ).to(tower.dtype)
    grids = torch.tensor([[1, side, side]] * num, device=DEVICE)
    product = best(lambda: tower.patch_embed(pixels))
    whole = best(lambda: tower(pixels, grid_thw=grids))
    with FlopCounterMode(display=False) as counter:
        tower(pixels, grid_thw=grids)
    done = counter.get_total_flops()
    values = {"ms": round(1e3 * whole, 2), "of_limit": round(done / whole / check.limit, 3)}
    check.tell("patches", f"tower, {len(pixels)} patches", values)
    check.tell(
        "patches", "product", {"ms": round(1e3 * product, 3), "of_tower": round(product / whole, 4)}
    )
    made, patch = tower.patch_embed(pixels).float(), tower.patch_embed.proj
    call = partial(nn.Conv3d.forward, patch, pixels.view(len(pixels), *patch.weight.shape[1:]))
    convolution, differ = (
        best(call),
        (call().flatten(1).float() - made).abs().max() / made.abs().max(),
    )
    values = {
        "ms": round(1e3 * convolution, 3),
        "of_tower": round(convolution / (whole - product + convolution), 4),
    }
    values |= {
        "times_the_product": round(convolution / product, 2),
        "differ": f"{float(differ):.1e}",
    }
    check.tell("patches", "convolution", values)


def embedding(check: Check) -> None:
    for tokens in check.args.tokens:
        embed_images(check, check.work(tokens))


def embed_images(check: Check, work: Work) -> None:
    args, items = check.args, [EmbedInput(image) for image in work.ids]
    vectors(
        work, items, "first", min(args.batches), args.workers
    )  # what is only slow the first time
    real = sum(map(work.backbone.num_image_tokens, work.features("first").grids(work.ids))) / len(
        items
    )
    for size in args.batches:
        call = partial(vectors, work, items, f"embed {size}", size, args.workers)
        for cache in ("empty", "full"):
            name = f"{real:.0f} tokens, batches of {size}, {cache} cache"
            check.case("embed", name, partial(check.metered, call, len(items), "images"))


def vectors(
    work: Work, items: Sequence[EmbedInput], name: str, size: int, workers: int = 0
) -> torch.Tensor:
    """Of `items`, whose vision features are kept in the cache `name`; opening it is part of the
    work."""
    features = work.features(name, workers, size)
    return torch.from_numpy(
        embed(work.backbone, features, items, size, lambda batches, _: batches, "embed")
    )


def training(check: Check) -> None:
    """Padded and packed rows by sdpa, both compiled too, then the other types of adapters and
    attention, packed."""
    types = [{"dtype": "float32"}] + [{"dtype": "base"}] * (check.args.dtype != "float32")
    kinds = [("sdpa", {}, types[0])] + [("sdpa", {"packed": True}, each) for each in types]
    if is_flash_attn_2_available():
        kinds += [("flash_attention_2", {"packed": True}, types[-1])]
    else:
        check.tell("train", "flash_attention_2", {"skipped": "flash_attn is not installed"})
    if DEVICE == "cuda":
        kinds += [("sdpa", {"compile": True}, types[0])]
        kinds += [("sdpa", {"compile": True, "packed": True}, types[0])]
    else:
        why = "on a CPU it takes minutes: benchmarks/packed_and_compiled.py"
        check.tell("train", "compiled", {"skipped": why})
    for attention, settings, lora in kinds:
        adapters = check.args.dtype if lora["dtype"] == "base" else lora["dtype"]
        rows = "packed" if "packed" in settings else "padded"
        compiled = ", compiled" * ("compile" in settings)
        name = f"{attention}, {rows}{compiled}, adapters in {adapters}"
        check.case("train", name, partial(step, check, attention, settings, lora))


def step(check: Check, attention: str, settings: Values, lora: Values) -> Values:
    args = check.args
    work = check.work(max(args.tokens), attention=attention, **settings)
    trainer: Any = work.trainer(args.batch, args.chunk, temperature=0.02, **lora)
    trainer._step(0, {})  # what is only slow the first time; it fills the cache
    values = check.metered(partial(trainer._step, 1, {}), args.batch, "triplets")
    return {**values, "loss": trainer.log[-1]["loss"], "chunk": args.chunk}


def captions(check: Check) -> None:
    args = check.args
    captioner, features, prompt, requests = check.captioner()
    eyes = BatchedCaptioner(
        captioner,
        features._images,
        check.directory / "eyes",
        args.chunk,
        lambda batches, _: batches,
    )
    eyes.generate(
        prompt, requests[: args.k], 2, [0.0], 0, "captions"
    )  # what is only slow the first time
    ids = [image for request in requests for image in (request.reference, request.image)]
    eyes._source.precompute(ids)  # the cache is full, as after mining
    write = partial(eyes.generate, prompt, requests, args.new_tokens, [0.0], 0, "captions")
    name = f"{len(requests)} of {args.new_tokens} tokens, batches of {args.chunk}"
    check.case("captions", name, partial(check.metered, write, len(requests), "captions"))


def equality(check: Check) -> None:
    made = {}
    for dtype in (check.args.dtype, "float32"):
        work = check.work(max(check.args.tokens), dtype)
        items = [
            EmbedInput(image, text)
            for n, image in enumerate(work.ids[:4])
            for text in (None, text_of(n))
        ]
        made[dtype] = vectors(work, items, f"equality {dtype}", 2)
        del work
    one = made[check.args.dtype]
    other = made["float32"]
    apart, others = float((one - other).norm(dim=1).max()), float(torch.pdist(other).min())
    values = {"distance_at_most": f"{apart:.1e}", "of_other_items_at_least": f"{others:.1e}"}
    check.tell("equality", f"{check.args.dtype} and float32, {len(one)} items", values)


PARTS: dict[str, tuple[Callable[[Check], None], float]] = {
    "limits": (limits, 0.04),
    "patches": (patches, 0.08),
    "embed": (embedding, 0.18),
    "train": (training, 0.3),
    "captions": (captions, 0.08),
    "decode": (decoding, 0.12),
    "mine": (mining, 0.12),
    "equality": (equality, 0.06),
    "round": (cirr_round, 0.3),
}
"""With the share of the whole time that each may take at most."""


def run(check: Check) -> bool:
    """Whether no part failed."""
    fine = True
    until = check.began + 60 * check.args.minutes
    for part in (part for part in PARTS if part == "limits" or part in check.args.parts):
        work, share = PARTS[part]
        left = until - time.monotonic()
        try:
            with at_most(min(left, 60 * check.args.minutes * share)):
                work(check)
        except OutOfTimeError as error:
            check.tell(part, "the rest", {"skipped": str(error)})
        except Exception as error:  # told by name, and the parts that follow still tell
            traceback.print_exc()
            check.tell(
                part, "the rest", {"failed": f"{type(error).__name__}: {oom.first_line(error)}"}
            )
            fine = False
    return fine


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "build" / "gpu_check" / "results.json"
    )
    parser.add_argument(
        "--minutes", type=float, default=7.5, help="at most, for all parts together"
    )
    parser.add_argument("--size", choices=SIZES, default="2b", help="of the model")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=[*PARTS])
    parser.add_argument("--num", type=int, default=256, help="images")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[188, 256], help="visual tokens of an image"
    )
    parser.add_argument(
        "--batches",
        type=int,
        nargs="+",
        default=[8, 16, 32, 64, 128, 256],
        help="of the tower, too",
    )
    parser.add_argument("--workers", type=int, default=12, help="runtime.num_workers")
    parser.add_argument("--batch", type=int, default=256, help="triplets of a training step")
    parser.add_argument(
        "--chunk",
        type=int,
        default=64,
        help="training.grad_cache_chunk_size and captioning.batch_size",
    )
    parser.add_argument("--k", type=int, default=3, help="mined images per query")
    parser.add_argument("--new_tokens", type=int, default=32, help="tokens of a caption")
    parser.add_argument("--mine_queries", type=int, default=20_000)
    parser.add_argument("--mine_images", type=int, default=1_000_000)
    parser.add_argument("--mine_width", type=int, default=1536, help="numbers of a vector")
    parser.add_argument(
        "--measure_seconds", type=float, default=5.0, help="for each of the round's rates"
    )
    parser.add_argument(
        "--extend_rates", type=Path, metavar="FILE", help="put the rates into this table"
    )
    args = parser.parse_args()
    args.batch = min(args.batch, args.num)
    return args


def main() -> None:
    args = parse_arguments()
    if args.size == "2b" and DEVICE == "cpu":
        sys.exit(
            "torch sees no GPU, and Qwen2-VL-2B on a CPU takes hours. To try this out: --size small"
        )
    transformers.utils.logging.disable_progress_bar()
    with TemporaryDirectory() as name:
        check = Check(args, Path(name))
        print(", ".join(f"{key} {value}" for key, value in check.machine.items()), flush=True)
        check.tell("model", args.size, {"weights": write_model(check.model, args.size, args.dtype)})
        sys.exit(0 if run(check) else 1)


if __name__ == "__main__":
    prepare_process()
    warnings.filterwarnings("ignore", category=FutureWarning)
    main()
