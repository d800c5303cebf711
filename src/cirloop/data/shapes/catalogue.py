"""Texts from the drawn scenes themselves, said as the human texts are: what the best possible
foundation model would give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from cirloop.artifacts.store import fingerprint
from cirloop.data.shapes.language import phrase_changes, read, write
from cirloop.data.shapes.scene import Scene, SeededRandom, differences, results
from cirloop.data.shapes.splits import LOOSE_PERCENT, row_of, scenes_of, split_of
from cirloop.types import ImageId

VERSION = "scenes-1"


@dataclass(frozen=True)
class SceneCatalogue:
    """The scenes of `shapes` with the language of its human texts (`types.Catalogue`): every text
    is true, with names and looseness drawn by the seed."""

    max_changes: int = 3
    """Scenes that differ in more have no text."""

    @cached_property
    def fingerprint(self) -> str:
        """The digest of what decides a text, beside the images' names."""
        return fingerprint([VERSION, self.max_changes])

    def write(self, reference: ImageId, image: ImageId, seed: int) -> str | None:
        """Write a true text; None where the scenes are equal or differ in more than
        `max_changes`."""
        before = _scene(reference)
        after = _scene(image)
        rng = SeededRandom("scenes", seed, reference, image)
        changes = tuple(rng.shuffled(differences(before, after)))
        if not 1 <= len(changes) <= self.max_changes:
            return None
        loose = phrase_changes(rng, before, changes, LOOSE_PERCENT)
        is_exact = after in results(before, loose)
        phrasing = scenes_of(split_of(reference)).variant.phrasing
        return write(rng, loose if is_exact else changes, phrasing)

    def is_true(self, reference: ImageId, text: str, image: ImageId) -> bool:
        """Return whether the text turns the reference's scene into the image's."""
        return bool(self.right(reference, text, [image]))

    def right(self, reference: ImageId, text: str, images: Sequence[ImageId]) -> list[ImageId]:
        """Return those of `images` for which `is_true`."""
        changes = read(text)
        if changes is None:
            return []
        scenes = results(_scene(reference), changes)
        return [image for image in images if _scene(image) in scenes]

    def knows(self, image: ImageId) -> bool:
        """Return True: the scene of every image is known."""
        return True

    def limited(self, max_changes: int) -> SceneCatalogue:
        """Return a catalogue that writes for scenes that differ in at most `max_changes`."""
        return replace(self, max_changes=max_changes)


def _scene(image: ImageId) -> Scene:
    return scenes_of(split_of(image)).scenes[row_of(image)]
