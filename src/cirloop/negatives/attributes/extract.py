"""Rules that extract requests from a text: which of the values it names are wanted, removed or
only mentioned.

A cue such as `without` or `instead of` changes what the values after it mean, to the end of the
clause or a word such as `to`; `is gone` removes the values before it. A value that is only removed
is an absence ("not red" -> `!red`, "no sleeves" -> sleeveless). A phrase with `the` names a thing
that is in the reference already, and is no wish.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cirloop.negatives.attributes.lexicon import Lexicon, Match, tokens
from cirloop.negatives.attributes.values import ANY, NOT, join_values

_CUES = {
    "removed": (
        "no;no more;no longer;not;without;never;remove;removes;removing;take away;get rid"
        " of;delete;exclude;lose;loses;lack;lacks;lacking;minus;free of"
    ),
    "replaced": "instead of;rather than;in place of;from;replace;replaces;replacing",
    "changed": "change;changes;changing;turn;turns;turning;swap;convert",
    "kept": "same;keep;keeps;than;unlike;similar;unchanged;compared to",
    "less": "less;not as;not so;not very",
    "wanted": "not only;not just",
}
CUES = {tuple(cue.split()): role for role, cues in _CUES.items() for cue in cues.split(";")}
GONE = {"gone", "removed", "missing", "absent", "disappear", "disappears"}
BREAKS = {",", ";", ".", ":", "!", "?", "\n", "(", ")", "and", "but", "instead"}
VERBS = {
    "with",
    "has",
    "have",
    "is",
    "are",
    "be",
    "should",
    "add",
    "make",
}  # end a cue once a value has followed it
TARGETS = {"to", "into", "by", "for"}  # end it anyway, but where something is removed
WINDOW = 12  # words after `change` in which `to` must follow
THE = {"the", "this", "that", "its", "their"}
OPEN = {"a", "an", "another", *VERBS, *TARGETS, "in", "at", "on", "of", "as", "goes", "want"}


def roles(
    words: Sequence[str], matches: Sequence[Match], lexicon: Lexicon
) -> tuple[dict[int, str], set[int]]:
    """Return the role of each match by its first word, and the matches in phrases with `the`."""
    starts = {match.start: match for match in matches}
    role_of = dict[int, str]()
    definite = set[int]()
    role = "wanted"
    named = False
    inside = False
    last = False
    at = 0
    clause = list[int]()
    while at < len(words):
        word = words[at]
        match = starts.get(at)
        size = next((n for n in (3, 2, 1) if tuple(words[at : at + n]) in CUES), 0)
        cue = CUES.get(tuple(words[at : at + size]))
        if cue == "changed" and not TARGETS & {*words[at : at + WINDOW]}:
            cue = None  # `turn it large`
        if match is not None and not (cue and size > match.end - at):
            role_of[at] = role
            named = True
            last = inside
            clause.append(at)
            definite |= {at} if inside else set()
            inside &= match.value != ANY and not lexicon.attributes[match.attribute].head
            at = match.end
            continue
        if cue is not None:
            role_of |= {place: "kept" for place in range(at, at + size) if place in starts}
            role = cue
            named = False
            at = at + size
            continue
        if word in GONE:
            role_of |= dict.fromkeys(clause, "removed")
        if word in BREAKS:
            role = "wanted"
            inside = False
            last = False
            clause = []
        elif (
            (word in VERBS and named)
            or (word in TARGETS and role != "removed")
            or (word == "in" and role == "kept")
        ):
            role = "wanted"
        if word in THE:  # `in the middle` after a phrase belongs to it; `to the middle` is a goal
            before = words[at - 1] if at else ""
            inside = (
                last if before in ("in", "at", "on", "of") else before not in ("to", "into", "as")
            )
        elif word in OPEN or word in lexicon.nouns:
            last = inside if word in lexicon.nouns else last
            inside = False
        at += 1
    return role_of, definite


def resolve(
    words: Sequence[str], matches: Sequence[Match], lexicon: Lexicon, *, caption: bool
) -> dict[str, str]:
    """Choose one value per attribute: those wanted; else those removed; else `*` where the
    attribute alone is asked for.

    In a caption a phrase with `the` counts like any other, and naming an attribute alone says
    nothing.
    """
    role_of, definite = roles(words, matches, lexicon)
    by_kind: dict[str, dict[str, list[str]]] = {}
    for match in matches:
        role = role_of[match.start]
        attribute = lexicon.attributes[match.attribute]
        if match.value == ANY and role == "removed":
            kind = "wanted"
            value = attribute.absent
        elif match.value == ANY or role == "less":
            kind = "" if role == "kept" or caption else "asked"
            value = ANY
        elif role != "wanted":
            kind = "removed" if role in ("removed", "replaced") else ""
            value = NOT + match.value
        else:
            kind = "wanted"
            value = match.value
            if match.start in definite and not caption:
                kind = "" if lexicon.definite == "ignored" or attribute.head else "weak"
        by_kind.setdefault(match.attribute, {}).setdefault(kind, []).append(value)
    ranked = ("wanted", "weak", "removed", "asked")
    resolved: dict[str, str] = {}
    for name, kinds in by_kind.items():
        values = next((kinds[kind] for kind in ranked if kind in kinds), [])
        if values:
            resolved[name] = join_values(values)
    return resolved


@dataclass(frozen=True)
class Rules:
    """The rule-based extractor over a lexicon."""

    lexicon: Lexicon

    def parse_request(self, texts: Sequence[str]) -> list[dict[str, str]]:
        return [self._read(text, caption=False) for text in texts]

    def parse_caption(self, captions: Sequence[str]) -> list[dict[str, str]]:
        return [self._read(text, caption=True) for text in captions]

    def _read(self, text: str, *, caption: bool) -> dict[str, str]:
        words = tokens(text)
        return resolve(words, self.lexicon.matches(words), self.lexicon, caption=caption)
