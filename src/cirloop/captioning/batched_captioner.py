"""Captioning in batches: requests are grouped, and the captioner gets the images they are about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from cirloop.backbones.base import ImageEncoder
from cirloop.backbones.features import RUNTIME, VisionCache
from cirloop.captioning import journal as journals
from cirloop.captioning.base import Answer, Captioner, CaptionRequest
from cirloop.captioning.journal import Journal
from cirloop.captioning.prompts import Prompt
from cirloop.config.runtime import Runtime
from cirloop.monitoring import oom, profiling
from cirloop.monitoring.events import CountedBatches
from cirloop.types import ImageId, Images

if TYPE_CHECKING:
    from PIL import Image

OOM_ADVICE = (
    "Set a smaller captioning.batch_size or foundation.max_pixels. Batches are not split by"
    " themselves: the random numbers that texts come from depend on them."
)
NumberedBatch = tuple[int, list[int]]
"""A batch's number and the indices of its requests."""
Progress = Callable[[Any, str], Any]
"""Wraps an iterable of batches under a title, and yields the same batches."""


class ImageSource(Protocol):
    """What a captioner is shown of images: `VisionCache`, `RawImageSource`, `NullImageSource`."""

    def precompute(
        self, images: Sequence[ImageId], progress: Callable[[Any], Any] = iter
    ) -> None: ...

    def grids(self, images: Sequence[ImageId]) -> Sequence[tuple[int, ...]]: ...

    def get(self, images: Sequence[ImageId]) -> Sequence[Any]: ...


class RawImageSource:
    """Images as they are, loaded when needed. The counterpart of `VisionCache`."""

    def __init__(self, images: Images) -> None:
        self._images = images

    def precompute(self, images: Sequence[ImageId], progress: Callable[[Any], Any] = iter) -> None:
        """Do nothing: there is nothing to prepare."""

    def grids(self, images: Sequence[ImageId]) -> list[tuple[int, ...]]:
        """Return equal grids: sizes are not known before images are loaded."""
        return [(0,)] * len(images)

    def get(self, images: Sequence[ImageId]) -> list[Image.Image]:
        """Load `images`, each once."""
        with profiling.data_wait():
            loaded = {image: self._images.load(image) for image in dict.fromkeys(images)}
        return [loaded[image] for image in images]


class NullImageSource(RawImageSource):
    """No images, for a captioner that looks at none."""

    def get(self, images: Sequence[ImageId]) -> list[Image.Image]:
        """Return no image."""
        return []


class CaptionClient(Protocol):
    """A captioner as stages use it: `BatchedCaptioner`, or several processes with one each."""

    @property
    def name(self) -> str:
        """The captioner's name in the artifacts."""
        ...

    def generate(
        self,
        prompt: Prompt,
        requests: Sequence[CaptionRequest],
        max_new_tokens: int,
        temperatures: Sequence[float],
        seed: int,
        title: str,
    ) -> list[list[Answer]]: ...

    def yes_probability(
        self, prompt: Prompt, requests: Sequence[CaptionRequest], title: str
    ) -> list[float]: ...


