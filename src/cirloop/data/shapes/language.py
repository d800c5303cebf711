"""Modification texts for scenes: writing them, and reading them back into changes.

Three ways of speaking. `PLAIN` is what the tiny base model was pre-trained to retrieve with;
`CASUAL` is how the train, val and test splits speak: other sentences and other words for sizes and
places; `TERSE` is how those of the second variant do, in sentences that `tiny` was not pre-trained
with. `read` understands all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from cirloop.data.shapes.scene import COLORS, SHAPES, Change, Kind, Scene, SeededRandom, Selector


@dataclass(frozen=True, slots=True)
class Words:
    """Words for sizes (small, large), for the nine cells, and the preposition of place."""

    sizes: tuple[str, str]
    cells: tuple[str, ...]
    at: str


PLAIN_WORDS = Words(
    ("small", "large"),
    (
        "top left",
        "top",
        "top right",
        "left",
        "center",
        "right",
        "bottom left",
        "bottom",
        "bottom right",
    ),
    "at",
)
CASUAL_WORDS = Words(
    ("little", "big"),
    (
        *("upper left", "upper middle", "upper right", "middle left", "middle", "middle right"),
        *("lower left", "lower middle", "lower right"),
    ),
    "in",
)

Sentences = dict[str, tuple[str, ...]]
"""Per kind, `kind?` if under-specified. Slots: o object, c colour, s shape, z size, n new object, p
place."""

PLAIN_SENTENCES: Sentences = {
    "color": ("make {o} {c}", "turn {o} {c}", "change the color of {o} to {c}", "paint {o} {c}"),
    "color?": ("change the color of {o}", "give {o} another color"),
    "shape": ("make {o} a {s}", "turn {o} into a {s}", "change the shape of {o} to a {s}"),
    "shape?": ("change the shape of {o}", "give {o} another shape"),
    "size": ("make {o} {z}", "change the size of {o} to {z}", "turn {o} {z}"),
    "add": ("add {n}", "put {n}", "place {n}"),
    "remove": ("remove {o}", "take away {o}", "delete {o}"),
    "move": ("move {o} to the {p}", "put {o} to the {p}"),
    "move?": ("move {o} to another place", "move {o} somewhere else"),
    "join": (" and ",),
}
CASUAL_SENTENCES: Sentences = {
    "color": ("{o} should be {c}", "i want {o} in {c}", "{o} is now {c}", "show {o} as {c}"),
    "color?": ("{o} should have a different color", "a different color for {o}"),
    "shape": ("{o} becomes a {s}", "i want {o} as a {s}", "{o} is now a {s}"),
    "shape?": ("{o} should have a different shape", "a different shape for {o}"),
    "size": ("{o} should be {z}", "i want {o} {z}", "{o} is now {z}"),
    "add": ("there is also {n}", "include {n}", "with {n}"),
    "remove": ("without {o}", "no more {o}", "{o} is gone"),
    "move": ("{o} goes to the {p}", "shift {o} to the {p}"),
    "move?": ("{o} goes to a different place", "{o} is elsewhere"),
    "join": (", and ", ", "),
}
TERSE_SENTENCES: Sentences = {
    "color": ("recolor {o} to {c}", "{o} but {c}", "let {o} have the color {c}"),
    "color?": ("recolor {o}", "{o} but of any other color"),
    "shape": ("reshape {o} to a {s}", "{o} but as a {s}"),
    "shape?": ("reshape {o}", "{o} but of any other shape"),
    "size": ("resize {o} to {z}", "{o} but {z}"),
    "add": ("insert {n}", "{n} appears"),
    "remove": ("drop {o}", "{o} disappears"),
    "move": ("relocate {o} to the {p}", "{o} but at the {p}"),
    "move?": ("relocate {o}", "{o} but anywhere else"),
    "join": (" then ",),
}


@dataclass(frozen=True, slots=True)
class Phrasing:
    """A way of speaking: sentences and the words in them."""

    sentences: Sentences
    words: Words


PLAIN = Phrasing(PLAIN_SENTENCES, PLAIN_WORDS)
CASUAL = Phrasing(CASUAL_SENTENCES, CASUAL_WORDS)
TERSE = Phrasing(TERSE_SENTENCES, PLAIN_WORDS)

_SIZE = {
    w: size
    for words in (PLAIN_WORDS, CASUAL_WORDS)
    for w, size in zip(words.sizes, ("small", "large"), strict=True)
}
_CELL = {w: cell for words in (PLAIN_WORDS, CASUAL_WORDS) for cell, w in enumerate(words.cells)}
_CELLS = "|".join(sorted(_CELL, key=len, reverse=True))


def _noun(
    words: Words,
    color: str | None,
    shape: str | None,
    size: str | None,
    cell: int | None,
    article: str,
) -> str:
    size_word = words.sizes[("small", "large").index(size)] if size else None
    parts = [word for word in (size_word, color, shape or "object") if word]
    if article == "a" and parts[0][0] in "aeiou":
        article = "an"
    place = f" {words.at} the {words.cells[cell]}" if cell is not None else ""
    return f"{article} {' '.join(parts)}{place}"


def _selector(rng: SeededRandom, scene: Scene, full: Selector) -> Selector:
    """Choose a way of naming the object that fits it alone, mostly by colour and shape."""
    by_name = [
        replace(full, size=None, cell=None),
        replace(full, cell=None),
        replace(full, size=None),
    ]
    shorter = [Selector(shape=full.shape), Selector(color=full.color), Selector(cell=full.cell)]
    if rng.chance(30):
        by_name = [rng.choice(shorter), *by_name]
    return next(s for s in (*by_name, full) if s.cells(scene) == [full.cell])


def _underspecify(rng: SeededRandom, change: Change) -> Change:
    """Leave a value of the change unsaid, where its kind allows."""
    match change.kind:
        case "color" | "shape" | "move":
            return replace(change, color=None, shape=None, cell=None)
        case "add":
            return rng.choice(
                [
                    replace(change, cell=None),
                    replace(change, color=None),
                    replace(change, shape=None),
                    replace(change, color=None, shape=None),
                ]
            )
        case _:
            return change


def phrase_changes(
    rng: SeededRandom, scene: Scene, changes: tuple[Change, ...], loose_percent: int
) -> tuple[Change, ...]:
    """Say `changes` as a speaker would: short names for objects, at most one change left
    under-specified."""
    loose = rng.below(len(changes)) if rng.chance(loose_percent) else -1
    phrased = []
    for i, change in enumerate(changes):
        if change.selector is not None:
            change = replace(change, selector=_selector(rng, scene, change.selector))
        elif rng.chance(30):
            change = replace(change, size=None)
        phrased.append(_underspecify(rng, change) if i == loose else change)
    return tuple(phrased)


def write(rng: SeededRandom, changes: tuple[Change, ...], phrasing: Phrasing) -> str:
    """Write one text for `changes` in the phrasing's sentences and words."""
    words = phrasing.words
    parts = []
    for change in changes:
        name: str = change.kind
        if (
            name in ("color", "shape", "move")
            and (change.color, change.shape, change.cell) == (None,) * 3
        ):
            name += "?"
        slots = {
            "c": change.color,
            "s": change.shape,
            "z": words.sizes[("small", "large").index(change.size)] if change.size else None,
            "p": words.cells[change.cell] if change.cell is not None else None,
        }
        if change.selector is not None:
            s = change.selector
            slots["o"] = _noun(words, s.color, s.shape, s.size, s.cell, "the")
        else:
            slots["n"] = _noun(words, change.color, change.shape, change.size, change.cell, "a")
        parts.append(rng.choice(phrasing.sentences[name]).format(**slots))
    text = parts[0]
    for part in parts[1:]:
        text += rng.choice(phrasing.sentences["join"]) + part
    return text


