"""A captioner that is shown the images it is asked about: cached vision tokens, pictures, or
nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cirloop.backbones.features import RUNTIME, VisionFeatures
from cirloop.captioning.base import Answer, Ask, Captioner
from cirloop.captioning.prompts import Prompt
from cirloop.config.runtime import Runtime
from cirloop.monitoring import oom, profiling
from cirloop.monitoring.events import CountedBatches
from cirloop.types import ImageId, Images

if TYPE_CHECKING:
    from PIL import Image

SMALLER = (
    "Set a smaller captioning.batch_size or foundation.max_pixels. Batches are not split by"
    " themselves: the random numbers that texts come from depend on them."
)


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
        with profiling.data_wait():
            loaded = {image: self._images.load(image) for image in dict.fromkeys(images)}
        return [loaded[image] for image in images]


class Nothing(Pictures):
    """For a captioner that looks at no image."""

    def get(self, images: Sequence[ImageId]) -> list[Image.Image]:
        return []


class Asked(Protocol):
    """Who answers questions about images: `Eyes`, or several processes that each have some."""

    @property
    def name(self) -> str:
        """What the artifacts call the captioner."""
        ...

    def write(
        self,
        prompt: Prompt,
        asks: Sequence[Ask],
        max_new_tokens: int,
        temperatures: Sequence[float],
        seed: int,
        title: str,
    ) -> list[list[Answer]]: ...

    def yes(self, prompt: Prompt, asks: Sequence[Ask], title: str) -> list[float]: ...


class Eyes:
    """Questions in batches of like references and lengths. `batch_size` decides the random numbers
    texts come from."""

    def __init__(
        self,
        captioner: Captioner,
        images: Images,
        cache: Path,
        batch_size: int,
        progress: Callable[[Any, str], Any],
        runtime: Runtime = RUNTIME,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """With `share` (i, n) only every n-th batch is asked, from the i-th on; `done` are its
        rows."""
        self.captioner, self._batch_size, self._progress = captioner, batch_size, progress
        self._share = share
        self.done: list[int] = []
        sources = {"pictures": Pictures, "nothing": Nothing}
        self._source: Any = (
            VisionFeatures(captioner, images, cache, runtime)
            if captioner.sees == "tokens"
            else sources[captioner.sees](images)
        )

    @property
    def name(self) -> str:
        return self.captioner.name

    def write(
        self,
        prompt: Prompt,
        asks: Sequence[Ask],
        max_new_tokens: int,
        temperatures: Sequence[float],
        seed: int,
        title: str,
    ) -> list[list[Answer]]:
        """Per question an answer for each of `temperatures`; 0 is greedy. Same arguments, same
        answers."""
        out: list[list[Answer]] = [[] for _ in asks]
        counted = self._counted(self._batches(prompt, asks, title), len(temperatures))
        batches = self._progress(counted, f"{title}: write")
        with profiling.add_seconds("writing"):
            for number, rows in profiling.profile_batches(batches, "captioning"):
                batch = [asks[i] for i in rows]
                vision, draw = self._source.get(_images(batch)), seed + number * len(temperatures)
                with oom.explain_oom(f"{title}, {len(batch)} questions at once", SMALLER):
                    answers = self.captioner.write(
                        prompt, batch, vision, max_new_tokens, temperatures, draw
                    )
                profiling.add(texts=len(answers) * len(temperatures))
                for i, several in zip(rows, answers, strict=True):
                    out[i] = several
        return out

    def yes(self, prompt: Prompt, asks: Sequence[Ask], title: str) -> list[float]:
        """Probability of "yes" per question."""
        out = [0.0] * len(asks)
        batches = self._progress(
            self._counted(self._batches(prompt, asks, title), 1), f"{title}: yes or no"
        )
        for _, rows in profiling.profile_batches(batches, "captioning"):
            batch = [asks[i] for i in rows]
            vision = self._source.get(_images(batch))
            with oom.explain_oom(f"{title}, {len(batch)} questions at once", SMALLER):
                answers = self.captioner.yes(prompt, batch, vision)
            for i, p in zip(rows, answers, strict=True):
                out[i] = p
        return out

    def see(self, asks: Sequence[Ask], ensure: Callable[[Any, Sequence[ImageId]], None]) -> None:
        """Have the images of `asks` by `ensure(features, images)`, where the captioner has features
        of them."""
        if self.captioner.sees == "tokens":
            ensure(self._source, _images(asks))

    def _counted(
        self, batches: list[tuple[int, list[int]]], texts: int
    ) -> CountedBatches[tuple[int, list[int]]]:
        """With the number of texts that each batch is about, `texts` a question; a rate is that of
        this process."""
        num = self._share[1]
        unit = "texts/s" if num == 1 else f"texts/s in each of {num} processes"
        return CountedBatches(batches, [texts * len(rows) for _, rows in batches], unit)

    def _batches(
        self, prompt: Prompt, asks: Sequence[Ask], title: str
    ) -> list[tuple[int, list[int]]]:
        """Rows of `asks` in numbered batches, sorted by length; what a captioner that sees tokens
        can read once stands together. Only those of this process's share."""
        self._source.ensure(_images(asks), lambda b: self._progress(b, f"{title}: vision"))
        grids = [self._source.grids([ask.first, ask.second]) for ask in asks]
        sizes = [(prod(first), prod(second)) for first, second in grids]
        groups = _groups(asks, sizes, self.captioner.sees == "tokens" and prompt.pictures_first)
        first, num = self._share
        mine = [*enumerate(_packed(groups, self._batch_size))][first::num]
        self.done = [row for _, rows in mine for row in rows]
        return mine


def _groups(
    asks: Sequence[Ask], sizes: Sequence[tuple[int, int]], together: bool
) -> list[list[int]]:
    """Rows, where `together` those of one reference in a group, its pairs side by side. Groups and
    rows are sorted by length: patches and characters, about four of either to a token; groups first
    by that of the reference, so that neither what is shared nor what is not needs much padding."""
    groups: dict[ImageId | int, list[int]] = {}
    for i, ask in enumerate(asks):
        groups.setdefault(ask.first if together else i, []).append(i)
    lengths = [sum(size) + len(ask.text) for size, ask in zip(sizes, asks, strict=True)]
    shared = len(groups) < len(asks)
    for group in groups.values():
        group.sort(key=lambda i: (sizes[i][1], asks[i].second, lengths[i], i))
    return sorted(
        groups.values(),
        key=lambda group: (shared * sizes[group[0]][0], max(lengths[i] for i in group), min(group)),
    )


def _packed(groups: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Batches of at most `size` rows, in order; a group is cut only where it is larger than a
    batch."""
    batches: list[list[int]] = []
    for group in groups:
        for start in range(0, len(group), size):
            rows = group[start : start + size]
            if not batches or len(batches[-1]) + len(rows) > size:
                batches.append([])
            batches[-1] += rows
    return batches


def _images(asks: Sequence[Ask]) -> list[ImageId]:
    return [image for ask in asks for image in (ask.first, ask.second)]
