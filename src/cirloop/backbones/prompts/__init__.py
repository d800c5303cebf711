"""Prompt formats of embedders, a named file for each. Published weights need their own format.

A file holds what the model reads of a composed query and of a gallery image (`query`, `document`):
`{image}` is an image with the family's tokens around it, `{prompt}` the instruction
(`query_prompt`, `document_prompt`), `{text}` the modification text, `{category}` the query's
category in its data set, or else the file's `category`. All else is literal, special tokens
included: a file is trusted. Texts and categories are escaped.

`positions: sequential` numbers image tokens as text is numbered; `model`, the default, leaves them
to the model (M-RoPE in the Qwen-VLs). With `chat_template: true` the query is a user's turn of the
model's own chat template. `families` are the types of model that a file is for; without it, all.
Fingerprints cover a file's content, not its name.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from cirloop.artifacts.store import fingerprint
from cirloop.io import parse
from cirloop.types import UserError

IMAGE = "{image}"
PROMPT = "{prompt}"
TEXT = "{text}"
CATEGORY = "{category}"
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava")
POSITIONS = ("model", "sequential")
_VALUES = re.compile(f"{re.escape(TEXT)}|{re.escape(CATEGORY)}")
_KINDS: dict[str, tuple[type, str]] = {
    "query": (str, "a text"),
    "document": (str, "a text"),
    "query_prompt": (str, "a text"),
    "document_prompt": (str, "a text"),
    "category": (str, "a text"),
    "positions": (str, "a text"),
    "chat_template": (bool, "true or false"),
    "families": (list, "a list"),
}


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """The content of a prompt format's file."""

    name: str
    query: str
    document: str
    query_prompt: str = ""
    document_prompt: str = ""
    category: str = ""
    positions: Literal["model", "sequential"] = "model"
    chat_template: bool = False
    families: tuple[str, ...] = FAMILIES

    @property
    def digest(self) -> str:
        """Digest of the content without the name."""
        content = asdict(self)
        del content["name"]
        return fingerprint(content)

    def check_prompts(self, query_prompt: str | None, document_prompt: str | None) -> None:
        """Raise UserError where `model.query_prompt` or `model.document_prompt` does not fit."""
        problems = []
        for role, frame, prompt in (
            ("query", self.query, query_prompt),
            ("document", self.document, document_prompt),
        ):
            if prompt is None:
                continue
            if PROMPT not in frame:
                problems.append(
                    f"{role}_prompt: prompt format {self.name!r} has no {PROMPT} in its {role}"
                )
            if IMAGE in prompt or PROMPT in prompt:
                problems.append(
                    f"{role}_prompt {prompt!r}: {IMAGE} and {PROMPT} belong into a prompt format"
                )
        if query_prompt is not None and (self.query + query_prompt).count(TEXT) != 1:
            in_query = TEXT in self.query
            place = "in its query, so not in a prompt" if in_query else "once in its query_prompt"
            problems.append(
                f"query_prompt {query_prompt!r}: prompt format {self.name!r} has {TEXT} {place}"
            )
        if query_prompt is not None and CATEGORY in query_prompt and not self.category:
            reason = f"has no category, the word where data have none, so no {CATEGORY}"
            problems.append(f"query_prompt {query_prompt!r}: prompt format {self.name!r} {reason}")
        if document_prompt is not None and _VALUES.search(document_prompt):
            problems.append(
                f"document_prompt {document_prompt!r}: a gallery image has neither {TEXT} nor"
                f" {CATEGORY}"
            )
        if problems:
            raise UserError(
                f"{'; '.join(problems)}. Change the prompt, or give another prompt_format."
            )


def packaged() -> list[str]:
    """List the names of the packaged formats."""
    return parse.packaged_names(__name__)


def fitting(family: str) -> list[str]:
    """List the names of the packaged formats for a type of model."""
    return [name for name in packaged() if family in load(name).families]


def filled(piece: str, text: str, category: str) -> str:
    """Fill a piece of a format with its values; placeholders inside values stay as they are."""
    return _VALUES.sub(lambda place: text if place[0] == TEXT else category, piece)


@cache
def load(name: str) -> PromptFormat:
    """Load the packaged format `name`, or that of a file. Raises UserError with all faults."""
    path, content = parse.read_packaged(__name__, name, "prompt format")
    problems = _problems(content)
    if problems:
        raise UserError(
            f"prompt format {name!r}: {'; '.join(problems)}. Those that come along are in"
            f" {files(__name__)}."
        )
    families = tuple(content.pop("families", FAMILIES))
    return PromptFormat(path.stem, families=families, **content)


def _problems(content: object) -> list[str]:
    """List what is wrong with a file's content."""
    if not isinstance(content, dict):
        return [f"must be a mapping with {', '.join(_KINDS)}"]
    problems = [
        f"unknown key {key!r}; known: {', '.join(_KINDS)}" for key in content if key not in _KINDS
    ]
    problems += [f"has no {key}" for key in ("query", "document") if key not in content]
    for key, (kind, kind_name) in _KINDS.items():
        if key in content and not isinstance(content[key], kind):
            problems.append(f"{key} {content[key]!r} is not {kind_name}")
    return problems or _misplaced(content) + _unknown(content)


def _misplaced(content: dict[str, Any]) -> list[str]:
    """List placeholders that are missing, repeated, or in the wrong place."""
    problems = []
    for role in ("query", "document"):
        frame = content[role]
        prompt = content.get(f"{role}_prompt", "")
        if frame.count(PROMPT) > 1 or (PROMPT in frame) != bool(prompt):
            problems.append(
                f"{PROMPT} stands in {role} once where {role}_prompt is given, else not"
            )
        if IMAGE in prompt or PROMPT in prompt:
            problems.append(f"{role}_prompt must not hold {IMAGE} or {PROMPT}")
        if frame.count(IMAGE) > 1 or (content.get("chat_template") and IMAGE not in frame):
            problems.append(f"{role} must hold {IMAGE} once")
    query = content["query"] + content.get("query_prompt", "")
    if query.count(TEXT) != 1:
        problems.append(f"query or query_prompt must hold {TEXT} once")
    if _VALUES.search(content["document"] + content.get("document_prompt", "")):
        problems.append(f"a document has neither {TEXT} nor {CATEGORY}")
    if (CATEGORY in query) != bool(content.get("category")):
        problems.append(
            f"category, the word where data have none, belongs to {CATEGORY} in query or"
            " query_prompt"
        )
    return problems


def _unknown(content: dict[str, Any]) -> list[str]:
    """List values that are none of the known ones."""
    problems = []
    if content.get("positions", "model") not in POSITIONS:
        problems.append(f"positions {content['positions']!r} is none of {', '.join(POSITIONS)}")
    families = content.get("families", FAMILIES)
    unknown = [family for family in families if family not in FAMILIES]
    if unknown or not families:
        problems.append(f"families {unknown or 'are none'}; there are {', '.join(FAMILIES)}")
    return problems
