"""A captioner that is shown the images it is asked about: cached vision tokens, pictures, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cirloop.backbones.features import VisionFeatures
from cirloop.captioning.base import Ask, Captioner
from cirloop.captioning.prompts import Prompt
from cirloop.types import ImageId, Images

if TYPE_CHECKING:
    from PIL import Image


class Pictures:
    """Images as they are, loaded when asked for. The counterpart of `VisionFeatures`."""

    def __init__(self, images: Images) -> None:
        self._images = images

    def ensure(self, images: Sequence[ImageId], progress: Callable[[Any], Any] = iter) -> None:
        """Nothing to prepare."""

    def grids(self, images: Sequence[ImageId]) -> list[tuple[int, ...]]:
        """Not known before they are loaded: all alike."""
        return [(0,)] * len(images)

    def get(self, images: Sequence[ImageId]) -> list[Image.Image]:
        loaded = {image: self._images.load(image) for image in dict.fromkeys(images)}
        return [loaded[image] for image in images]


class Nothing(Pictures):
    """For a captioner that looks at no image."""

    def get(self, images: Sequence[ImageId]) -> list[Image.Image]:
        return []


class Eyes:
    """Questions in batches of like lengths. `batch_size` decides the random numbers a text is sampled with."""

    def __init__(
        self,
        captioner: Captioner,
        images: Images,
        cache: Path,
        batch_size: int,
        progress: Callable[[Any, str], Any],
    ) -> None:
        self.captioner, self._batch_size, self._progress = captioner, batch_size, progress
        sources = {"pictures": Pictures, "nothing": Nothing}
        self._source: Any = (
            VisionFeatures(captioner, images, cache) if captioner.sees == "tokens" else sources[captioner.sees](images)
        )

    def write(
        self,
        prompt: Prompt,
        asks: Sequence[Ask],
        max_new_tokens: int,
        temperatures: Sequence[float],
        seed: int,
        title: str,
    ) -> list[list[str]]:
        """Per question an answer for each of `temperatures`; 0 is greedy. Same arguments, same answers."""
        out: list[list[str]] = [[] for _ in asks]
        batches = self._batches(asks, title)
        for number, rows in enumerate(self._progress(batches, f"{title}: write")):
            batch = [asks[i] for i in rows]
            vision = self._source.get(_images(batch))
            for turn, temperature in enumerate(temperatures):
                draw = seed + number * len(temperatures) + turn
                answers = self.captioner.write(prompt, batch, vision, max_new_tokens, temperature, draw)
                for i, answer in zip(rows, answers, strict=True):
                    out[i].append(answer)
        return out

    def yes(self, prompt: Prompt, asks: Sequence[Ask], title: str) -> list[float]:
        """Probability of "yes" per question."""
        out = [0.0] * len(asks)
        for rows in self._progress(self._batches(asks, title), f"{title}: yes or no"):
            batch = [asks[i] for i in rows]
            answers = self.captioner.yes(prompt, batch, self._source.get(_images(batch)))
            for i, p in zip(rows, answers, strict=True):
                out[i] = p
        return out

    def _batches(self, asks: Sequence[Ask], title: str) -> list[list[int]]:
        """Rows of `asks` in batches, sorted by length: patches and characters, about four of either to a token."""
        self._source.ensure(_images(asks), lambda b: self._progress(b, f"{title}: vision"))
        lengths = [
            sum(prod(grid) for grid in self._source.grids([ask.first, ask.second])) + len(ask.text) for ask in asks
        ]
        order = sorted(range(len(asks)), key=lambda i: (lengths[i], i))
        return [order[i : i + self._batch_size] for i in range(0, len(order), self._batch_size)]


def _images(asks: Sequence[Ask]) -> list[ImageId]:
    return [image for ask in asks for image in (ask.first, ask.second)]
