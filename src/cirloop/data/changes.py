"""Attributes of what an image shows, and their changes from one image to another.

Case and spaces of values never count.
"""

from __future__ import annotations

from collections.abc import Mapping

Attributes = Mapping[str, str]
"""Attribute -> value, such as {"product": "juice", "brand": "Bravo"}."""
Changes = Mapping[str, str | None]
"""Attribute -> new value; None: the attribute is gone, `*`: it has another value, whichever."""
ANOTHER = "*"


def tidy(text: str) -> str:
    """Return the text with single spaces, none of them at its ends."""
    return " ".join(text.split())


def fold(text: str) -> str:
    """Return the text in small letters, with as many characters as it had."""
    small = text.replace("Σ", "σ").lower()  # at the end of a word it would become another letter
    if len(small) == len(text):
        return small
    return "".join(low if len(low := sign.lower()) == 1 else sign for sign in text)


def same(first: str | None, second: str | None) -> bool:
    """Return whether two values are one, whatever their case and spaces; None equals None only."""
    if first is None or second is None:
        return first is second
    return first == second or fold(tidy(first)) == fold(tidy(second))


def changes(reference: Attributes, target: Attributes) -> dict[str, str | None]:
    """Return the attributes in which the target differs from the reference, with its values, by
    name."""
    names = sorted({*reference, *target})
    return {
        name: target.get(name) for name in names if not same(reference.get(name), target.get(name))
    }


def changed(reference: Attributes, changes: Changes) -> dict[str, str]:
    """Return the reference's attributes with the changes applied."""
    merged = {**reference, **changes}
    return {name: value for name, value in merged.items() if value is not None}


def leads(reference: Attributes, changes_said: Changes, target: Attributes) -> bool:
    """Return whether the changes turn the reference's attributes into exactly the target's."""
    new_values = dict(changes_said)
    for name, value in changes_said.items():
        if value != ANOTHER:
            continue
        new = target.get(name)
        if new is None or name not in reference or same(new, reference[name]):
            return False
        new_values[name] = new
    return not changes(changed(reference, new_values), target)