class BatchedCaptioner:
    """Captioning requests in batches, grouped by reference image and length.

    `batch_size` affects sampling, because each batch has its own seed. A journal therefore keeps
    whole batches: one that was killed in the middle is asked again as a whole.
    """

    def __init__(
        self,
        captioner: Captioner,
        images: Images,
        cache: Path,
        batch_size: int,
        progress: Progress,
        runtime: Runtime = RUNTIME,
        share: tuple[int, int] = (0, 1),
        journal: Journal | None = None,
    ) -> None:
        """With `share` (i, n), do every n-th batch only, from the i-th on.

        `completed_indices` are then the indices of the requests in those batches. What `journal`
        has is not asked.
        """
        self.captioner = captioner
        self.completed_indices: list[int] = []
        self._batch_size = batch_size
        self._progress = progress
        self._share = share
        self._images = images
        self._journal = journal
        self._source = _image_source(captioner, images, cache, runtime)

    @property
    def name(self) -> str:
        return self.captioner.name

    def generate(
        self,
        prompt: Prompt,
        requests: Sequence[CaptionRequest],
        max_new_tokens: int,
        temperatures: Sequence[float],
        seed: int,
        title: str,
    ) -> list[list[Answer]]:
        """Generate per request an answer for each of `temperatures`; 0 is greedy.

        Equal arguments give equal answers.
        """
        answers: list[list[Answer]] = [[] for _ in requests]
        counted = self._counted(self._batches(prompt, requests, title), len(temperatures))
        batches = self._progress(counted, f"{title}: write")
        with profiling.add_seconds("writing"):
            for number, indices in profiling.profile_batches(batches, "captioning"):
                batch = [requests[i] for i in indices]
                batch_seed = seed + number * len(temperatures)
                options = (max_new_tokens, [*temperatures], batch_seed)
                batch_answers = self._ask("generate", prompt, batch, title, *options)
                for i, request_answers in zip(indices, batch_answers, strict=True):
                    answers[i] = [Answer(*answer) for answer in request_answers]
        return answers

    def yes_probability(
        self, prompt: Prompt, requests: Sequence[CaptionRequest], title: str
    ) -> list[float]:
        """Return the probability of "yes" per request."""
        probabilities = [0.0] * len(requests)
        counted = self._counted(self._batches(prompt, requests, title), 1)
        batches = self._progress(counted, f"{title}: yes or no")
        for _, indices in profiling.profile_batches(batches, "captioning"):
            batch = [requests[i] for i in indices]
            batch_probabilities = self._ask("yes_probability", prompt, batch, title)
            for i, probability in zip(indices, batch_probabilities, strict=True):
                probabilities[i] = probability
        return probabilities

    def _ask(
        self,
        kind: Literal["generate", "yes_probability"],
        prompt: Prompt,
        batch: Sequence[CaptionRequest],
        title: str,
        *options: object,
    ) -> list[Any]:
        """Return the answers to a batch as JSON: the journal's, or those of the captioner's method
        `kind`, which the journal then keeps."""
        name = ""
        if self._journal is not None:
            model = self.captioner.fingerprint
            name = journals.key(model, prompt, batch, self._images, kind, *options)
            if name in self._journal:
                return [*self._journal[name]]
        vision = self._source.get(_images(batch))
        with oom.explain_oom(f"{title}, {len(batch)} questions at once", OOM_ADVICE):
            answers = getattr(self.captioner, kind)(prompt, batch, vision, *options)
        if kind == "generate":
            profiling.add(texts=sum(map(len, answers)))
            answers = [[astuple(answer) for answer in row] for row in answers]
        if self._journal is not None:
            self._journal.add(name, answers)
        return [*answers]

    def precompute_vision(
        self,
        requests: Sequence[CaptionRequest],
        precompute: Callable[[VisionCache, Sequence[ImageId]], None],
    ) -> None:
        """Call `precompute(cache, images)` for the images of `requests`, where there is a cache."""
        if isinstance(self._source, VisionCache):
            precompute(self._source, _images(requests))

    def _counted(self, batches: list[NumberedBatch], texts: int) -> CountedBatches[NumberedBatch]:
        """Add the number of texts of each batch, `texts` a request; a rate is this process's."""
        num = self._share[1]
        unit = "texts/s" if num == 1 else f"texts/s in each of {num} processes"
        return CountedBatches(batches, [texts * len(indices) for _, indices in batches], unit)

    def _batches(
        self, prompt: Prompt, requests: Sequence[CaptionRequest], title: str
    ) -> list[NumberedBatch]:
        """Return this process's batches, sorted by length.

        Requests whose beginning a captioner with vision tokens can prefill once stand together.
        """
        self._source.precompute(_images(requests), lambda b: self._progress(b, f"{title}: vision"))
        shares_prefix = self.captioner.input_kind == "vision_tokens" and prompt.images_before_text
        groups = _groups(requests, self._image_sizes(requests), shares_prefix)
        first, num = self._share
        batches = [*enumerate(_packed(groups, self._batch_size))][first::num]
        self.completed_indices = [i for _, indices in batches for i in indices]
        return batches

    def _image_sizes(self, requests: Sequence[CaptionRequest]) -> list[tuple[int, int]]:
        """Return the sizes in patches of each request's two images."""
        grids = [self._source.grids([request.reference, request.image]) for request in requests]
        return [(prod(reference), prod(image)) for reference, image in grids]


def _image_source(
    captioner: Captioner, images: Images, cache: Path, runtime: Runtime
) -> ImageSource:
    if captioner.input_kind == "vision_tokens":
        return VisionCache(cast(ImageEncoder, captioner), images, cache, runtime)
    return RawImageSource(images) if captioner.input_kind == "images" else NullImageSource(images)


def _groups(
    requests: Sequence[CaptionRequest], sizes: Sequence[tuple[int, int]], by_reference: bool
) -> list[list[int]]:
    """Group indices of requests: each alone, or `by_reference`, equal pairs side by side.

    Groups and indices are sorted by length, in patches and characters, about four of either to a
    token. Groups are sorted by the length of the reference first, so that neither the shared part
    nor the rest needs much padding.
    """
    groups: dict[ImageId | int, list[int]] = {}
    for i, request in enumerate(requests):
        groups.setdefault(request.reference if by_reference else i, []).append(i)
    lengths = [sum(size) + len(request.text) for size, request in zip(sizes, requests, strict=True)]
    shared = len(groups) < len(requests)
    for group in groups.values():
        group.sort(key=lambda i: (sizes[i][1], requests[i].image, lengths[i], i))
    return sorted(
        groups.values(),
        key=lambda group: (shared * sizes[group[0]][0], max(lengths[i] for i in group), min(group)),
    )


def _packed(groups: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Pack groups in order into batches of at most `size` indices.

    A group is cut only where it is larger than a batch.
    """
    batches: list[list[int]] = []
    for group in groups:
        for start in range(0, len(group), size):
            indices = group[start : start + size]
            if not batches or len(batches[-1]) + len(indices) > size:
                batches.append([])
            batches[-1] += indices
    return batches


def _images(requests: Sequence[CaptionRequest]) -> list[ImageId]:
    """Return the two images of each request, in order."""
    return [image for request in requests for image in (request.reference, request.image)]
