"""Validation errors of settings, in words for the user."""

from __future__ import annotations

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cirloop.config import suggestions


def describe(problem: ErrorDetails, model: type[BaseModel]) -> tuple[str, str]:
    """Return where a problem is and what is wrong, with the nearest name of `model` for an unknown
    one."""
    where = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        near = suggestions.settings_like(where, model)
        message = "unknown setting" + (f"; did you mean {' or '.join(near)}?" if near else "")
    elif problem["type"] == "union_tag_invalid":
        where += ".type"
        unknown = problem["ctx"]["tag"]
        tags = problem["ctx"]["expected_tags"]
        near = suggestions.types_like(str(unknown), [tag.strip(" '") for tag in tags.split(",")])
        see = f"; see {near[0]}" if near else ""
        message = f"should be one of {tags} (given: {unknown!r}{see})"
    elif problem["input"] is not None and not isinstance(problem["input"], (dict, BaseModel)):
        message += f" (given: {problem['input']!r:.200})"
    return where or "settings", message


def format_errors(error: ValidationError, model: type[BaseModel], all_settings: str) -> str:
    """Format every problem, a line each. `all_settings` is the command that lists all settings."""
    lines = [": ".join(describe(problem, model)) for problem in error.errors()]
    return "\n".join(
        [
            f"{len(lines)} problem{'s' * (len(lines) > 1)} in the configuration:",
            *(f"  {line}" for line in lines),
            f"All settings: {all_settings}",
        ]
    )
