"""Rules that extract requests from a text: which of the values it names are wanted, removed or
only mentioned.

A cue such as `without` or `instead of` changes what the values after it mean, to the end of the
clause or a word such as `to`; `is gone` removes the values before it. A value that is only removed
is an absence ("not red" -> `!red`, "no sleeves" -> sleeveless). A phrase with `the` names a thing
that is in the reference already, and is no wish.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
VERBS = {"with", "has", "have", "is", "are", "be", "should", "add", "make"}
"""Words that end a cue once a value has followed it."""
TARGETS = {"to", "into", "by", "for"}
"""Words that end a cue in any case, unless something is removed."""
WINDOW = 12
"""Words after `change` in which `to` must follow."""
THE = {"the", "this", "that", "its", "their"}
OPEN = {"a", "an", "another", *VERBS, *TARGETS, "in", "at", "on", "of", "as", "goes", "want"}


def roles(
    words: Sequence[str], matches: Sequence[Match], lexicon: Lexicon
) -> tuple[dict[int, str], set[int]]:
    """Return the role of each match by its first word, and the matches in phrases with `the`."""
    starts = {match.start: match for match in matches}
    reader = _RoleReader(words, starts, lexicon)
    at = 0
    while at < len(words):
        match = starts.get(at)
        cue, size = _cue_at(words, at)
        if match is not None and not (cue and size > match.end - at):
            reader.read_match(match)
            at = match.end
        elif cue is not None:
            reader.read_cue(cue, range(at, at + size))
            at += size
        else:
            reader.read_word(at)
            at += 1
    return reader.role_of, reader.definite


def _cue_at(words: Sequence[str], at: int) -> tuple[str | None, int]:
    """Return the cue that starts at a word, and its number of words."""
    size = next((n for n in (3, 2, 1) if tuple(words[at : at + n]) in CUES), 0)
    cue = CUES.get(tuple(words[at : at + size]))
    if cue == "changed" and not TARGETS & {*words[at : at + WINDOW]}:
        return None, size  # `turn it large`
    return cue, size


@dataclass(slots=True)
class _RoleReader:
    """State of reading a text from left to right, and the roles so far."""

    words: Sequence[str]
    starts: Mapping[int, Match]
    lexicon: Lexicon
    role_of: dict[int, str] = field(default_factory=dict)
    definite: set[int] = field(default_factory=set)
    role: str = "wanted"
    """The role of the next match."""
    named: bool = False
    """A match has followed the cue."""
    inside: bool = False
    """The next match is in a phrase with `the`."""
    last_inside: bool = False
    """The last phrase was one with `the`."""
    clause: list[int] = field(default_factory=list)
    """The matches of the clause so far."""

    def read_match(self, match: Match) -> None:
        self.role_of[match.start] = self.role
        self.named = True
        self.last_inside = self.inside
        self.clause.append(match.start)
        if self.inside:
            self.definite.add(match.start)
        self.inside &= match.value != ANY and not self.lexicon.attributes[match.attribute].head

    def read_cue(self, cue: str, span: range) -> None:
        self.role_of |= {start: "kept" for start in span if start in self.starts}
        self.role = cue
        self.named = False

    def read_word(self, at: int) -> None:
        word = self.words[at]
        if word in GONE:
            self.role_of |= dict.fromkeys(self.clause, "removed")
        if word in BREAKS:
            self.role = "wanted"
            self.inside = False
            self.last_inside = False
            self.clause = []
        elif self._ends_cue(word):
            self.role = "wanted"
        if word in THE:
            self.inside = self._starts_definite(self.words[at - 1] if at else "")
        elif word in OPEN or word in self.lexicon.nouns:
            if word in self.lexicon.nouns:
                self.last_inside = self.inside
            self.inside = False

    def _ends_cue(self, word: str) -> bool:
        if word in VERBS:
            return self.named
        return (word in TARGETS and self.role != "removed") or (
            word == "in" and self.role == "kept"
        )

    def _starts_definite(self, before: str) -> bool:
        """Return whether `the` starts a definite phrase: `in the middle` after a phrase belongs to
        it; `to the middle` is a goal."""
        if before in ("in", "at", "on", "of"):
            return self.last_inside
        return before not in ("to", "into", "as")


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
