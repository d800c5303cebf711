"""Embedding and a training step against plain loops over the same model, on photographs.

The model has about 100 million random weights in the proportions of Qwen2-VL-2B; photographs have
256 visual tokens at most. In turn, `--repeats` times, over the same photographs, prompts and
threads:

    embed     transformers as a model card has it (processor in the loop, batches of 8, the whole
              forward pass with `lm_head`, last hidden state of the last token), by a model and a
              processor of its own; `embed` with an empty cache, and with a full one
    train     forward and backward of one step with gradient caching, whose chunks pass pixels
              through the tower of that other model each time, and the same step from kept features

Prints seconds, ratios with their standard error over the repeats, the largest difference of the
results, and how far results for other inputs are apart: a comparison that compares nothing would
show the same there. Ends with an error where results are not equal. Needs images; under ten
minutes on two cores.

    python benchmarks/embedding_vs_plain.py --photos DIR
    python benchmarks/embedding_vs_plain.py --photos DIR --size small --num 16 --repeats 2
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from _model import (
    Work,
    add_arguments,
    apart,
    gradient,
    in_turn,
    photographs,
    report,
    write_model,
)

from cirloop.backbones import EmbedInput
from cirloop.backbones.base import ImageFeatures
from cirloop.reproducibility import prepare_process
from cirloop.retrieval.embed import embed
from cirloop.types import ImageId

PLAIN_BATCH = 8


class Plain:
    """Embedding by transformers alone."""

    def __init__(self, work: Work) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.work, self.text = work, work.backbone.text(EmbedInput(work.ids[0]))
        ours = work.backbone
        self.vlm = AutoModelForImageTextToText.from_pretrained(
            work.directory, dtype=ours.vlm.dtype
        ).eval()
        self.vlm.to(ours.device)
        self.processor = AutoProcessor.from_pretrained(work.directory)

    @torch.inference_mode()
    def embed(self, images: Sequence[ImageId]) -> torch.Tensor:
        """Vectors (N, D)."""
        out = []
        for start in range(0, len(images), PLAIN_BATCH):
            batch = [self.work.pixels(image) for image in images[start : start + PLAIN_BATCH]]
            inputs = self.processor(
                text=[self.text] * len(batch), images=batch, images_kwargs={"do_resize": False},
                padding=True, padding_side="right", return_tensors="pt",
            ).to(self.vlm.device, self.vlm.dtype)  # fmt: skip
            hidden = self.vlm(**inputs, output_hidden_states=True, use_cache=False).hidden_states[
                -1
            ]
            last = hidden[torch.arange(len(batch)), inputs["attention_mask"].sum(1) - 1]
            out.append(F.normalize(last.float(), dim=-1))
        return torch.cat(out).cpu()


def compare_embedding(work: Work, args: argparse.Namespace) -> None:
    items, plain = [EmbedInput(image) for image in work.ids], Plain(work)

    def ours(repeat: int) -> torch.Tensor:  # opening the cache is part of it
        features = work.features(f"embed {repeat}", args.workers)
        return torch.from_numpy(
            embed(
                work.backbone,
                features,
                items,
                args.rows,
                lambda batches, _: batches,
                "embed",
                args.batch_tokens,
            )
        )

    plain.embed(work.ids[:2])  # what is only slow the first time
    sides = {"plain loop": lambda _: plain.embed(work.ids), "cold cache": ours, "warm cache": ours}
    taken, made = in_turn(sides, args.repeats)
    differ = max(
        float((each - made["plain loop"][0]).abs().max()) for side in made.values() for each in side
    )
    others = torch.pdist(made["plain loop"][0]).median()
    report(
        f"embed {len(items)} photographs: largest difference {differ:.1e}, other photographs"
        f" {others:.1e}",
        taken,
    )
    assert differ < 1e-4 < others, "the sides do not agree"


class FromPixels:
    """Vision tokens by transformers alone, computed whenever they are asked for."""

    def __init__(self, plain: Plain) -> None:
        self.plain, self.num_seen = plain, 0

    def precompute(self, images: Sequence[ImageId]) -> None:
        """Nothing is kept."""

    @torch.no_grad()
    def get(self, images: Sequence[ImageId]) -> list[ImageFeatures]:
        processor, visual = self.plain.processor.image_processor, self.plain.vlm.model.visual
        sized = [self.plain.work.pixels(image) for image in images]
        made = processor(sized, do_resize=False, return_tensors="pt")
        grids = made["image_grid_thw"]
        pixels = made["pixel_values"].to(visual.device, visual.dtype)
        tokens = visual(pixels, grid_thw=grids.to(visual.device)).pooler_output.split(
            (grids.prod(-1) // 4).tolist()
        )
        self.num_seen += len(images)
        return [
            ImageFeatures(each, tuple(grid))
            for each, grid in zip(tokens, grids.tolist(), strict=True)
        ]


def compare_training(work: Work, args: argparse.Namespace) -> None:
    """On a LoRA, so what follows it sees another model."""
    pixels, trainer = (
        FromPixels(Plain(work)),
        work.trainer(args.batch, args.chunk, temperature=0.02),
    )
    kept: Any = trainer.engine.features
    kept.precompute(work.ids)

    def step(features: Any, number: int, repeat: int) -> tuple[float, torch.Tensor]:
        trainer.engine.features = features
        return trainer.engine.backward(number), gradient(trainer)

    sides = {"from pixels": partial(step, pixels, 0), "kept features": partial(step, kept, 0)}
    taken, made = in_turn(sides, args.repeats)
    (loss, theirs), (_, others) = made["from pixels"][0], step(kept, 1, 0)
    differ = max(apart(grads, theirs) for side in made.values() for _, grads in side)
    assert pixels.num_seen == 2 * 2 * args.batch * args.repeats, (
        "every chunk is seen twice, of queries and of candidates"
    )
    losses = max(abs(each - loss) for side in made.values() for each, _ in side)
    report(
        f"train on {args.batch} queries in chunks of {args.chunk}: loss {loss:.4f}, largest"
        f" difference {losses:.1e}; gradients differ by {differ:.1e} of their length, from another"
        f" batch's by {apart(others, theirs):.1e}",
        taken,
    )
    assert losses < 1e-4 and differ < 1e-3 < apart(others, theirs), "the sides do not agree"


PARTS = {"embed": compare_embedding, "train": compare_training}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=[*PARTS])
    parser.add_argument("--num", type=int, default=32, help="photographs")
    parser.add_argument("--workers", type=int, default=2, help="runtime.num_workers")
    parser.add_argument("--rows", type=int, default=64, help="runtime.embed_batch_size")
    parser.add_argument("--batch_tokens", type=int, default=0, help="runtime.max_tokens_per_batch")
    parser.add_argument("--batch", type=int, default=8, help="queries of the training step")
    parser.add_argument("--chunk", type=int, default=4, help="training.grad_cache_chunk_size")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with TemporaryDirectory() as name:
        print(write_model(Path(name), args.size), flush=True)
        work = Work(Path(name), photographs(args.photos, args.num), args.tokens)
        for part in (
            part for part in PARTS if part in args.parts
        ):  # training last: it puts a LoRA on the model
            PARTS[part](work, args)


if __name__ == "__main__":
    prepare_process()
    main()
