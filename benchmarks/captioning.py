"""Captions as a round writes them, against one-at-a-time generation by transformers.

Every query has `--k` mined images, as in a round; all images are photographs of at most 256
visual tokens, and the model is a random Qwen2-VL of about 100 million weights. A random model does
not say when it is done: the token that ends an answer is taken from it on all sides, so every
caption has `--new_tokens` tokens. Four sides, in turn, as often as `--repeats`:

    plain, from pixels              transformers as a model card has it: processor, tower and
                                    `generate`, one by one
    kept features, one at a time    ours, with vision tokens from the cache, which mining has filled
    batched, nothing shared         the same in batches of like lengths
    ours                            and the reference of a query's mined images is read once

With `--candidates` above 1 every question has as many captions: the first greedy, the others
sampled. `plain` generates each anew, ours reads the question once. Prints seconds, ratios to the
first side with their standard error, and how many greedy texts are equal on all sides in all
repeats.

    python benchmarks/captioning.py --photos DIR
    python benchmarks/captioning.py --photos DIR --size small --queries 4
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from _model import (
    PIXELS_PER_TOKEN,
    add_arguments,
    in_turn,
    photographs,
    picture,
    report,
    text_of,
    write_model,
)

from cirloop.captioning.base import CaptionRequest, sampling_kwargs
from cirloop.captioning.batched_captioner import BatchedCaptioner
from cirloop.captioning.config import CaptioningSettings
from cirloop.captioning.foundation import Qwen2VLFoundation
from cirloop.data.images import FileImages
from cirloop.reproducibility import prepare_process

Texts = list[list[str]]
WIDER = 4.0
"""Factor of the language model's matrices: as transformers draws them, the model says the same of
all images."""


class Work:
    """One model, the photographs, and the questions of a round about them."""

    def __init__(self, args: argparse.Namespace, directory: Path, dtype: str = "float32") -> None:
        self.args, self.cache, self.max_pixels = (
            args,
            directory / "vision",
            args.tokens * PIXELS_PER_TOKEN,
        )
        self.files = photographs(args.photos, args.queries * (args.k + 1))
        foundation = Qwen2VLFoundation(path=str(directory), dtype=dtype, max_pixels=self.max_pixels)
        self.captioner: Any = foundation.build()
        with torch.no_grad():
            for weights in self.captioner.vlm.model.language_model.layers.parameters():
                weights.mul_(WIDER if weights.ndim == 2 else 1)
        self.captioner.vlm.generation_config.eos_token_id = None
        self.captioner.vlm.generation_config.pad_token_id = (
            self.captioner.processor.tokenizer.pad_token_id
        )
        self.prompt = CaptioningSettings().prompts(foundation).rewrite
        ids = list(self.files)
        self.requests = [
            CaptionRequest(ids[query], ids[args.queries + query * args.k + place], text_of(query))
            for query in range(args.queries)
            for place in range(args.k)
        ]
        self.temperatures = [0.0] + [CaptioningSettings().temperature] * (args.candidates - 1)

    def plain(self) -> Texts:
        processor, vlm, out = self.captioner.processor, self.captioner.vlm, []
        for request in self.requests:
            answers = []
            for temperature in self.temperatures:
                inputs = processor(
                    text=[self.captioner.render_chat(self.prompt, request.text)],
                    images=[
                        picture(self.files[image], self.max_pixels)
                        for image in (request.reference, request.image)
                    ],
                    images_kwargs={"do_resize": False},
                    return_tensors="pt",
                ).to(vlm.device, vlm.dtype)
                with torch.inference_mode():
                    made = vlm.generate(
                        **inputs,
                        max_new_tokens=self.args.new_tokens,
                        **sampling_kwargs(temperature),
                    )
                new = made[:, inputs["input_ids"].shape[1] :]
                answers.append(
                    processor.tokenizer.batch_decode(new, skip_special_tokens=True)[0].strip()
                )
            out.append(answers)
        return out

    def ours(self, batch_size: int, share: bool) -> Texts:
        self.captioner.shares_prefixes = share
        eyes = BatchedCaptioner(
            self.captioner, FileImages(self.files), self.cache, batch_size, lambda b, _: b
        )
        answers = eyes.generate(
            self.prompt, self.requests, self.args.new_tokens, self.temperatures, 0, "captions"
        )
        return [[answer.text for answer in several] for several in answers]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--queries", type=int, default=6)
    parser.add_argument("--k", type=int, default=5, help="mined images per query")
    parser.add_argument(
        "--candidates", type=int, default=1, help="captions per mined image, the first greedy"
    )
    parser.add_argument(
        "--batch_size", type=int, default=30, help="captioning.batch_size of the last two sides"
    )
    parser.add_argument("--new_tokens", type=int, default=32, help="tokens of a caption")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with TemporaryDirectory() as name:
        print(write_model(Path(name), args.size), flush=True)
        work = Work(args, Path(name))
        size = args.batch_size
        sides: dict[str, Callable[[int], Texts]] = {
            "plain, from pixels": lambda _: work.plain(),
            "kept features, one at a time": lambda _: work.ours(1, share=False),
            f"batched by {size}, nothing shared": lambda _: work.ours(size, share=False),
            f"ours, batched by {size}": lambda _: work.ours(size, share=True),
        }
        work.ours(size, share=True)  # the cache is full in all that follows
        taken, made = in_turn(sides, args.repeats)
    report(
        f"{len(work.requests)} questions, {args.candidates} captions each, of {args.new_tokens}"
        " tokens",
        taken,
    )
    greedy = [[text for text, *_ in texts] for each in made.values() for texts in each]
    equal = sum(len({*texts}) == 1 for texts in zip(*greedy, strict=True))
    print(
        f"greedy texts equal on all sides: {equal} of {len(work.requests)}; {len({*greedy[0]})}"
        " different texts"
    )


if __name__ == "__main__":
    prepare_process()
    main()
