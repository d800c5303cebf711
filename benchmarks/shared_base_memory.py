"""Memory of captioning beside the embedder: on its weights with its adapter off, and with a model
of its own.

Writes a random Qwen2-VL of about 200 million weights to a temporary directory. Three child
processes embed the same images and texts with a LoRA on; two of them also write, verify and embed
again, as a round of the loop does. Two more run a whole round: without new texts, and with texts on
the embedder's weights. Prints the peak resident memory of each, as measured by the kernel, and its
ratio to the first of its kind.

    python benchmarks/shared_base_memory.py
    python benchmarks/shared_base_memory.py --size small     to try it out
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

NUM_PAIRS, BATCH = 8, 4
PARTS = {
    "embedder": "the embedder alone",
    "shared": "captions on the embedder's weights",
    "separate": "captions by a model of its own",
    "round": "a round without new texts",
    "round shared": "a round with texts on the embedder's weights",
}
SIZES = {
    "full": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 14,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
    "small": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}


def write_model(directory: Path, size: str) -> int:
    """A random Qwen2-VL with the embedded model's tokenizer; the number of its weights."""
    import torch
    from transformers import AutoConfig, AutoProcessor, Qwen2VLForConditionalGeneration

    from cirloop.backbones.weights import resolve

    tiny = resolve("tiny", "qwen2_vl")
    config = AutoConfig.from_pretrained(tiny)
    text = SIZES[size]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    config = type(config)(
        text_config={
            **config.text_config.to_dict(),
            **text,
            "layer_types": None,
            "rope_parameters": rope,
        },
        vision_config={**config.vision_config.to_dict(), "hidden_size": text["hidden_size"]},
        tie_word_embeddings=config.tie_word_embeddings,
        **{
            name: getattr(config, name)
            for name in (
                "image_token_id",
                "video_token_id",
                "vision_start_token_id",
                "vision_end_token_id",
            )
        },
    )
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config)
    model.save_pretrained(directory)
    AutoProcessor.from_pretrained(tiny).save_pretrained(directory)
    return sum(p.numel() for p in model.parameters())


def work(part: str, directory: Path) -> int:
    """Peak resident memory in KiB."""
    import torch

    from cirloop.backbones import EmbedInput, Qwen2VLSettings
    from cirloop.backbones.features import VisionCache
    from cirloop.captioning.base import CaptionRequest
    from cirloop.captioning.batched_captioner import BatchedCaptioner
    from cirloop.captioning.config import CaptioningSettings
    from cirloop.captioning.foundation import Qwen2VLFoundation
    from cirloop.data import ShapesSettings
    from cirloop.training.config import TrainingSettings

    train = (
        ShapesSettings(train_families=2, train_triplets=NUM_PAIRS, eval_families=2).build().train
    )
    embedder = Qwen2VLSettings(path=str(directory), dtype="float32").build()
    embedder.make_trainable(TrainingSettings(), seed=0)
    embedder.module.eval()
    cache = directory / f"vision {part}"
    features = VisionCache(embedder, train.images, cache)

    def embed() -> None:
        items = [EmbedInput(t.query.reference, t.query.text) for t in train.triplets] + [
            EmbedInput(i) for i in train.gallery.ids[:NUM_PAIRS]
        ]
        for start in range(0, len(items), BATCH):
            batch = items[start : start + BATCH]
            with torch.no_grad():
                embedder.module(
                    embedder.inputs(batch, features.get([item.image for item in batch]))
                )

    embed()
    if part != "embedder":
        foundation = Qwen2VLFoundation(path=str(directory), dtype="float32")
        captioner = foundation.build(embedder if part == "shared" else None)
        assert (captioner.vlm is embedder.vlm) == (part == "shared")
        eyes = BatchedCaptioner(captioner, train.images, cache, BATCH, lambda b, _: b)
        requests = [
            CaptionRequest(t.query.reference, t.target, t.query.text) for t in train.triplets
        ]
        prompts = CaptioningSettings().prompts(foundation)
        eyes.generate(prompts.rewrite, requests, 8, [0.0, 0.7], 0, "benchmark")
        eyes.yes_probability(prompts.verify, requests, "benchmark")
        embed()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run_round(part: str, directory: Path) -> int:
    """Peak resident memory in KiB of warm-up, mining, captions, training and evaluation, a step of
    each training."""
    from cirloop.cli import runner
    from cirloop.config.run import RunConfig

    model = {"type": "qwen2_vl", "path": str(directory), "dtype": "float32"}
    captions = {
        "num_candidates": 2,
        "batch_size": BATCH,
        "max_new_tokens": 8,
        "min_verify_probability": 0.5,
        "max_round_trip_rank": 20,
    }
    runner.run(
        RunConfig(
            experiment_dir=directory / part,
            model=model,
            foundation=model,
            num_iterations=1,
            data={
                "type": "shapes",
                "train_families": 2,
                "train_triplets": NUM_PAIRS,
                "eval_families": 2,
            },
            mining={"strategy": {"type": "top_k", "negatives_per_query": 1, "extra_ranks": "all"}},
            captioning={**captions, "enabled": part == "round shared"},
            training={
                "iteration_0_steps": 1,
                "steps_per_iteration": 1,
                "batch_size": BATCH,
                "negatives_in_batch": 0,
            },
            runtime={"cache_dir": directory / f"cache {part}", "embed_batch_size": BATCH},
        )
    )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="full", help="of the model")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print((run_round if args.part.startswith("round") else work)(args.part, args.directory))
        return
    from cirloop.monitoring.console import table

    with TemporaryDirectory() as name:
        num = write_model(Path(name), args.size)
        peaks = {}
        for part in PARTS:
            command = [sys.executable, __file__, "--part", part, "--directory", name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            peaks[part] = int(done.stdout.split()[-1]) * 1024
    first = {part: peaks["round" if part.startswith("round") else "embedder"] for part in peaks}
    rows = [
        (PARTS[p], f"{peak / 1e9:.2f} GB", f"{peak / first[p]:.3f}") for p, peak in peaks.items()
    ]
    table(
        f"Peak memory, {num / 1e6:.0f} million weights in float32",
        ("process", "peak", "ratio"),
        rows,
    )


if __name__ == "__main__":
    from cirloop.reproducibility import prepare_process

    prepare_process()
    main()
