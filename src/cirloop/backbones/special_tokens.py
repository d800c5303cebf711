"""Special tokens of a processor, and user text in which none of them can be read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

Processor: TypeAlias = Any
"""A processor of transformers: untyped, and of another class in each model family."""


def special_tokens(processor: Processor) -> list[str]:
    """List the strings that a processor does not read as text: turns, placeholders of images, ends.

    Longest first, so that no token is looked for inside another.
    """
    tokenizer = processor.tokenizer
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    placeholders = {
        getattr(processor, f"{kind}_token", None) or "" for kind in ("image", "video", "audio")
    }
    tokens = {*special, *tokenizer.all_special_tokens, *placeholders} - {""}
    return sorted(tokens, key=lambda token: (-len(token), token))


def escape_special_tokens(text: str, tokens: Iterable[str]) -> str:
    """Break every special token in `text` by a space behind its first character.

    A text without special tokens stays as it is.
    """
    changed = True
    while changed:
        changed = False
        for token in tokens:
            if len(token) > 1 and token in text:
                text = text.replace(token, f"{token[0]} {token[1:]}")
                changed = True
    return text
