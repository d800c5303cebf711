"""Answers as a foundation model words them -> texts."""

from __future__ import annotations

import re

from cirloop import reading
from cirloop.captioning.prompts import AnswerKind
from cirloop.types import UserError

KEY = "text"
FENCED = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.DOTALL)


def text_of(answer: str, kind: AnswerKind) -> str | None:
    """The text of an answer; None where it is not what the prompt asked for.

    A `plain` answer is the text. A `json` answer is one JSON object with the one key `text` and a string for it, white
    space around it allowed and nothing else, but for one code fence around the whole: chat models put it out of habit,
    and it takes nothing from what is inside. A key twice, another key, a second object or talk: None.
    """
    if kind != "json":
        return answer
    answer = answer.strip()
    fenced = FENCED.fullmatch(answer)
    try:
        found = reading.parse_json(fenced[1] if fenced else answer)
    except UserError:
        return None
    text = found[KEY] if isinstance(found, dict) and found.keys() == {KEY} else None
    return text.strip() if isinstance(text, str) else None