def _patterns() -> list[tuple[Kind, re.Pattern[str]]]:
    size = "|".join(_SIZE)
    color = "|".join(COLORS)
    shape = "|".join(SHAPES)
    noun = rf"(?:(?P<{{k}}z>{size}) )?(?:(?P<{{k}}c>{color}) )?(?P<{{k}}s>{shape}|object)"
    noun += rf"(?: (?:at|in) the (?P<{{k}}p>{_CELLS}))?"
    slots = {
        "o": "the " + noun.format(k="o"),
        "n": "an? " + noun.format(k="n"),
        "c": f"(?P<c>{color})",
        "s": f"(?P<s>{shape})",
        "z": f"(?P<z>{size})",
        "p": f"(?P<p>{_CELLS})",
    }
    return [
        (kind.rstrip("?"), re.compile(sentence.format(**slots)))  # type: ignore[misc]
        for sentences in (PLAIN_SENTENCES, CASUAL_SENTENCES, TERSE_SENTENCES)
        for kind, forms in sentences.items()
        if kind != "join"
        for sentence in forms
    ]


_PATTERNS = _patterns()
_JOIN = re.compile(r", and |, | and | then ")


def _value(groups: dict[str, str | None], key: str) -> str | None:
    word = groups.get(key)
    return None if word in (None, "object") else word


def _read_one(part: str) -> Change | None:
    for kind, pattern in _PATTERNS:
        match = pattern.fullmatch(part)
        if match is None:
            continue
        groups = match.groupdict()
        prefix = "n" if kind == "add" else ""
        size = groups.get(f"{prefix}z")
        cell = groups.get(f"{prefix}p")
        selector = None
        if kind != "add":
            object_size = groups.get("oz")
            object_cell = groups.get("op")
            selector = Selector(
                _value(groups, "oc"),
                _value(groups, "os"),
                _SIZE[object_size] if object_size else None,
                _CELL[object_cell] if object_cell else None,
            )
        return Change(
            kind,
            selector,
            _value(groups, f"{prefix}c"),
            _value(groups, f"{prefix}s"),
            _SIZE[size] if size else None,
            _CELL[cell] if cell else None,
        )
    return None


def read(text: str) -> tuple[Change, ...] | None:
    """Parse the changes that a text asks for; None where any part of it is not of the language."""
    changes = [_read_one(part) for part in _JOIN.split(text.strip().lower().rstrip("."))]
    return None if any(change is None for change in changes) else tuple(c for c in changes if c)
