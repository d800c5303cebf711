"""Parsing of a foundation model's answers into texts."""

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
"""Patterns of the phrases that chat models put before a text out of habit, in any case: "Sure!",
"Here is the rewritten text:", "The change from picture 1 to picture 2 is", "Modified text:". "The
text is" and "the caption is" are not among them: a shirt may bear them."""
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
"""Patterns that no text about two images holds anywhere: set phrases that cannot be taken off as a
beginning."""
_BEGINNING = re.compile(rf"[\"'*\s]*(?:{'|'.join(SET_PHRASES)})[*\s]*", re.IGNORECASE)
_TALK = re.compile(rf"\b(?:{'|'.join(TALK)})", re.IGNORECASE)


def parse_answer(answer: str, kind: AnswerKind) -> str | None:
    """Parse the text of an answer; return None where the answer is not what the prompt asked for.

    A `plain` answer is the text. A `json` answer is one JSON object with a string under its only
    key `text`. White space and one code fence around the object are allowed: chat models write the
    fence out of habit. A repeated key, another key, a second object or any talk gives None.
    """
    if kind != "json":
        return answer
    answer = answer.strip()
    fenced = FENCED.fullmatch(answer)
    try:
        content = parse.parse_json(fenced[1] if fenced else answer)
    except UserError:
        return None
    if not isinstance(content, dict) or content.keys() != {KEY}:
        return None
    text = content[KEY]
    return text.strip() if isinstance(text, str) else None


def without_set_phrases(text: str) -> str | None:
    """Remove the set phrases at the beginning of `text`.

    Return None where nothing else is left, or where talk remains.
    """
    while phrase := _BEGINNING.match(text):
        text = text[phrase.end() :]
    return text if text.strip(" \n\"'*.") and not _TALK.search(text) else None
