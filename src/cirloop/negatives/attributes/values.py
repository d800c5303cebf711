"""Values of attributes: how one is written, and when two agree.

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
    """Join several values to one string, in sorted order."""
    return OR.join(sorted(set(values)))


@lru_cache(1 << 16)
def parts(value: str) -> tuple[frozenset[str], frozenset[str]]:
    """Split a value into those present and those known to be absent; both are empty for `*` and the
    empty string."""
    words = {word for word in value.split(OR) if word not in ("", ANY)}
    absent = frozenset(word.removeprefix(NOT) for word in words if word.startswith(NOT))
    return frozenset(word for word in words if not word.startswith(NOT)), absent


def agrees(wanted: str | None, value: str | None) -> bool | None:
    """Return whether an image's value is what is `wanted`; None where that is not known.

    True: all that is wanted is present and nothing unwanted is. False: none of what is wanted is
    present, or something wanted is known to be absent, or something unwanted is present. None: one
    of the two is unknown, or only a part of what is wanted is present.
    """
    wanted_present, wanted_absent = parts(wanted or "")
    present, absent = parts(value or "")
    if wanted_absent & present or wanted_present & absent:
        return False
    if wanted_present and present and not wanted_present & present:
        return False
    if wanted_present:
        return True if wanted_present <= present else None
    return True if wanted_absent and (present or wanted_absent <= absent) else None


def compare_values(requested: str | None, target: str | None, value: str | None) -> int:
    """Return 1 where a value agrees with the requested or the target's one, -1 where it differs, 0
    where that is not known.

    The requested value counts unless the target's own contradicts it: then, as for `*`, the
    target's counts alone.
    """
    if agrees(requested, target) is False:
        requested = None
    verdicts = (agrees(requested, value), agrees(target, value))
    if True in verdicts:
        return 1
    return -1 if False in verdicts else 0
