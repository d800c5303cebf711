"""Seconds per image, query and caption of a run's own settings: what docs/scaling.md multiplies.

Takes a run's flags, builds its data set and models, and measures on its training split, as often as
`--repeats`:

    image      embedded as a gallery image, vision tower and decoding included (an empty cache)
    again      the same with its vision features kept
    query      a reference with a text, vision features kept
    caption    a text for two images by the foundation model, greedy, vision features kept

Prints means with standard errors over the repeats, bytes of a vector and of an image's kept vision
features, and the flags for benchmarks/scaling_table.py.

    python benchmarks/cost_per_item.py
    python benchmarks/cost_per_item.py --num 256 --config configs/cirr_qwen2_vl.yaml --data_dir CIRR
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from cirloop.backbones import EmbedInput
from cirloop.backbones.features import VisionCache
from cirloop.captioning.base import CaptionRequest
from cirloop.captioning.batched_captioner import BatchedCaptioner
from cirloop.config.run import RunConfig, load
from cirloop.data.paths import DataPaths
from cirloop.monitoring.console import table
from cirloop.reproducibility import prepare_process
from cirloop.retrieval.embed import embed, query_items

ROOT = Path(__file__).resolve().parent.parent


def quiet(items: Any, title: str = "") -> Any:
    return items


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    made = work()
    return time.perf_counter() - began, made


def measure(
    config: RunConfig, num: int, repeats: int, directory: Path
) -> tuple[dict[str, list[float]], int, float]:
    """Seconds per item of each kind, bytes of a vector, and bytes of kept vision features per
    image."""
    train = config.data.build(
        DataPaths(config.data_dir, config.cache, quiet, config.train_dir)
    ).train
    triplets = train.triplets[:num]
    queries = query_items([t.query for t in triplets])
    images = list(
        dict.fromkeys([t.target for t in triplets] + [t.query.reference for t in triplets])
    )
    runtime, backbone = config.runtime, config.model.build()

    def vectors(items: list[EmbedInput], name: str) -> Any:
        features = VisionCache(backbone, train.images, directory / name, runtime)
        size, tokens = runtime.embed_batch_size, runtime.max_tokens_per_batch
        return embed(backbone, features, items, size, quiet, name, tokens)

    vectors([EmbedInput(image) for image in images[:4]], "first")  # what only the first call does
    taken: dict[str, list[float]] = {name: [] for name in ("image", "again", "query", "caption")}
    made: Any = None
    for repeat in range(repeats):
        kept = f"kept {repeat}"
        for name, items in (
            ("image", [EmbedInput(i) for i in images]),
            ("again", [EmbedInput(i) for i in images]),
        ):
            seconds, made = timed(lambda items=items, kept=kept: vectors(items, kept))
            taken[name].append(seconds / len(items))
        seconds, _ = timed(lambda kept=kept: vectors(queries, kept))
        taken["query"].append(seconds / len(queries))
    on_disk = sum(
        file.stat().st_size for file in (directory / "kept 0").rglob("*") if file.is_file()
    ) / len(images)
    captioner = config.foundation.build(
        backbone if config.foundation.shares_base_with(config.model) else None
    )
    requests = [CaptionRequest(t.query.reference, t.target, t.query.text) for t in triplets]
    prompt, tokens = (
        config.captioning.prompts(config.foundation).rewrite,
        config.captioning.max_new_tokens,
    )
    eyes = BatchedCaptioner(
        captioner, train.images, directory / "eyes", config.captioning.batch_size, quiet, runtime
    )
    for repeat in range(-1, repeats):  # the first keeps the vision features
        seconds, _ = timed(lambda: eyes.generate(prompt, requests, tokens, [0.0], 0, "caption"))
        taken["caption"] += [seconds / len(requests)] if repeat >= 0 else []
    return taken, int(made[0].nbytes), on_disk


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num", type=int, default=128, help="triplets")
    parser.add_argument("--repeats", type=int, default=3)
    args, rest = parser.parse_known_args()
    config = load(rest, ROOT / "configs" / "shapes.yaml")
    with TemporaryDirectory() as directory:
        taken, vector, on_disk = measure(config, args.num, args.repeats, Path(directory))
    means = {name: float(np.mean(values)) for name, values in taken.items()}
    rows = [
        (
            name,
            f"{1000 * means[name]:.3f} ± {1000 * np.std(values, ddof=1) / len(values) ** 0.5:.3f}",
        )
        for name, values in taken.items()
    ]
    table(
        f"{config.model.type} {config.model.path}, {args.num} triplets",
        ("item", "milliseconds"),
        rows,
    )
    print(f"bytes of a vector: {vector}; of an image's kept vision features: {on_disk:.0f}")
    flags = " ".join(f"--{name} {means[name]:.3g}" for name in ("image", "query", "caption"))
    print(
        f"python benchmarks/scaling_table.py {flags} --dimensions {vector // 4} --features"
        f" {on_disk:.0f}"
    )


if __name__ == "__main__":
    prepare_process()
    main()
