"""The splits of `shapes`: families of related scenes, queries within them, and exactly what is
right.

A family is a root scene and three changes that do not disturb one another: its members are the root
with every subset of the three (8 scenes, any two at most three changes apart), two alternates (one
change to another value, so that an under-specified text has several right answers) and a twin (a
member's scene drawn anew). Families play the part of CIRR's image groups: what a model confuses
with the target mostly lies in its family.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import combinations

import numpy as np
import numpy.typing as npt

from cirloop.data.shapes.draw import MIDDLE, TARGET, RenderStyle, draw
from cirloop.data.shapes.language import CASUAL, TERSE, Phrasing, phrase_changes, write
from cirloop.data.shapes.scene import (
    Change,
    Scene,
    SeededRandom,
    another_value,
    apply,
    differences,
    random_change,
    random_scene,
    results,
)
from cirloop.types import ImageId

LOOSE_PERCENT = 25
FAMILY_SIZE = 11


@dataclass(frozen=True, slots=True)
class Size:
    """The numbers of families and of queries of a split."""

    families: int
    queries: int


SIZES = {"test": Size(182, 1000), "val": Size(182, 1000), "train": Size(276, 4400)}
"""In the order they are made; a split takes no scene of one made before it."""


@dataclass(frozen=True, slots=True)
class Variant:
    """How the splits of a variant look and speak."""

    style: RenderStyle
    phrasing: Phrasing


VARIANTS = {1: Variant(TARGET, CASUAL), 2: Variant(MIDDLE, TERSE)}


@dataclass(frozen=True, slots=True)
class ShapesQuery:
    """A query as gallery rows of reference and target, and the text."""

    reference: int
    target: int
    text: str


@dataclass(frozen=True, slots=True)
class Scenes:
    """One split: `scenes[i]` is gallery row i, `families[i]` its family."""

    split: str
    scenes: tuple[Scene, ...]
    families: tuple[int, ...]
    queries: tuple[ShapesQuery, ...]
    variant: Variant

    def pixels(self, row: int) -> npt.NDArray[np.uint8]:
        return draw(self.scenes[row], self.variant.style, self.split, row)


def family(rng: SeededRandom, taken: set[Scene]) -> list[Scene]:
    """Draw the scenes of one family, none of them in `taken`: roots and changes until they fit
    together."""
    while True:
        root = random_scene(rng)
        changes = [random_change(rng, root) for _ in range(3)]
        members = _all_combinations(root, changes)
        if members is None:
            continue
        for _ in range(2):
            other = another_value(rng, rng.choice(changes), root)
            scene = apply(root, other) if other else None
            if scene is not None and scene not in members:
                members.append(scene)
        if not taken.isdisjoint(members):
            continue
        while len(members) < FAMILY_SIZE:
            members.append(rng.choice(members))
        return members


def _all_combinations(root: Scene, changes: list[Change]) -> list[Scene] | None:
    """Apply every subset of the changes to the root; None where two of them touch the same
    object."""
    members = []
    for num in range(4):
        for subset in combinations(changes, num):
            scene: Scene | None = root
            for change in subset:
                scene = apply(scene, change) if scene is not None else None
            if scene is None or len(differences(root, scene)) != num:
                return None
            members.append(scene)
    return members if len(set(members)) == 8 else None


def sample_query(
    rng: SeededRandom, members: list[Scene], max_changes: int, phrasing: Phrasing
) -> tuple[int, int, str]:
    """Draw two members at most `max_changes` apart and a text that turns the first into the
    second."""
    while True:
        a = rng.below(len(members))
        b = rng.below(len(members))
        changes = differences(members[a], members[b])
        if 1 <= len(changes) <= max_changes:
            phrased = phrase_changes(rng, members[a], tuple(rng.shuffled(changes)), LOOSE_PERCENT)
            if members[b] in results(members[a], phrased):
                return a, b, write(rng, phrased, phrasing)


def split_name(part: str, variant: int) -> str:
    return part if variant == 1 else f"{part}_{variant}"


@cache
def build_splits(variant: int = 1) -> dict[str, Scenes]:
    """Build train, val and test of a variant, by name.

    Neither pre-training nor variant 2 takes a scene of variant 1.
    """
    taken = set() if variant == 1 else split_scenes()
    splits = {}
    for part, size in SIZES.items():
        rng = SeededRandom("shapes", variant, part)
        name = split_name(part, variant)
        scenes: list[Scene] = []
        families: list[list[Scene]] = []
        for _ in range(size.families):
            families.append(family(rng, taken))
            taken.update(families[-1])
            scenes.extend(families[-1])
        queries: dict[tuple[int, str], ShapesQuery] = {}
        turn = 0
        while len(queries) < size.queries:
            at = turn % size.families
            a, b, text = sample_query(rng, families[at], 2, VARIANTS[variant].phrasing)
            start = at * FAMILY_SIZE
            queries.setdefault((start + a, text), ShapesQuery(start + a, start + b, text))
            turn += 1
        splits[name] = Scenes(
            name,
            tuple(scenes),
            tuple(i // FAMILY_SIZE for i in range(len(scenes))),
            tuple(queries.values()),
            VARIANTS[variant],
        )
    return splits


def image_id(split: str, row: int) -> ImageId:
    """Return the id of the image in a row of a split's gallery."""
    return ImageId(f"shapes:{split}:{row:05d}")


def split_of(image: ImageId) -> str:
    return image.split(":")[1]


def row_of(image: ImageId) -> int:
    return int(image.rsplit(":", 1)[1])


def scenes_of(split: str) -> Scenes:
    """Return a split of any variant by its name."""
    variant = split.partition("_")[2]
    splits = build_splits(int(variant)) if variant else build_splits()
    return splits[split]


def split_scenes() -> set[Scene]:
    return {scene for split in build_splits().values() for scene in split.scenes}
