"""Answers as a foundation model words them -> texts."""

from __future__ import annotations

import re

from cirloop.captioning.prompts import AnswerKind
from cirloop.io import parse
from cirloop.types import UserError

KEY = "text"
FENCED = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.DOTALL)

_PICTURE = (
    r"(?:the )?(?:(?:first|second|left|right|reference|target) )?(?:picture|image|photo)(?: ?[12])?"
)
_PICTURES = (
    rf"(?:{_PICTURE} (?:to|and) {_PICTURE}|{_PICTURE}|(?:the )?(?:two|both)"
    r" (?:pictures|images|photos))"
)
_ABOUT = rf"(?: (?:from|of|for|between|in) {_PICTURES})?"
_REWRITTEN = r"(?:modification|modified|modifying|rewritten|revised|reworded)"
_NOUN = r"(?:caption|sentence|description|instruction|changes?|differences?|answer)"
_CHANGE = rf"(?:{_REWRITTEN} text|(?:{_REWRITTEN} )?{_NOUN})"
_ITSELF = rf"(?:changes?|differences?|modification|{_REWRITTEN} (?:text|{_NOUN}))"
_HERE = r"(?:here(?:['’]s| is| are)|below is)"
SET_PHRASES = (
    r"(?:sure(?: thing)?|certainly|of course|absolutely|okay|ok|yes)\b ?(?:[,.!:]+|$)",
    r"great ?(?:[.!:]+|$)",
    rf"(?:(?:sure|certainly) )?{_HERE}(?: (?:the|a|an|my|your|one|new|short|final|possible))*"
    rf"(?: (?:{_CHANGE}|modification|text))?(?: of the"
    rf" (?:change|difference|modification)s?)?{_ABOUT} ?(?:[:.]+|$)",
    rf"the (?:(?:new|short|final|main|only) )?{_ITSELF}{_ABOUT}"
    r" (?:is|are|would be|can be described as)(?: as follows)?(?: that)?\b ?[:,]?",
    rf"(?:the )?(?:{_CHANGE}|modification|text){_ABOUT}(?: (?:is|are))?(?: as follows)? ?:",
)
"""What chat models put before a text out of habit, as patterns, case aside: "Sure!", "Here is the
rewritten text:", "The change from picture 1 to picture 2 is", "Modified text:". "The text is" and
"the caption is" are none: they may be on a shirt."""
TALK = (
    rf"{_HERE} (?:the|a|an|my|your) (?:{_CHANGE}|modification)",
    rf"the (?:{_CHANGE}|modification) (?:from|between) {_PICTURES}",
    r"let me know (?:if|whether)",
    r"(?:hope (?:this|that) helps|happy to help|can help you with)",
    (
        r"i(?:['’]m| am) (?:sorry|an ai|unable)|as an ai\b|i (?:cannot|can['’]t)"
        r" (?:see|view|help|determine|provide)"
    ),
)
"""What no text about two pictures holds, wherever it stands: set phrases that are not a beginning
to take off."""
_BEGINNING = re.compile(rf"[\"'*\s]*(?:{'|'.join(SET_PHRASES)})[*\s]*", re.IGNORECASE)
_TALK = re.compile(rf"\b(?:{'|'.join(TALK)})", re.IGNORECASE)


def text_of(answer: str, kind: AnswerKind) -> str | None:
    """The text of an answer; None where it is not what the prompt asked for.

    A `plain` answer is the text. A `json` answer is one JSON object with the one key `text` and a
    string for it, white space around it allowed and nothing else, but for one code fence around the
    whole: chat models put it out of habit, and it takes nothing from what is inside. A key twice,
    another key, a second object or talk: None.
    """
    if kind != "json":
        return answer
    answer = answer.strip()
    fenced = FENCED.fullmatch(answer)
    try:
        found = parse.parse_json(fenced[1] if fenced else answer)
    except UserError:
        return None
    text = found[KEY] if isinstance(found, dict) and found.keys() == {KEY} else None
    return text.strip() if isinstance(text, str) else None


def without_set_phrases(text: str) -> str | None:
    """`text` without the set phrases that it begins with; None where nothing else is there, or talk
    remains."""
    while phrase := _BEGINNING.match(text):
        text = text[phrase.end() :]
    return text if text.strip(" \n\"'*.") and not _TALK.search(text) else None
