"""Words for changes of attributes: phrases with slots, written for two images and read back.

A phrase such as "the same {product} by {brand}" says that the brand is another one.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeVar

from cirloop.data.changes import ANOTHER, Attributes, changes, fold, same, tidy
from cirloop.types import UserError

GONE = ""
"""The value by which a phrase says that an attribute is gone."""
JOIN = " and "
MAX_JOINED = 4
"""Phrases of one attribute that are joined to a text."""
_SLOT = re.compile(r"\{(old )?([^{}]+)\}")
_CUT = re.compile(f"(?={JOIN})")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Phrase:
    """Words for a change: a text with slots. `{brand}` is the new (or kept) value, `{old brand}`
    the reference's.

    `changes` are the changed attributes. With None the text has the new value as a slot; with a
    value, the phrase says this one value without a slot ("the organic one": organic=yes); with ""
    it says that the attribute is gone, with `*` that it is another one ("in another colour").
    """

    text: str
    changes: tuple[tuple[str, str | None], ...]

    def __post_init__(self) -> None:
        """Raise UserError where text and changes do not go together."""
        slots = {name for old, name in _SLOT.findall(self.text) if not old}
        names = [name for name, _ in self.changes]
        problem = ""
        if not names or len({*names}) < len(names):
            problem = "must change attributes, each of them once"
        elif set("{}") & set(_SLOT.sub("", self.text)):
            problem = "has a brace that is no slot's: a slot is {attribute} or {old attribute}"
        elif not _without_stop(self.text):
            problem = "is empty"
        for name, value in self.changes:
            if value is None and name not in slots:
                problem = problem or (
                    f"must have the slot {{{name}}}, or a key with the value that it says:"
                    f" {name}=VALUE"
                )
            if value in (GONE, ANOTHER) and name in slots:
                problem = problem or f"has the slot {{{name}}}, but {name}={value} names no value"
        if problem:
            raise UserError(f"the phrase {self.text!r} {problem}")

    @property
    def names(self) -> frozenset[str]:
        """The attributes that it changes or has slots of."""
        return frozenset([*dict(self.changes), *(name for _, name in _SLOT.findall(self.text))])


def _without_stop(text: str) -> str:
    return tidy(tidy(text).removesuffix("."))


class _Slot(NamedTuple):
    name: str
    is_old: bool


class _Reading(NamedTuple):
    """What a text says: changes, and attributes that it says are kept."""

    changes: dict[str, str | None]
    kept: frozenset[str]


class _Form:
    """A phrase taken apart: its slots, and the literal texts around them, one more than slots."""

    def __init__(self, phrase: Phrase) -> None:
        text = _without_stop(phrase.text)
        self.slots = [_Slot(name, bool(old)) for old, name in _SLOT.findall(text)]
        self.literals = _SLOT.split(text)[:: 1 + _SLOT.groups]
        self.folded = [fold(literal) for literal in self.literals]
        self.longest = max(self.folded, key=len).strip()
        self.changes = dict(phrase.changes)
        self.kept = frozenset(
            slot.name for slot in self.slots if not slot.is_old and slot.name not in self.changes
        )

    def fill(self, reference: Attributes, target: Attributes) -> str | None:
        """Return the text for two images; None where the phrase is not for them."""
        for name, value in self.changes.items():
            new = target.get(name)
            if value == ANOTHER:
                if new is None or name not in reference:
                    return None
            elif value is not None and not same(new, value or None):
                return None
        text = self.literals[0]
        for slot, literal in zip(self.slots, self.literals[1:], strict=True):
            filling = (reference if slot.is_old else target).get(slot.name)
            if filling is None:
                return None
            text += filling + literal
        return tidy(text)

    def read(self, text: str, reference: Attributes) -> Iterator[_Reading]:
        """Yield the readings of a tidy text."""
        literals = [self.folded[0]]
        names = []
        for slot, literal in zip(self.slots, self.folded[1:], strict=True):
            is_there = slot.is_old or slot.name not in self.changes
            value = reference.get(slot.name) if is_there else self.changes[slot.name]
            if value is not None:
                literals[-1] += fold(tidy(value)) + literal
            elif is_there:
                return
            else:
                names.append(slot.name)
                literals.append(literal)
        for values in _fillings(text, fold(text), literals, names):
            yield _Reading(
                {name: values.get(name, value) or None for name, value in self.changes.items()},
                self.kept,
            )


def _fillings(
    text: str, folded: str, literals: Sequence[str], names: Sequence[str]
) -> Iterator[dict[str, str]]:
    """Yield every way to fill the slots `names` between the literals so that the text results."""
    if not names:
        if folded == literals[0]:
            yield {}
        return
    begin = len(literals[0])
    end = begin if folded.startswith(literals[0]) else len(folded)
    while (end := folded.find(literals[1], end + 1)) > begin:
        value = text[begin:end]
        if value != value.strip():
            continue
        for others in _fillings(text[end:], folded[end:], literals[1:], names[1:]):
            if same(others.get(names[0], value), value):
                yield {**others, names[0]: value}


def _joinings(
    readings: Mapping[tuple[int, int], Sequence[_Reading]],
    first: int,
    num: int,
    names: frozenset[str],
) -> Iterator[list[_Reading]]:
    """Yield every way to read parts `first` to `num` as phrases that change other attributes than
    `names`; `readings` are those of the parts from one to another."""
    if first == num:
        yield []
    for last in range(first, num) if len(names) < MAX_JOINED else ():
        for reading in readings[first, last]:
            if names.isdisjoint(reading.changes):
                now = names.union(reading.changes)
                for others in _joinings(readings, last + 1, num, now):
                    yield [reading, *others]


@dataclass(frozen=True)
class Phrasebook:
    """Phrases for changes; one that is there several times is written more often."""

    phrases: tuple[Phrase, ...]

    @cached_property
    def _forms(self) -> dict[Phrase, _Form]:
        return {phrase: _Form(phrase) for phrase in dict.fromkeys(self.phrases)}

    @cached_property
    def _by_names(self) -> Mapping[frozenset[str], list[_Form]]:
        by_names: dict[frozenset[str], list[_Form]] = defaultdict(list)
        for phrase in self.phrases:
            by_names[frozenset(dict(phrase.changes))].append(self._forms[phrase])
        return by_names

    def write(self, reference: Attributes, target: Attributes, rng: random.Random) -> str | None:
        """Write a text that leads from the reference to the target; None where they are equal or no
        words are known.

        It is a phrase for exactly these changes, or else one phrase per changed attribute, joined
        by "and" in any order.
        """
        names = [*changes(reference, target)]
        text = self._text(names, names, reference, target, rng)
        if text is not None or not 2 <= len(names) <= MAX_JOINED:
            return text
        texts = []
        left = list(names)
        while left:
            name = left.pop(int(rng.random() * len(left)))
            texts.append(self._text([name], names, reference, target, rng))
        said = [text for text in texts if text is not None]
        return JOIN.join(said) if len(said) == len(names) else None

    def _text(
        self,
        names: Sequence[str],
        all_names: Sequence[str],
        reference: Attributes,
        target: Attributes,
        rng: random.Random,
    ) -> str | None:
        """Write a phrase that changes `names`, of `all_names` that change, and says of none of
        these that it is kept."""
        forms = self._by_names.get(frozenset(names), ())

        def fill(form: _Form) -> str | None:
            is_right = form.kept.isdisjoint(all_names)
            return form.fill(reference, target) if is_right else None

        text = fill(_choice(rng, forms)) if forms else None
        if text is None:  # the drawn phrase is not for these values
            texts = [text for form in forms if (text := fill(form)) is not None]
            text = _choice(rng, texts) if texts else None
        return text

    def read(self, text: str, reference: Attributes) -> list[dict[str, str | None]]:
        """Return every reading of the text as changes of the reference: the inverse of `write`.

        Case, spaces and a final full stop are ignored. What a text says is kept must agree with the
        reference.
        """
        readings: dict[tuple[tuple[str, str | None], ...], dict[str, str | None]] = {}
        whole = tidy(text)
        for said in dict.fromkeys((whole, _without_stop(whole))):
            for reading in (*self._read_one(said, reference), *self._read_joined(said, reference)):
                if any(same(new, reference.get(name)) for name, new in reading.items()):
                    continue
                ordered = sorted(reading.items())
                key = tuple((name, new and fold(new)) for name, new in ordered)
                readings.setdefault(key, dict(ordered))
        return [*readings.values()]

    def _read_one(self, text: str, reference: Attributes) -> Iterator[dict[str, str | None]]:
        for reading in _readings([*self._forms.values()], text, reference):
            yield reading.changes

    def _read_joined(self, text: str, reference: Attributes) -> Iterator[dict[str, str | None]]:
        """Yield the readings of a text of phrases of one attribute each, joined by "and"; a value
        may hold "and" too."""
        cuts = [match.start() for match in _CUT.finditer(fold(text))]
        if not cuts:
            return
        forms = [form for form in self._forms.values() if len(form.changes) == 1]
        starts = [0, *(cut + len(JOIN) for cut in cuts)]
        ends = [*cuts, len(text)]
        readings = {
            (first, last): _readings(forms, text[starts[first] : ends[last]], reference)
            for first in range(len(starts))
            for last in range(first, len(ends))
        }
        for joined in _joinings(readings, 0, len(ends), frozenset()):
            merged = {name: new for reading in joined for name, new in reading.changes.items()}
            kept = {name for reading in joined for name in reading.kept}
            if kept.isdisjoint(merged):
                yield merged


def _readings(forms: Iterable[_Form], text: str, reference: Attributes) -> list[_Reading]:
    folded = fold(text)
    likely = (form for form in forms if form.longest in folded)
    return [reading for form in likely for reading in form.read(text, reference)]


def _choice(rng: random.Random, options: Sequence[T]) -> T:
    """Draw an option by `random()` alone, the one stream that Python promises to keep."""
    return options[int(rng.random() * len(options))]
