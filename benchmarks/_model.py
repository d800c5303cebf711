"""A random Qwen2-VL of about 100 million weights, photographs for it, sides timed in turn and
tables of ratios: what the benchmarks of embedding, training and captioning share. Not a benchmark
itself."""

from __future__ import annotations

import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from cirloop.config.runtime import Runtime
from cirloop.data.folder import image_suffixes
from cirloop.monitoring.console import table
from cirloop.types import ImageId, Query, QueryId, Triplet

if TYPE_CHECKING:
    from cirloop.backbones.features import VisionCache
    from cirloop.training.trainer import Trainer

SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "2b": {
        "text": {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 151_936,
        },
        "vision": {
            "embed_dim": 1280,
            "depth": 32,
            "num_heads": 16,
            "hidden_size": 1536,
            "mlp_ratio": 4,
        },
    },
    "mid": {
        "text": {
            "hidden_size": 512,
            "intermediate_size": 3072,
            "num_hidden_layers": 11,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "vocab_size": 20_700,
        },
        "vision": {
            "embed_dim": 384,
            "depth": 15,
            "num_heads": 6,
            "hidden_size": 512,
            "mlp_ratio": 4,
        },
    },
    "small": {
        "text": {
            "hidden_size": 128,
            "intermediate_size": 768,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 5_000,
        },
        "vision": {
            "embed_dim": 128,
            "depth": 3,
            "num_heads": 2,
            "hidden_size": 128,
            "mlp_ratio": 4,
        },
    },
}
"""`2b`: Qwen2-VL-2B's. `mid`: vision tower, language model and embedding in its proportions (665 :
1,310 : 233)."""
PIXELS_PER_TOKEN = 28 * 28
COLOURS = (
    "red",
    "navy blue",
    "green with white stripes",
    "black",
    "a very light shade of grey",
    "brown",
)


def write_model(directory: Path, size: str, dtype: str = "float32") -> str:
    """A random Qwen2-VL, drawn on the GPU if there is one, with the embedded model's tokenizer and
    processor.

    Returns how many weights its parts have, in words.
    """
    import torch
    from transformers import AutoConfig, AutoProcessor, Qwen2VLForConditionalGeneration

    from cirloop.backbones.weights import resolve

    tiny, sizes = resolve("tiny", "qwen2_vl"), SIZES[size]
    config = AutoConfig.from_pretrained(tiny)
    sections = [16, 24, 24] if size == "2b" else [8, 12, 12]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = type(config)(
        text_config={
            **config.text_config.to_dict(),
            **sizes["text"],
            "layer_types": None,
            "rope_parameters": rope,
        },
        vision_config={**config.vision_config.to_dict(), **sizes["vision"]},
        tie_word_embeddings=True,
        dtype=dtype,
        **{name: getattr(config, name) for name in ids},
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2VLForConditionalGeneration(config).to(getattr(torch, dtype))
    model.save_pretrained(directory)
    AutoProcessor.from_pretrained(tiny).save_pretrained(directory)
    parts = {
        "vision tower": model.model.visual,
        "language model": model.model.language_model.layers,
        "embedding": model.get_input_embeddings(),
    }
    millions = {
        name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in parts.items()
    }
    return ", ".join(f"{name} {each:.1f} M" for name, each in millions.items())


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--photos",
        type=Path,
        required=True,
        help="a directory of images, searched with its folders",
    )
    parser.add_argument(
        "--size", choices=SIZES, default="mid", help="of the model; small = to try it out"
    )
    parser.add_argument(
        "--tokens", type=int, default=256, help="visual tokens of an image, at most"
    )
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--repeats", type=int, default=4)


def noise(directory: Path, num: int, wide: int, high: int) -> None:
    """JPEG files whose contents are as dear to decode as those of photographs."""
    random = np.random.default_rng(0)
    directory.mkdir()
    for number in range(num):
        rough = Image.fromarray(random.integers(0, 256, (60, 80, 3), np.uint8))
        rough.resize((wide, high), Image.Resampling.BICUBIC).save(
            directory / f"{number:04d}.jpg", quality=90
        )


def photographs(directory: Path, num: int) -> dict[ImageId, Path]:
    """The first `num` images below `directory`, by name."""
    found = sorted(
        path for path in directory.rglob("*") if path.suffix.lower() in image_suffixes()
    )[:num]
    assert len(found) == num, f"{len(found)} images in {directory}, not {num}"
    return {ImageId(f"{place:04d}"): path for place, path in enumerate(found)}


def picture(path: Path, max_pixels: int) -> Image.Image:
    """An image as qwen-vl-utils sizes it for Qwen2-VL."""
    from qwen_vl_utils import fetch_image

    with Image.open(path) as opened:
        upright = ImageOps.exif_transpose(opened).convert("RGB")
    sized: Image.Image = fetch_image(
        {"image": upright, "min_pixels": PIXELS_PER_TOKEN, "max_pixels": max_pixels}
    )
    return sized


def text_of(number: int) -> str:
    return f"is {COLOURS[number % len(COLOURS)]} and has a longer sleeve than the one before"


