"""What the foundation model is asked. A prompt's text is part of the fingerprint of what it produced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A user turn about two pictures, Qwen2-VL's multi-image form; `{text}` is filled in."""

    name: str
    question: str

    def messages(self, text: str) -> list[Message]:
        return [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Picture 1: "},
                    {"type": "image"},
                    {"type": "text", "text": "Picture 2: "},
                    {"type": "image"},
                    {"type": "text", "text": self.question.format(text=text)},
                ],
            }
        ]


REWRITE = Prompt(
    "rewrite-2",
    "Another change of picture 1: {text}\nDescribe the change from picture 1 to picture 2 in one short sentence."
    ' Answer "none" if they show the same or have little in common.',
)
DESCRIBE = Prompt(
    "describe-1",
    "Both pictures are the same. Describe what it shows in one sentence: the kind of thing, its colours, pattern, shape"
    " and details.{text}",
)
VERIFY = Prompt(
    "verify-1",
    "Is this the whole change from picture 1 to picture 2: {text}\nAnswer yes or no.",
)
