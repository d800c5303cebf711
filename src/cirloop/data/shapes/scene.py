"""Scenes of coloured shapes on a 3x3 grid, and what a modification does to one.

In the spirit of the CSS set of TIRG (Vo et al., CVPR 2019, arXiv 1812.07119). A scene is what a
text can mention: nine cells, each empty or holding one object. What no text mentions (jitter,
shades, outline) belongs to `draw`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from random import Random
from typing import Literal, NamedTuple, TypeVar

T = TypeVar("T")

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "teal")
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
SIZES = ("small", "large")
NUM_CELLS = 9


class Object(NamedTuple):
    color: str
    shape: str
    size: str


Scene = tuple[Object | None, ...]
"""Nine cells, row by row from the top left."""

Kind = Literal["color", "shape", "size", "add", "remove", "move"]
KINDS: tuple[Kind, ...] = ("color", "shape", "size", "add", "remove", "move")


@dataclass(frozen=True, slots=True)
class Selector:
    """Which objects of the reference a text means; None = not said, so any."""

    color: str | None = None
    shape: str | None = None
    size: str | None = None
    cell: int | None = None

    def cells(self, scene: Scene) -> list[int]:
        return [
            cell
            for cell, thing in enumerate(scene)
            if thing is not None
            and self.color in (None, thing.color)
            and self.shape in (None, thing.shape)
            and self.size in (None, thing.size)
            and self.cell in (None, cell)
        ]


@dataclass(frozen=True, slots=True)
class Change:
    """One atomic modification. `selector` is None for `add`; a new value of None means any other
    value."""

    kind: Kind
    selector: Selector | None = None
    color: str | None = None
    shape: str | None = None
    size: str | None = None
    cell: int | None = None


class SeededRandom:
    """Random choices by a seed, from `random.random()` alone: the one stream that Python promises
    to keep across versions."""

    def __init__(self, *key: object) -> None:
        self._random = Random("/".join(map(str, key))).random  # a str seed is hashed with SHA-512

    def below(self, n: int) -> int:
        return int(self._random() * n)

    def between(self, low: int, high: int) -> int:
        """Draw an integer of [low, high]."""
        return low + self.below(high - low + 1)

    def chance(self, percent: int) -> bool:
        return self.below(100) < percent

    def choice(self, options: list[T] | tuple[T, ...]) -> T:
        return options[self.below(len(options))]

    def shuffled(self, items: list[T] | tuple[T, ...]) -> list[T]:
        remaining = list(items)
        out = []
        while remaining:
            out.append(remaining.pop(self.below(len(remaining))))
        return out


def put(scene: Scene, cell: int, thing: Object | None) -> Scene:
    return (*scene[:cell], thing, *scene[cell + 1 :])


def _outcomes(scene: Scene, change: Change, cell: int | None) -> set[Scene]:
    """Return the scenes after `change` to the object at `cell` (None for `add`); empty where it
    cannot be done."""
    empty = [c for c, thing in enumerate(scene) if thing is None]
    if change.kind == "add":
        options = product(
            [change.color] if change.color else COLORS,
            [change.shape] if change.shape else SHAPES,
            [change.size] if change.size else SIZES,
            [change.cell] if change.cell is not None else empty,
        )
        return {put(scene, at, Object(c, s, z)) for c, s, z, at in options if at in empty}
    assert cell is not None
    thing = scene[cell]
    if thing is None:
        return set()
    if change.kind == "remove":
        return {put(scene, cell, None)}
    if change.kind == "move":
        goals = [change.cell] if change.cell is not None else empty
        return {put(put(scene, cell, None), goal, thing) for goal in goals if goal in empty}
    values: tuple[str, ...] = {"color": COLORS, "shape": SHAPES, "size": SIZES}[change.kind]
    new = getattr(change, change.kind)
    old = getattr(thing, change.kind)
    return {
        put(scene, cell, thing._replace(**{change.kind: value}))
        for value in ([new] if new else values)
        if value != old
    }


def results(reference: Scene, changes: tuple[Change, ...]) -> set[Scene]:
    """Return every scene that `changes` together may ask for. Selectors speak of the reference.

    A selector that fits several objects may mean any of them; changes that cannot be done give the
    empty set.
    """
    states: set[Scene] = {reference}
    for change in changes:
        cells: list[int | None] = (
            [None] if change.selector is None else [*change.selector.cells(reference)]
        )
        states = {
            after for state in states for cell in cells for after in _outcomes(state, change, cell)
        }
    return states - {reference}


def _value_changes(where: Selector, old: Object, new: Object) -> list[Change]:
    changes = []
    if old.color != new.color:
        changes.append(Change("color", where, color=new.color))
    if old.shape != new.shape:
        changes.append(Change("shape", where, shape=new.shape))
    if old.size != new.size:
        changes.append(Change("size", where, size=new.size))
    return changes


def differences(before: Scene, after: Scene) -> tuple[Change, ...]:
    """List the atomic changes, fully specified, from one scene to the other (an equal object
    elsewhere moved)."""
    changes: list[Change] = []
    emptied = []
    filled = []
    for cell, (old, new) in enumerate(zip(before, after, strict=True)):
        if old is None and new is not None:
            filled.append(cell)
        elif old is not None and new is None:
            emptied.append(cell)
        elif old is not None and new is not None:
            where = Selector(*old, cell)
            changes += _value_changes(where, old, new)
    for cell in emptied:
        thing = before[cell]
        assert thing is not None
        goal = next((c for c in filled if after[c] == thing), None)
        if goal is None:
            changes.append(Change("remove", Selector(*thing, cell)))
        else:
            filled.remove(goal)
            changes.append(Change("move", Selector(*thing, cell), cell=goal))
    for cell in filled:
        thing = after[cell]
        assert thing is not None
        changes.append(Change("add", None, *thing, cell))
    return tuple(changes)


def random_object(rng: SeededRandom) -> Object:
    return Object(rng.choice(COLORS), rng.choice(SHAPES), rng.choice(SIZES))


def random_scene(rng: SeededRandom) -> Scene:
    """Draw a scene of two to four objects in random cells."""
    scene: Scene = (None,) * NUM_CELLS
    for cell in rng.shuffled(tuple(range(NUM_CELLS)))[: rng.between(2, 4)]:
        scene = put(scene, cell, random_object(rng))
    return scene


def random_change(rng: SeededRandom, scene: Scene) -> Change:
    """Draw a fully specified change that can be done to `scene`, of a kind drawn evenly."""
    full = [cell for cell, thing in enumerate(scene) if thing is not None]
    empty = [cell for cell, thing in enumerate(scene) if thing is None]
    kind = rng.choice(KINDS)
    if kind == "add" or len(full) < 2:
        return Change("add", None, *random_object(rng), rng.choice(empty))
    cell = rng.choice(full)
    thing = scene[cell]
    assert thing is not None
    where = Selector(*thing, cell)
    match kind:
        case "remove":
            return Change("remove", where)
        case "move":
            return Change("move", where, cell=rng.choice(empty))
        case "color":
            return Change("color", where, color=rng.choice([c for c in COLORS if c != thing.color]))
        case "shape":
            return Change("shape", where, shape=rng.choice([s for s in SHAPES if s != thing.shape]))
        case _:
            return Change("size", where, size=rng.choice([z for z in SIZES if z != thing.size]))


def apply(scene: Scene, change: Change) -> Scene | None:
    """Return the one scene that a fully specified change gives; None where it cannot be done."""
    after = results(scene, (change,))
    return next(iter(after)) if len(after) == 1 else None


def another_value(rng: SeededRandom, change: Change, scene: Scene) -> Change | None:
    """Draw another value (colour, shape, cell or new object) for the change; None where there is
    none."""
    if change.kind in ("remove", "size"):
        return None
    if change.kind == "move":
        cells = [c for c in range(NUM_CELLS) if scene[c] is None and c != change.cell]
        return replace(change, cell=rng.choice(cells))
    if change.kind == "add":
        return replace(change, color=rng.choice([c for c in COLORS if c != change.color]))
    assert change.selector is not None
    if change.kind == "color":
        colors = [c for c in COLORS if c not in (change.color, change.selector.color)]
        return replace(change, color=rng.choice(colors))
    shapes = [s for s in SHAPES if s not in (change.shape, change.selector.shape)]
    return replace(change, shape=rng.choice(shapes))
