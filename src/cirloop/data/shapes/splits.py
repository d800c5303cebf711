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

from cirloop.data.shapes.draw import TARGET, Look, draw
from cirloop.data.shapes.language import CASUAL, Phrasing, spoken, write
from cirloop.data.shapes.scene import (
    Change,
    Draws,
    Scene,
    another_value,
    apply,
    differences,
    random_change,
    random_scene,
    results,
)

LOOSE_PERCENT = 25
FAMILY_SIZE = 11


@dataclass(frozen=True, slots=True)
class Size:
    families: int
    queries: int


SIZES = {"test": Size(182, 1000), "val": Size(182, 1000), "train": Size(276, 4400)}
"""In the order they are made; a split takes no scene of one made before it."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A query as data: gallery rows of reference and target, and the text."""

    reference: int
    target: int
    text: str


@dataclass(frozen=True, slots=True)
class Scenes:
    """One split: `scenes[i]` is gallery row i, `families[i]` its family."""

    split: str
    scenes: tuple[Scene, ...]
    families: tuple[int, ...]
    asks: tuple[Ask, ...]

    def pixels(self, row: int, look: Look = TARGET) -> npt.NDArray[np.uint8]:
        return draw(self.scenes[row], look, self.split, row)


def family(draws: Draws, taken: set[Scene]) -> list[Scene]:
    """The scenes of one family, none of them in `taken`; tries roots and changes until they fit
    together."""
    while True:
        root = random_scene(draws)
        changes = [random_change(draws, root) for _ in range(3)]
        members = _cube(root, changes)
        if members is None:
            continue
        for _ in range(2):
            other = another_value(draws, draws.choice(changes), root)
            scene = apply(root, other) if other else None
            if scene is not None and scene not in members:
                members.append(scene)
        if not taken.isdisjoint(members):
            continue
        while len(members) < FAMILY_SIZE:
            members.append(draws.choice(members))
        return members


def _cube(root: Scene, changes: list[Change]) -> list[Scene] | None:
    """The root after every subset of the changes, or None where two of them touch the same
    thing."""
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


def ask(
    draws: Draws, members: list[Scene], max_changes: int, phrasing: Phrasing
) -> tuple[int, int, str]:
    """Two members at most `max_changes` apart and a text that turns the first into the second."""
    while True:
        a = draws.below(len(members))
        b = draws.below(len(members))
        changes = differences(members[a], members[b])
        if 1 <= len(changes) <= max_changes:
            said = spoken(draws, members[a], tuple(draws.shuffled(changes)), LOOSE_PERCENT)
            if members[b] in results(members[a], said):
                return a, b, write(draws, said, phrasing)


@cache
def held_out() -> dict[str, Scenes]:
    """Train, val and test, by name. Pre-training takes none of their scenes."""
    taken: set[Scene] = set()
    splits = {}
    for name, size in SIZES.items():
        draws = Draws("shapes", 1, name)
        scenes: list[Scene] = []
        families: list[list[Scene]] = []
        for _ in range(size.families):
            families.append(family(draws, taken))
            taken.update(families[-1])
            scenes.extend(families[-1])
        asks: dict[tuple[int, str], Ask] = {}
        turn = 0
        while len(asks) < size.queries:
            at = turn % size.families
            a, b, text = ask(draws, families[at], 2, CASUAL)
            start = at * FAMILY_SIZE
            asks.setdefault((start + a, text), Ask(start + a, start + b, text))
            turn += 1
        splits[name] = Scenes(
            name,
            tuple(scenes),
            tuple(i // FAMILY_SIZE for i in range(len(scenes))),
            tuple(asks.values()),
        )
    return splits


def held_out_scenes() -> set[Scene]:
    return {scene for split in held_out().values() for scene in split.scenes}
