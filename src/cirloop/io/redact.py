"""Redaction of text for terminals and logs: control characters are escaped, secrets hidden."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tabs and line feeds
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks that turn the direction of writing
    "\u2028\u2029\ud800-\udfff]"
)
_SECRET_NAMES = re.compile(
    r"token|secret|passw(or)?d|api_?key|access_?key|credential", re.IGNORECASE
)
_TOKENS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bAKIA[A-Z0-9]{16}\b"
)
_LOGIN = re.compile(r"(?<=://)[^/\s@]+(?=@)")
HIDDEN = "[hidden]"


def escape_control(text: str) -> str:
    """Escape what would steer a terminal as Python would write it, such as \\x1b."""
    return _CONTROL.sub(
        lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text
    )


def redact(text: str) -> str:
    """Hide tokens of known forms, logins in URLs, and values of environment variables with names of
    secrets."""
    for value in _environment_secrets():
        text = text.replace(value, HIDDEN)
    return _LOGIN.sub(HIDDEN, _TOKENS.sub(HIDDEN, text))


def sanitize(text: str) -> str:
    """Redact secrets and escape control characters."""
    return escape_control(redact(text))


def secrets_in(settings: object, where: str = "") -> Iterator[str]:
    """Yield the names of JSON settings whose value is a secret by its name or its form."""
    if isinstance(settings, dict):
        for name, value in settings.items():
            inside = f"{where}.{name}".lstrip(".")
            if isinstance(value, str) and value and _SECRET_NAMES.search(str(name)):
                yield inside
            else:
                yield from secrets_in(value, inside)
    elif isinstance(settings, list | tuple):
        for number, value in enumerate(settings):
            yield from secrets_in(value, f"{where}.{number}")
    elif isinstance(settings, str) and (_TOKENS.search(settings) or _LOGIN.search(settings)):
        yield where


def _environment_secrets() -> list[str]:
    """Return secret values of the environment, longest first; short values could be words."""
    values = {
        value.strip()
        for name, value in os.environ.items()
        if _SECRET_NAMES.search(name) and len(value.strip()) >= 8
    }
    return sorted(values, key=len, reverse=True)
