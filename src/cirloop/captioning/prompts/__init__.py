"""Prompts of the foundation model: a named and versioned file for each.

A file holds the user's turn (`turn`: `{image}` stands for an image, `{text}` for the text, all else
is literal) and the kind of answer (`answer`): `plain`, `json` (an object with the one key `text`)
or `yes_no`. The prompt's name is the file's. The turn is part of the fingerprint of what it
produced: a changed turn gets another number in its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, TypedDict

from cirloop.io import parse
from cirloop.types import UserError

Content = list[dict[str, str]]


class Message(TypedDict):
    """A turn of a conversation, in the form of transformers' chat templates."""

    role: str
    content: Content


AnswerKind = Literal["plain", "json", "yes_no"]
KINDS: tuple[AnswerKind, ...] = ("plain", "json", "yes_no")
IMAGE = "{image}"
TEXT = "{text}"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A user's turn about images, and the kind of answer to it."""

    name: str
    template: str
    """The user's turn, with `{image}` and `{text}` in their places."""
    answer: AnswerKind = "plain"

    @property
    def num_images(self) -> int:
        return self.template.count(IMAGE)

    @property
    def images_before_text(self) -> bool:
        """Whether the turn up to the end of its last image is the same for every text."""
        return self.template.find(TEXT) > self.template.rfind(IMAGE)

    def messages(self, text: str) -> list[Message]:
        """Return the conversation about `text`, in the form of transformers' chat templates."""
        content: Content = []
        for number, piece in enumerate(self.template.split(IMAGE)):
            content += [{"type": "image"}] if number else []
            content += [{"type": "text", "text": piece.replace(TEXT, text)}] if piece else []
        return [{"role": "user", "content": content}]

    def to_json(self) -> dict[str, str]:
        """Return the prompt as fingerprints cover it."""
        return {"name": self.name, "turn": self.template, "answer": self.answer}


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of one foundation model."""

    rewrite: Prompt
    verify: Prompt
    describe: Prompt

    def to_json(self) -> dict[str, dict[str, str]]:
        """Return the prompts as fingerprints cover them."""
        return {
            "rewrite": self.rewrite.to_json(),
            "verify": self.verify.to_json(),
            "describe": self.describe.to_json(),
        }


def packaged() -> list[str]:
    """List the names of the packaged prompts."""
    return parse.packaged_names(__name__)


@cache
def load(name: str) -> Prompt:
    """Load the packaged prompt `name`, or the prompt of a file. Raises UserError with the fault."""
    path, content = parse.read_packaged(__name__, name, "prompt")
    if (
        not isinstance(content, dict)
        or content.keys() != {"answer", "turn"}
        or not isinstance(content["turn"], str)
    ):
        raise UserError(f"prompt {name!r} must have `answer` and `turn`, a text, and nothing else.")
    turn = content["turn"]
    answer = content["answer"]
    if answer not in KINDS:
        raise UserError(f"prompt {name!r}: answer {answer!r} is none of {', '.join(KINDS)}.")
    if turn.count(TEXT) != 1:
        raise UserError(f"prompt {name!r}: the turn must hold {TEXT} once.")
    return Prompt(path.stem if path.suffix else name, turn, answer)


REWRITE = load("rewrite-2")
VERIFY = load("verify-1")
DESCRIBE = load("describe-1")
