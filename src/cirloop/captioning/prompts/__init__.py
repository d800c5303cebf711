"""What the foundation model is asked: a file per prompt, named and versioned.

A file says the user's turn (`{image}` where a picture stands, `{text}` where the text does, all
else as it is) and the kind of answer: `plain`, `json` (an object with the one key `text`) or
`yes_no`. Its name is the file's. The text is part of the fingerprint of what it produced: one that
is changed gets another number.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from cirloop.io import parse
from cirloop.types import UserError

Message = dict[str, Any]
AnswerKind = Literal["plain", "json", "yes_no"]
KINDS: tuple[AnswerKind, ...] = ("plain", "json", "yes_no")
IMAGE, TEXT = "{image}", "{text}"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A user's turn about pictures, and how it is answered."""

    name: str
    turn: str
    answer: AnswerKind = "plain"

    @property
    def num_images(self) -> int:
        return self.turn.count(IMAGE)

    @property
    def pictures_first(self) -> bool:
        """Whether all before the last picture's end is the same for every text."""
        return self.turn.find(TEXT) > self.turn.rfind(IMAGE)

    def messages(self, text: str) -> list[Message]:
        """The conversation, in the form of transformers' chat templates."""
        content: list[Message] = []
        for number, piece in enumerate(self.turn.split(IMAGE)):
            content += [{"type": "image"}] if number else []
            content += [{"type": "text", "text": piece.replace(TEXT, text)}] if piece else []
        return [{"role": "user", "content": content}]


@dataclass(frozen=True, slots=True)
class Prompts:
    """What one foundation model is asked."""

    rewrite: Prompt
    verify: Prompt
    describe: Prompt


def packaged() -> list[str]:
    """Names of the prompts that come along."""
    return sorted(
        p.name.removesuffix(".yaml") for p in files(__name__).iterdir() if p.name.endswith(".yaml")
    )


@cache
def load(name: str) -> Prompt:
    """The packaged prompt `name`, or the prompt of a file. Raises UserError with what is wrong."""
    path = parse.expand_user(name)
    if name in packaged():
        path = Path(str(files(__name__).joinpath(f"{name}.yaml")))
    elif path.suffix != ".yaml" or not path.is_file():
        raise UserError(
            f"prompt {name!r} is none of {', '.join(packaged())}, and no .yaml file of that name is"
            " there."
        )
    try:
        found = parse.read_yaml(path)
    except UserError as error:
        raise UserError(f"prompt {name!r} {error}") from None
    if (
        not isinstance(found, dict)
        or found.keys() != {"answer", "turn"}
        or not isinstance(found["turn"], str)
    ):
        raise UserError(f"prompt {name!r} must have `answer` and `turn`, a text, and nothing else.")
    if found["answer"] not in KINDS:
        raise UserError(
            f"prompt {name!r}: answer {found['answer']!r} is none of {', '.join(KINDS)}."
        )
    if found["turn"].count(TEXT) != 1:
        raise UserError(f"prompt {name!r}: the turn must hold {TEXT} once.")
    return Prompt(path.stem if path.suffix else name, found["turn"], found["answer"])


REWRITE, VERIFY, DESCRIBE = load("rewrite-2"), load("verify-1"), load("describe-1")
