"""What a text asks for, by rules: which of the values it names are wanted, removed or only mentioned.

Words such as `without` or `instead of` change what the values after them mean, to the end of the clause or to a word
such as `is` or `with` that follows a value; `is gone` speaks of the values before it. The value wanted is the one asked
for ("red instead of blue" -> red); one that is only removed is an absence ("not red" -> `!red`, "no sleeves" ->
sleeveless). A phrase with `the` names a thing that is in the reference already, and is no wish. Not understood: lists
after a negation ("no dots, stripes"), and words that the lexicon lacks, which stay unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from typing import Protocol

from cirloop.negatives.attributes.lexicon import Lexicon, Match, tokens
from cirloop.negatives.attributes.values import ANY, NOT, joined


class Extractor(Protocol):
    """Attributes of texts, {attribute: value} each; values as `attributes.values` writes them."""

    lexicon: Lexicon

    def asked(self, texts: Sequence[str]) -> list[dict[str, str]]:
        """What modification texts ask for."""
        ...

    def described(self, captions: Sequence[str]) -> list[dict[str, str]]:
        """What captions say of their images."""
        ...


class Role(Enum):
    """What naming a value means; what naming the attribute alone means is in brackets."""

    WANTED = auto()
    """Asked for (asked for, value not said)."""
    REMOVED = auto()
    """Absent (its absence is wanted)."""
    REPLACED = auto()
    """Absent (asked for, value not said)."""
    CHANGED = auto()
    """Only mentioned (asked for, value not said)."""
    KEPT = auto()
    """Only mentioned (only mentioned)."""
    LESS = auto()
    """Asked for, value not said (the same)."""


_CUES = {
    Role.REMOVED: (
        "no;no more;no longer;not;without;never;non;nor;neither;remove;removes;removing;take away;takes away;take off;"
        "get rid of;delete;lose;loses;lacks;lack;lacking;minus;drop;free of;devoid of;eliminate;omit;exclude"
    ),
    Role.REPLACED: "instead of;rather than;in place of;from;replace;replaces;replacing;substitute;exchange",
    Role.CHANGED: "change;changes;changing;swap;switch;convert;turn;turns;turning;transform",
    Role.KEPT: "same;keep;keeps;keeping;retain;still;similar;identical;than;unlike;compared to;unchanged",
    Role.LESS: "less;not as;not so;not too;not very;not quite as",
    Role.WANTED: "not only;not just;no less;more",
}
CUES = {tuple(cue.split()): role for role, cues in _CUES.items() for cue in cues.split(";")}
LONGEST = max(map(len, CUES))
STARTS = {cue[0] for cue in CUES}
GONE = {"gone", "removed", "missing", "absent", "disappears", "disappear", "deleted", "vanishes"}
BREAKS = {",", ";", ".", ":", "!", "?", "\n", "(", ")", "and", "but", "then", "while", "except", "yet", "instead"}
VERBS = {
    "with",
    "has",
    "have",
    "having",
    "is",
    "are",
    "be",
    "should",
    "now",
    "becomes",
    "become",
    "add",
    "show",
    "make",
}
CLOSERS = {
    Role.REMOVED: VERBS,
    Role.LESS: VERBS,
    Role.REPLACED: VERBS | {"to", "into", "by", "for"},
    Role.CHANGED: VERBS | {"to", "into", "by", "for", "from"},
    Role.KEPT: {"in", "with", "to"},
}
NEED_CLOSER = {"change", "changes", "changing", "swap", "switch", "convert", "turn", "turns", "turning", "transform"}
THE = {"the", "this", "that", "these", "those", "its", "their", "his", "her"}
OPEN = {"a", "an", "another", "some", "any"}
OUTSIDE = VERBS | {"in", "at", "on", "of", "to", "into", "as", "for", "by", "goes", "want"}


def roles(words: Sequence[str], matches: Sequence[Match]) -> dict[int, Role]:
    """The role of each match, by its first word."""
    starts = {match.start: match for match in matches}
    out: dict[int, Role] = {}
    clause: list[int] = []
    role, named, at = Role.WANTED, False, 0
    while at < len(words):
        word, match = words[at], starts.get(at)
        if match is not None:
            out[at], named = role, True
            clause.append(at)
            at = match.end
            continue
        size, cue = _cue(words, at, starts)
        if cue is not None:
            out.update((place, Role.KEPT) for place in range(at, at + size) if place in starts)
            role, named, at = cue, False, at + size
            continue
        if word in GONE:
            out.update(dict.fromkeys(clause, Role.REMOVED))
        if word in BREAKS:
            role, clause = Role.WANTED, []
        elif word in CLOSERS.get(role, ()) and (named or role in (Role.CHANGED, Role.KEPT)):
            role = Role.WANTED
        at += 1
    return out


def _cue(words: Sequence[str], at: int, starts: dict[int, Match]) -> tuple[int, Role | None]:
    """Words of the longest cue at a place, and its role. `change` needs its `to`.

    A cue that runs into a match is none, unless it holds the bare name of an attribute (`longer` in "no longer red").
    """
    if words[at] not in STARTS:
        return 0, None
    for size in range(min(LONGEST, len(words) - at), 0, -1):
        cue = CUES.get(tuple(words[at : at + size]))
        inside = [starts[place] for place in range(at, at + size) if place in starts]
        if cue is None or any(match.value != ANY or match.end > at + size for match in inside):
            continue
        if words[at] in NEED_CLOSER and not _closed(words, at):
            continue
        return size, cue
    return 0, None


def _closed(words: Sequence[str], at: int) -> bool:
    """Whether `to`, `into`, `by` or `for` follows in the clause, at most twelve words on."""
    for word in words[at + 1 : at + 13]:
        if word in BREAKS:
            return False
        if word in ("to", "into", "by", "for", "from", "with"):
            return True
    return False


def definite(words: Sequence[str], matches: Sequence[Match], lexicon: Lexicon) -> set[int]:
    """First words of the matches in phrases with `the`: they name a thing that is already there.

    `in the middle` after a phrase belongs to it; `to the middle` is a goal.
    """
    starts = {match.start: match for match in matches}
    out: set[int] = set()
    inside = last = False
    at = 0
    while at < len(words):
        word, match = words[at], starts.get(at)
        if match is not None:
            last = inside
            if inside:
                out.add(at)
            if match.value == ANY or lexicon.attributes[match.attribute].head:
                inside = False
            at = match.end
            continue
        if word in THE:
            before = words[at - 1] if at else ""
            inside = last if before in ("in", "at", "on", "of") else before not in ("to", "into", "as")
        elif word in lexicon.nouns:
            last, inside = inside, False
        elif word in BREAKS:
            inside = last = False
        elif word in OPEN or word in OUTSIDE:
            inside = False
        at += 1
    return out


def combined(words: Sequence[str], matches: Sequence[Match], lexicon: Lexicon, caption: bool) -> dict[str, str]:
    """One value per attribute: those wanted; else those removed; else `*` where the attribute alone is asked for.

    In a caption a phrase with `the` counts like any other, and naming an attribute alone says nothing.
    """
    what = roles(words, matches)
    weak = set() if caption else definite(words, matches, lexicon)
    found: dict[str, dict[str, list[str]]] = {}
    for match in matches:
        role, kinds = what[match.start], found.setdefault(match.attribute, {})
        kind, value = _reading(role, match, lexicon)
        if kind == "wanted" and match.start in weak and match.value != ANY:
            kind = "" if lexicon.definite == "ignored" or lexicon.attributes[match.attribute].head else "weak"
        if kind:
            kinds.setdefault(kind, []).append(value)
    out = {}
    for name, kinds in found.items():
        for kind in ("wanted", "weak", "removed"):
            if kind in kinds:
                out[name] = joined(kinds[kind])
                break
        else:
            if "asked" in kinds and not caption:
                out[name] = ANY
    return out


def _reading(role: Role, match: Match, lexicon: Lexicon) -> tuple[str, str]:
    """The kind of evidence a match is (wanted, removed, asked, or none of them) and its value."""
    if match.value == ANY:
        if role is Role.REMOVED:
            return "wanted", lexicon.attributes[match.attribute].absent
        return ("" if role is Role.KEPT else "asked"), ANY
    kinds = {Role.WANTED: "wanted", Role.REMOVED: "removed", Role.REPLACED: "removed", Role.LESS: "asked"}
    return kinds.get(role, ""), match.value if role is Role.WANTED else NOT + match.value


class Rules:
    """The rule-based extractor over a lexicon."""

    def __init__(self, lexicon: Lexicon) -> None:
        self.lexicon = lexicon

    def asked(self, texts: Sequence[str]) -> list[dict[str, str]]:
        return [self._read(text, False) for text in texts]

    def described(self, captions: Sequence[str]) -> list[dict[str, str]]:
        return [self._read(text, True) for text in captions]

    def _read(self, text: str, caption: bool) -> dict[str, str]:
        words = tokens(text)
        return combined(words, self.lexicon.matches(words), self.lexicon, caption)
