"""What looking at every image costs, against nothing but decoding it with the same workers.

Both sides in turn over the same files, copies of the images of `--images` until there are
`--num`. Prints images a second of both and the ratio of their times with its standard error over
the repeats.

    python benchmarks/image_check.py --images DIR --num 10000
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from cirloop.data.folder import image_suffixes
from cirloop.data.image_check import unreadable_images
from cirloop.monitoring.console import progress
from cirloop.types import ImageId


def bare(path: Path) -> None:
    with Image.open(path) as image:
        image.convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--num", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    found = sorted(
        path for path in args.images.rglob("*") if path.suffix.lower() in image_suffixes()
    )
    assert found, f"no images in {args.images}"
    with tempfile.TemporaryDirectory() as directory:
        files = {}
        for number in range(args.num):
            path = Path(directory) / f"{number:06d}{found[number % len(found)].suffix}"
            shutil.copyfile(found[number % len(found)], path)
            files[ImageId(f"{number:06d}")] = path
        ratios = []
        for _ in range(args.repeats):
            began = time.monotonic()
            with ThreadPoolExecutor(args.workers) as pool:
                list(pool.map(bare, files.values(), chunksize=16))
            middle = time.monotonic()
            bad = unreadable_images(files, args.workers, lambda images: progress(images, "look"))
            ended = time.monotonic()
            ratios.append((ended - middle) / (middle - began))
            rates = [args.num / seconds for seconds in (middle - began, ended - middle)]
            print(
                f"decode alone {rates[0]:.0f}/s, look {rates[1]:.0f}/s, {len(bad)} bad", flush=True
            )
    spread = np.std(ratios, ddof=1) / len(ratios) ** 0.5 if len(ratios) > 1 else float("nan")
    print(
        f"look / decode alone, in time: {np.mean(ratios):.2f} ± {spread:.2f}; {args.num} files,"
        f" {args.workers} workers"
    )


if __name__ == "__main__":
    main()
