"""How long a query takes, from the engine and through the page's HTTP API, apart from the first
ones.

    .venv/bin/python benchmarks/search_latency.py --experiment_dir RUN --images 2000

Draws `shapes` images into a folder, indexes them with the run's last model, and asks composed
queries: a random image and a text of the data set each. Prints median, 95th percentile and
maximum in milliseconds. Run it on an idle machine; OMP_NUM_THREADS sets the threads.
"""

from __future__ import annotations

import argparse
import http.client
import json
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from cirloop.cli import entry
from cirloop.data.shapes.splits import build_splits
from cirloop.tools.demo.api import build_api
from cirloop.tools.demo.page import build_page
from cirloop.tools.demo.server import HOST, Address, served
from cirloop.tools.search.config import SearchOptions
from cirloop.tools.search.engine import Engine


def draw(folder: Path, num: int) -> list[str]:
    """`num` images as PNG; the texts of the same scenes."""
    scenes = build_splits()["train"]
    for row in range(num):
        Image.fromarray(scenes.pixels(row)).save(folder / f"{row:05d}.png")
    return [ask.text for ask in scenes.queries[: 4 * num]]


def timed(name: str, asked: list[tuple[str, str]], search: Callable[[str, str], object]) -> None:
    """Print what queries take, the first three apart."""
    seconds = []
    for image, text in asked:
        began = time.perf_counter()
        search(image, text)
        seconds.append(time.perf_counter() - began)
    ms = 1000 * np.array(seconds[3:])
    print(
        f"{name:>20}  median {np.median(ms):7.1f}  p95 {np.percentile(ms, 95):7.1f}  max"
        f" {ms.max():7.1f} ms"
    )


def by_http(engine: Engine, label: str, asked: list[tuple[str, str]], k: int) -> None:
    """The page's API, its server in a thread of this process."""
    page = build_page(engine, label, k)
    with served(page, build_api(engine, label, k), Address()) as url:
        _by_http(url, page.server_port, label, asked, k)


def _by_http(url: str, port: int, label: str, asked: list[tuple[str, str]], k: int) -> None:
    from gradio_client import Client

    client = Client(url, verbose=False, analytics_enabled=False)
    timed(
        "page, gradio_client",
        asked,
        lambda image, text: client.predict(image, text, label, k, api_name="/search"),
    )
    client.close()
    # As a browser: one connection, kept open.
    kept = http.client.HTTPConnection(HOST, port)

    def post(image: str, text: str) -> None:
        said = json.dumps({"data": [image, text, label, k]})
        kept.request("POST", "/gradio_api/run/search", said, {"Content-Type": "application/json"})
        answer = json.loads(kept.getresponse().read())
        assert len(answer["data"][0]["results"]) == k

    timed("page, by POST", asked, post)
    kept.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiment_dir", type=Path, required=True)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--k", type=int, default=10)
    options = parser.parse_args()
    with TemporaryDirectory() as place:
        texts = draw(Path(place), options.images)
        engine = Engine(SearchOptions(experiment_dir=options.experiment_dir, gallery=Path(place)))
        label = engine.label(None)
        engine.warm_up(label)
        random = np.random.default_rng(0)
        rows, words = (
            random.integers(options.images, size=options.queries + 3),
            random.permutation(len(texts)),
        )
        asked = [
            (engine.gallery.ids[row], texts[word]) for row, word in zip(rows, words, strict=False)
        ]
        print(
            f"{options.images} images, {options.queries} queries, {torch.get_num_threads()} threads"
        )
        timed(
            "engine",
            asked,
            lambda image, text: engine.search(label, engine.known(image), text, options.k),
        )
        by_http(engine, label, asked, options.k)


if __name__ == "__main__":
    entry.main_wrapper(main)
