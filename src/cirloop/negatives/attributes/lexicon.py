"""A domain's attributes and the words for their values; matching them in a text.

A lexicon is a YAML file beside this one. Words are compared without case, accents and plural
endings; hyphens and apostrophes part words. The longest phrase that starts at a word is taken, and
the next begins after it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from typing import Literal

import yaml
from pydantic import Field

from cirloop.config.base import Settings
from cirloop.negatives.attributes.values import ANY
from cirloop.types import UserError

_TOKEN = re.compile(r"[^\W_]+(?:['’](?:s|t|re|ve|ll|d|m)\b)?|[,;.:!?\n()]")
_SINGULARS = (
    "men:man women:woman children:child people:person mice:mouse geese:goose feet:foot "
    "teeth:tooth knives:knife leaves:leaf shelves:shelf scarves:scarf loaves:loaf wolves:wolf "
    "calves:calf buses:bus tomatoes:tomato potatoes:potato heroes:hero lenses:lens oxen:ox "
    "axes:axe "
)
_UNINFLECTED = "gas lens canvas christmas shorts this his has was as "
_IRREGULAR = dict(pair.split(":") for pair in _SINGULARS.split())
_IRREGULAR |= {word: word for word in _UNINFLECTED.split()}


@cache
def stem(word: str) -> str:
    """Strip the plural ending from a word: dresses -> dress, sleeves -> sleeve, and hoodie as
    hoodies -> hoody."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) > 4 and word.endswith(("ies", "ie")):
        return word.removesuffix("s").removesuffix("ie") + "y"
    if len(word) > 4 and word.endswith(("sses", "shes", "ches", "xes", "zzes")):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and word[-2] not in "sui" else word


def tokens(text: str) -> list[str]:
    """Split a text into plain words and punctuation: `Doesn't` is `not`, `dress's` is `dress`."""
    marked = unicodedata.normalize("NFKD", text.casefold())
    plain = "".join(c for c in marked if not unicodedata.combining(c)).replace("’", "'")
    out = []
    for token in _TOKEN.findall(plain):
        word, _, tail = token.partition("'")
        out.append("not" if tail == "t" else word)
    return out


def words(text: str) -> list[str]:
    """Return the tokens of a text without its punctuation."""
    return [token for token in tokens(text) if token.isalnum()]


@dataclass(frozen=True, slots=True)
class Match:
    """Words [start, end) of a text that mean `value` of `attribute`; `*`: the attribute alone."""

    start: int
    end: int
    attribute: str
    value: str


class Attribute(Settings):
    """The values of one attribute."""

    values: dict[str, list[str]]
    """Value -> other words for it."""
    asks: tuple[str, ...] = ()
    """Words that speak of the attribute without saying a value: its name, and comparatives."""
    absent: str = "none"
    """The value of not having it: `sleeveless` of no sleeves."""
    head: bool = False
    """Its values are nouns, which end a noun phrase."""


class Lexicon(Settings):
    """The attributes of a domain."""

    category: str
    """The attribute that is an image's category."""
    definite: Literal["ignored", "weak"]
    """What a value in a phrase with `the` is worth in a modification text. `ignored`: it only says
    which thing is meant ("the red circle"). `weak`: it counts where no other value of the attribute
    is asked for, if it is no noun."""
    heads: tuple[str, ...] = ()
    """Other nouns that end a noun phrase."""
    attributes: dict[str, Attribute] = Field(min_length=1)

    @cached_property
    def phrases(self) -> dict[tuple[str, ...], tuple[str, str]]:
        """Stemmed words -> attribute and value. Raises UserError for words that mean two things."""
        out: dict[tuple[str, ...], tuple[str, str]] = {}
        for name, attribute in self.attributes.items():
            forms = [
                (value, word)
                for value, synonyms in attribute.values.items()
                for word in (value, *synonyms)
            ]
            for value, word in [*forms, *((ANY, word) for word in attribute.asks)]:
                key = tuple(map(stem, words(word)))
                if not key or out.setdefault(key, (name, value)) != (name, value):
                    raise UserError(
                        f"the lexicon's {word!r} of {name} {value!r} is empty or means"
                        f" {out.get(key)} too."
                    )
        return out

    @cached_property
    def _longest(self) -> dict[str, int]:
        longest: dict[str, int] = {}
        for key in self.phrases:
            longest[key[0]] = max(longest.get(key[0], 0), len(key))
        return longest

    @cached_property
    def nouns(self) -> frozenset[str]:
        return frozenset(map(stem, self.heads))

    def matches(self, text: Sequence[str]) -> list[Match]:
        """Match phrases in the tokens of a text, left to right and without overlap, longest phrase
        first."""
        stems = [stem(token) for token in text]
        out = []
        at = 0
        while at < len(stems):
            for end in range(min(len(stems), at + self._longest.get(stems[at], 0)), at, -1):
                meaning = self.phrases.get(tuple(stems[at:end]))
                if meaning is not None:
                    out.append(Match(at, end, *meaning))
                    at = end - 1
                    break
            at += 1
        return out

    def attribute(self, name: str) -> str:
        """Return the attribute that a file or model calls `name`: `colour`, `COLOR` -> `color`;
        plain words if it is new."""
        plain = words(name.replace("_", " "))
        for known in self.attributes:
            if list(map(stem, plain)) == list(map(stem, words(known.replace("_", " ")))):
                return known
        meaning = self.phrases.get(tuple(map(stem, plain)))
        return meaning[0] if meaning is not None and meaning[1] == ANY else " ".join(plain)

    def value(self, attribute: str, text: str) -> str:
        """Return the value that a file or a model writes as `text`: `Crimson` -> `red`; its plain
        words if it is new."""
        plain = words(text)
        name, known_value = self.phrases.get(tuple(map(stem, plain)), ("", ANY))
        if name == attribute and known_value != ANY:
            return known_value
        return " ".join(plain)


@cache
def load(domain: str) -> Lexicon:
    """Load the lexicon of `fashion`, `everyday` or `shapes`."""
    text = (files("cirloop.negatives.attributes") / f"{domain}.yaml").read_text("utf-8")
    return Lexicon.model_validate(yaml.safe_load(text))
