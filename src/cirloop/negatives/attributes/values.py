"""How an attribute's value is written, and when two values agree.

A value is one string: `red`; `red|white` where several hold at once; `!red` where red is known to
be absent; `*` where a text asks for the attribute without saying what it should be ("a different
color"). An attribute that is not there is unknown. Values are compared as sets, and what is unknown
is never counted as a mismatch.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

ANY = "*"
NOT = "!"
OR = "|"


def join_values(values: Iterable[str]) -> str:
    """One string for several values, in one order whatever order they came in."""
    return OR.join(sorted(set(values)))


@lru_cache(1 << 16)
def parts(value: str) -> tuple[frozenset[str], frozenset[str]]:
    """The values that are there, and those known to be absent; both empty for `*` and the empty
    string."""
    words = {word for word in value.split(OR) if word not in ("", ANY)}
    absent = frozenset(word.removeprefix(NOT) for word in words if word.startswith(NOT))
    return frozenset(word for word in words if not word.startswith(NOT)), absent


def agrees(wanted: str | None, found: str | None) -> bool | None:
    """Whether `found` is what is `wanted`; None where that is not known.

    True: all that is wanted is there and nothing unwanted is. False: none of what is wanted is
    there, or something wanted is known to be absent, or something unwanted is there. None: one of
    the two is unknown, or only a part of what is wanted is there.
    """
    there, absent = parts(wanted or "")
    seen, unseen = parts(found or "")
    if absent & seen or there & unseen or (there and seen and not there & seen):
        return False
    if there:
        return True if there <= seen else None
    return True if absent and (seen or absent <= unseen) else None


def compare_values(asked: str | None, target: str | None, found: str | None) -> int:
    """1 where `found` agrees with what is asked or what the target has, -1 where it differs, 0
    where not known.

    A text's value is believed unless the target's own contradicts it: then, as for `*`, the
    target's counts alone.
    """
    if agrees(asked, target) is False:
        asked = None
    said = (agrees(asked, found), agrees(target, found))
    return 1 if True in said else -1 if False in said else 0
