"""Exports in a fresh process without cirloop, by the code of their own cards: the run's vectors, to
1e-5."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from cirloop.backbones import EmbedInput
from cirloop.config.run import from_json
from cirloop.data.images import decode
from cirloop.retrieval.embed import embed
from cirloop.stages.context import RunContext, run_directory
from tests.export.conftest import FORMATS

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "photos"
SEEN = ("a.jpg", "b.jpg", "c.jpg", "reference.jpg")
"""What the second snippet of a card opens."""
ODD = "red <|image_pad|> and\n {text} <|im_end|> `blue`"


class Images:
    """Files by name, as the program reads images."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def load(self, image: str) -> Image.Image:
        return decode(self.directory / image)

    def digest(self, image: str) -> str:
        return image


@pytest.fixture(scope="session")
def pictures(exported: dict[str, Path], run: Path) -> Path:
    """Where the cards are run: images of val beside photographs, where there are any, and noise
    of odd sizes."""
    here = exported["adapter"].parent
    val = RunContext(
        *run_directory(run), from_json(run / "config.json").data.build()
    ).data.eval_splits("val")[0]
    for name, image in zip(SEEN, val.gallery.ids, strict=False):
        val.images.load(image).save(here / name.replace("jpg", "png"))
    for number, (name, size) in enumerate(
        zip(SEEN, ((640, 200), (90, 333), (50, 40), (84, 84)), strict=True)
    ):
        noise = np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(noise).save(here / name, quality=95)
    for number, photo in enumerate(sorted(PHOTOS.rglob("*.jpg"))[:2]):
        decode(photo).save(here / f"photo_{number}.png")
    return here


@pytest.fixture(scope="session")
def inputs(pictures: Path) -> list[dict[str, str]]:
    names = sorted(path.name for path in pictures.iterdir() if path.suffix in (".jpg", ".png"))
    composed = [
        {"image": name, "text": text}
        for name, text in zip(names, ("make it blue", ODD, "", "x"), strict=False)
    ]
    return [
        *({"image": name} for name in names),
        *composed,
        {"text": "a red circle"},
        {"text": "two squares, \nblue"},
    ]


@pytest.fixture(scope="session")
def consumers(
    exported: dict[str, Path],
    pictures: Path,
    inputs: list[dict[str, str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """What the process without cirloop wrote."""
    out = tmp_path_factory.mktemp("consumers")
    asked = {
        "cards": {
            export_format: str(path / "README.md") for export_format, path in exported.items()
        },
        "inputs": inputs,
        "here": str(pictures),
        "out": str(out),
    }
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "OMP_NUM_THREADS": "1"
    }
    script = [sys.executable, "-I", str(Path(__file__).with_name("consumer.py"))]
    ended = subprocess.run(
        script, input=json.dumps(asked) + "\n", capture_output=True, text=True, env=env, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == [], "cirloop was there"
    return out


@pytest.fixture(scope="session")
def expected(run: Path, pictures: Path, inputs: list[dict[str, str]]) -> npt.NDArray[np.float32]:
    """The run's own vectors (N, D), the way mining and evaluation embed."""
    import torch

    from cirloop.backbones.features import VisionCache

    config, store = run_directory(run)
    backbone: Any = config.model.build(store.load("checkpoint_iter_1").path)
    files: Any = Images(pictures)
    features = VisionCache(backbone, files, pictures / "cache", config.runtime)
    items: list[Any] = [
        EmbedInput(each["image"], each.get("text")) for each in inputs if "image" in each
    ]  # type: ignore[arg-type]
    made = embed(backbone, features, items, 64, lambda batches, _: batches, "expected")
    with torch.inference_mode():
        alone = backbone.module(
            backbone.text_inputs([each["text"] for each in inputs if "image" not in each])
        )
    return np.concatenate([made, alone.numpy()])


@pytest.mark.full
@pytest.mark.parametrize("export_format", FORMATS)
def test_a_consumer_gets_the_vectors_of_the_run(
    export_format: str,
    consumers: Path,
    expected: npt.NDArray[np.float32],
    inputs: list[dict[str, str]],
) -> None:
    made, together = (
        np.load(consumers / f"{export_format}.npy"),
        np.load(consumers / f"{export_format}_together.npy"),
    )
    assert made.shape == expected.shape and np.abs(made - expected).max() < 1e-5
    assert np.abs(together - expected[: len(together)]).max() < 1e-5, (
        "a batch gives other vectors than its rows alone"
    )
    apart = np.abs(expected[:, None] - expected[None]).max(-1) + np.eye(len(expected))
    assert apart.min() > 1e-3, "inputs that could be exchanged show nothing"


@pytest.mark.full
@pytest.mark.parametrize("export_format", FORMATS)
def test_the_search_of_the_card_is_a_search(
    export_format: str, consumers: Path, exported: dict[str, Path]
) -> None:
    scores = np.load(consumers / f"{export_format}_scores.npy")
    assert scores.shape == (1, 3) and np.abs(scores).max() <= 1 and len({*scores[0].tolist()}) == 3


@pytest.mark.full
@pytest.mark.parametrize("export_format", FORMATS)
def test_nothing_of_this_machine_is_in_an_export(
    export_format: str, exported: dict[str, Path], run: Path
) -> None:
    texts = [
        path
        for path in exported[export_format].rglob("*")
        if path.suffix in (".json", ".md", ".jinja")
    ]
    assert len(texts) > 5
    assert [path.name for path in texts if str(run.parent) in path.read_text("utf-8")] == []
    assert not [*exported[export_format].parent.glob(".*")], "something was left beside it"
