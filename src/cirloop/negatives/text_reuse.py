"""Which texts may stand as a negative, and how often."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from cirloop.retrieval.arrays import Mask, Rows

_WORDS = """
    a an the this that these those it its he she they there here what which who
    is are was were be been being am do does did has have had can could will would may might must
    shall should
    i you we me my your our his her their him them us
    and or but nor not no yes if then than as so too also very just only of in on at by to
    from for with
    without into
    over under about up down out off near some any all both each other another same such more
    most many much
    image images photo photos photograph picture pictures pic photography scene view shot
    thing things something anything object objects item items stuff one ones someone
    none null nan unknown untitled n na
"""
GENERIC = frozenset(_WORDS.split())
"""Stop words and words for "a picture of something". A text is generic if it has no other word."""


def normal(text: str) -> str:
    """Texts that differ in case or spacing only are the same phrase."""
    return " ".join(text.split()).casefold()


def is_generic(text: str) -> bool:
    """No word at all, or none beside those of `GENERIC`: "a photo", "picture of something"."""
    return all(word in GENERIC for word in re.findall(r"[^\W_]+", text.casefold()))


def max_uses(texts: Sequence[str], min_length: int, limit: int) -> tuple[Rows, Mask]:
    """How often each text (T) may be a negative, and which are short.

    Generic: never. At least `min_length` characters: `limit` times. Shorter: where there is no
    longer one, and at most `limit` x length / `min_length` times, rounded down, but once at least.
    """
    lengths_T = np.array([len(text) for text in texts], np.int64)
    short_T = lengths_T < min_length
    uses_T = np.where(short_T, np.maximum(1, limit * lengths_T // max(1, min_length)), limit)
    uses_T[np.array([is_generic(text) for text in texts], bool)] = 0
    return uses_T, short_T