class Work:
    """Our embedder of the model in `directory`, with the photographs `files`; further settings are
    the embedder's."""

    def __init__(
        self,
        directory: Path,
        files: Mapping[ImageId, Path],
        tokens: int,
        dtype: str = "float32",
        **settings: Any,
    ) -> None:
        from cirloop.backbones import Qwen2VLSettings

        self.directory, self.files, self.ids, self.max_pixels = (
            directory,
            files,
            [*files],
            tokens * PIXELS_PER_TOKEN,
        )
        settings = {
            "path": str(directory),
            "dtype": dtype,
            "max_pixels": self.max_pixels,
            **settings,
        }
        self.backbone: Any = Qwen2VLSettings(**settings).build()

    def features(self, name: str, num_workers: int = 2, vision_batch_size: int = 8) -> VisionCache:
        """The cache called `name`, as a new process finds it: it reads the photographs' digests
        again."""
        from cirloop.backbones.features import VisionCache
        from cirloop.data.images import FileImages

        runtime = Runtime(num_workers=num_workers, vision_batch_size=vision_batch_size)
        return VisionCache(self.backbone, FileImages(self.files), self.directory / name, runtime)

    def pixels(self, image: ImageId) -> Image.Image:
        return picture(self.files[image], self.max_pixels)

    def trainer(self, size: int, chunk_size: int, temperature: float, **lora: Any) -> Trainer:
        """InfoNCE by gradient caching over batches of `size`; a LoRA that is not zero, no dropout,
        by `lora`."""
        import torch

        from cirloop.backbones import LoraSettings
        from cirloop.distributed.worker import create_accelerator
        from cirloop.training.batches import BatchSampler
        from cirloop.training.config import InfoNCE, TrainingSettings
        from cirloop.training.trainer import Trainer

        queries = [Query(QueryId(f"q{n}"), image, text_of(n)) for n, image in enumerate(self.ids)]
        triplets = [
            Triplet(query, target)
            for query, target in zip(queries, self.ids[1:] + self.ids[:1], strict=True)
        ]
        settings = TrainingSettings(
            batch_size=size,
            grad_cache_chunk_size=chunk_size,
            loss=InfoNCE(temperature=temperature),
            lora=LoraSettings(dropout=0.0, **lora),
        )  # fmt: skip
        self.backbone.make_trainable(settings, 0)
        with torch.no_grad():
            for number, (name, parameter) in enumerate(self.backbone.trainable().items()):
                if "lora_B" in name:
                    drawn = torch.randn(
                        parameter.shape, generator=torch.Generator().manual_seed(number)
                    )
                    parameter.copy_(0.02 * drawn)
        made = Trainer(
            self.backbone,
            self.features("train"),
            BatchSampler(triplets, [], [], size, 0.0, 0, 0),
            settings,
            1,
            0,
            "",
            self.directory / "steps",
            0,
            create_accelerator(),
        )
        made.module.train()
        return made


def gradient(trainer: Trainer) -> Any:
    """All gradients in one row; they are set back."""
    import torch

    grads = [p.grad.flatten() for p in trainer.parameters.values() if p.grad is not None]
    assert len(grads) == len(trainer.parameters)
    trainer.optimizer.zero_grad()
    return torch.cat(grads)


def apart(one: Any, other: Any) -> float:
    """Length of the difference of two gradients, as a share of the other's length."""
    return float((one - other).norm() / other.norm())


def in_turn(
    sides: Mapping[str, Callable[[int], Any]], repeats: int
) -> tuple[dict[str, list[float]], dict[str, list[Any]]]:
    """Seconds and results per side: all sides once, then all again; a side is called with the
    number of the repeat.

    Work that a side has given to a GPU is waited for.
    """
    taken: dict[str, list[float]] = {name: [] for name in sides}
    made: dict[str, list[Any]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name, side in sides.items():
            began = time.perf_counter()
            made[name].append(side(repeat))
            wait()
            taken[name].append(time.perf_counter() - began)
    return taken, made


def wait() -> None:
    """Until a GPU has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def best(call: Callable[[], Any], repeats: int = 3, enough: float = 5.0) -> float:
    """Seconds of the quickest call after a first one, or of that one where it took more than
    `enough`."""
    taken: list[float] = []
    while len(taken) <= repeats and (not taken or taken[0] < enough):
        wait()
        began = time.perf_counter()
        call()
        wait()
        taken.append(time.perf_counter() - began)
    return min(taken[1:] or taken)


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    made = work()
    return time.perf_counter() - began, made


def report(title: str, taken: Mapping[str, Sequence[float]]) -> None:
    """Mean seconds per side, and how many times as fast as the first: mean over the repeats and
    standard error."""
    first = np.array(next(iter(taken.values())))
    rows = []
    for name, each in taken.items():
        ratios = first / np.array(each)
        spread = (
            f"{np.std(ratios, ddof=1) / len(ratios) ** 0.5:.2f}" if len(ratios) > 1 else "unknown"
        )
        rows.append((name, f"{np.mean(each):.2f}", f"{np.mean(ratios):.2f} ± {spread}"))
    table(title, ("side", "seconds", "times as fast as the first"), rows)
