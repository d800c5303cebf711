"""Embedding and a training step against sentence-transformers, on the same model and photographs.

The model has about 100 million random weights in the proportions of Qwen2-VL-2B; photographs have
256 visual tokens at most. sentence-transformers gets the model's directory, the same conversations
and sizes of images (the tokens are compared), last-token pooling and a LoRA with our weights. In
turn, `--repeats` times:

    embed     every photograph as a gallery image and as a query with a text:
              `SentenceTransformer.encode`; `embed` with an empty cache, and with a full one
    train     forward and backward of one step: `CachedMultipleNegativesRankingLoss`, whose
              mini-batches are our chunks; ours with an empty cache, and with a full one

Prints seconds, ratios with their standard error over the repeats, the largest difference of the
results, and how far results for other inputs are apart. Ends with an error where results are not
equal. Needs images, and sentence-transformers 6.2 or newer, which the project itself does not:

    pip install sentence-transformers

Under ten minutes on two cores.

    python benchmarks/embedding_vs_st.py --photos DIR
    python benchmarks/embedding_vs_st.py --photos DIR --size small --repeats 2
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from _model import (
    Work,
    add_arguments,
    apart,
    gradient,
    in_turn,
    photographs,
    report,
    text_of,
    write_model,
)

from cirloop.backbones import EmbedInput
from cirloop.reproducibility import prepare_process
from cirloop.retrieval.embed import embed

TEMPERATURE = 0.02
PROMPT, DOCUMENT = "Find the garment that {text}.", "Represent the given image."


class Theirs:
    """sentence-transformers on the model of `work`."""

    def __init__(self, work: Work, batch_size: int) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import (
            Normalize,
            Pooling,
            Transformer,
        )

        transformer = Transformer(
            str(work.directory),
            model_kwargs={"dtype": torch.float32},
            processing_kwargs={
                "image": {"do_resize": False},
                "chat_template": {"add_generation_prompt": True},
            },
        )
        pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")
        self.work, self.batch_size = work, batch_size
        self.model: Any = SentenceTransformer(
            modules=[transformer, pooling, Normalize()], device="cpu"
        )

    def pairs(self, items: Sequence[EmbedInput]) -> list[dict[str, Any]]:
        """Images, sized as ours are, with the words that ours get."""
        words = [DOCUMENT if item.text is None else PROMPT.format(text=item.text) for item in items]
        images = [self.work.pixels(item.image) for item in items]
        return [
            {"image": picture, "text": text} for picture, text in zip(images, words, strict=True)
        ]

    def embed(self, items: Sequence[EmbedInput]) -> torch.Tensor:
        """Vectors (N, D)."""
        made: torch.Tensor = self.model.encode(
            self.pairs(items), batch_size=self.batch_size, convert_to_tensor=True
        )
        return made.clone()

    def check_tokens(self, items: Sequence[EmbedInput]) -> None:
        """Raises AssertionError where the two models read different tokens."""
        vision = self.work.features("tokens").get([item.image for item in items])
        ours, theirs = (
            self.work.backbone.inputs(items, vision),
            self.model.preprocess(self.pairs(items)),
        )
        for name in ("input_ids", "attention_mask", "image_grid_thw"):
            assert torch.equal(ours[name], theirs[name]), f"{name} differ"

    def add_lora(self, trainer: Any) -> dict[str, torch.nn.Parameter]:
        """Our LoRA, with our weights; theirs in the order of ours."""
        from peft import LoraConfig, inject_adapter_in_model

        lora = trainer.settings.lora
        targets = trainer.backbone.lora_modules.format(targets="|".join(lora.target_modules))
        # what `add_adapter` does; that of transformers 5.24 asks for a PEFT that is not out
        inject_adapter_in_model(
            LoraConfig(
                r=lora.r,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=targets,
            ),
            self.model[0].model,
        )
        there = {
            f"model.{name}": p
            for name, p in self.model[0].model.named_parameters()
            if p.requires_grad
        }
        assert there.keys() == trainer.parameters.keys(), "the LoRAs are of other modules"
        with torch.no_grad():
            for name, parameter in trainer.parameters.items():
                there[name].copy_(parameter)
        return {name: there[name] for name in trainer.parameters}


def ours_of(
    work: Work, items: Sequence[EmbedInput], args: argparse.Namespace
) -> Callable[[int], torch.Tensor]:
    def ours(repeat: int) -> torch.Tensor:  # opening the cache is part of it
        features = work.features(f"embed {repeat}", args.workers)
        return torch.from_numpy(
            embed(work.backbone, features, items, args.rows, lambda batches, _: batches, "embed")
        )

    return ours


def compare_embedding(work: Work, theirs: Theirs, args: argparse.Namespace) -> None:
    items = [EmbedInput(image) for image in work.ids] + [
        EmbedInput(image, text_of(n)) for n, image in enumerate(work.ids)
    ]
    theirs.check_tokens([items[0], items[1], items[-1]])
    theirs.embed(items[:2])  # what is only slow the first time
    ours = ours_of(work, items, args)
    sides = {
        "sentence-transformers": lambda _: theirs.embed(items),
        "cold cache": ours,
        "warm cache": ours,
    }
    taken, made = in_turn(sides, args.repeats)
    first = made["sentence-transformers"][0]
    differ = max(float((each - first).abs().max()) for side in made.values() for each in side)
    others = torch.pdist(first).median()
    report(
        f"embed {len(work.ids)} photographs, and each with a text: largest difference {differ:.1e},"
        f" other items {others:.1e}",
        taken,
    )
    assert differ < 1e-4 < others, "the sides do not agree"


def compare_training(work: Work, theirs: Theirs, args: argparse.Namespace) -> None:
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    trainer: Any = work.trainer(args.batch, args.chunk, TEMPERATURE)
    weights = theirs.add_lora(trainer)
    theirs.model.train()
    batch = trainer.batches[0]
    targets = [batch.candidates[place] for place in batch.target_B]
    columns = (
        [EmbedInput(q.reference, q.text) for q in batch.queries],
        [EmbedInput(image) for image in targets],
    )
    loss_of = CachedMultipleNegativesRankingLoss(
        theirs.model, scale=1 / TEMPERATURE, mini_batch_size=args.chunk
    )

    def their_step(repeat: int) -> tuple[float, torch.Tensor]:
        loss = loss_of([theirs.model.preprocess(theirs.pairs(column)) for column in columns], None)
        loss.backward()
        made = torch.cat([p.grad.flatten() for p in weights.values()])
        theirs.model.zero_grad()
        return float(loss.detach()), made

    def step(
        repeat: int, number: int = 0
    ) -> tuple[float, torch.Tensor]:  # opening the cache is part of it
        trainer.engine.features = work.features(f"train {repeat}", args.workers)
        return trainer.engine.backward(number), gradient(trainer)

    sides = {"sentence-transformers": their_step, "cold cache": step, "warm cache": step}
    taken, made = in_turn(sides, args.repeats)
    (loss, first), (_, others) = made["sentence-transformers"][0], step(0, 1)
    differ = max(apart(grads, first) for side in made.values() for _, grads in side)
    losses = max(abs(each - loss) for side in made.values() for each, _ in side)
    report(
        f"train on {args.batch} pairs in chunks of {args.chunk}: loss {loss:.4f}, largest"
        f" difference {losses:.1e}; gradients differ by {differ:.1e} of their length, from another"
        f" batch's by {apart(others, first):.1e}",
        taken,
    )
    assert losses < 1e-4 and differ < 1e-3 < apart(others, first), "the sides do not agree"


PARTS = {"embed": compare_embedding, "train": compare_training}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=[*PARTS])
    parser.add_argument("--num", type=int, default=16, help="photographs")
    parser.add_argument("--workers", type=int, default=2, help="runtime.num_workers")
    parser.add_argument("--rows", type=int, default=64, help="runtime.embed_batch_size")
    parser.add_argument(
        "--their_batch", type=int, default=32, help="batch_size of SentenceTransformer.encode"
    )
    parser.add_argument("--batch", type=int, default=8, help="queries of the training step")
    parser.add_argument("--chunk", type=int, default=4, help="training.grad_cache_chunk_size")
    args = parser.parse_args()
    if find_spec("sentence_transformers") is None:
        sys.exit(
            "sentence_transformers is not installed. For this benchmark alone: pip install"
            " sentence-transformers"
        )
    torch.set_num_threads(args.threads)
    with TemporaryDirectory() as name:
        print(write_model(Path(name), args.size), flush=True)
        files = photographs(args.photos, args.num)
        work = Work(
            Path(name),
            files,
            args.tokens,
            prompt_format="chat",
            query_prompt=PROMPT,
            document_prompt=DOCUMENT,
        )
        theirs = Theirs(work, args.their_batch)
        for part in (
            part for part in PARTS if part in args.parts
        ):  # training last: it puts a LoRA on the models
            PARTS[part](work, theirs, args)


if __name__ == "__main__":
    prepare_process()
    main()
