"""Validation errors of settings, in words for the user."""

from __future__ import annotations

from pydantic import BaseModel, ValidationError

from cirloop.config import suggestions


def format_errors(error: ValidationError, model: type[BaseModel], all_settings: str) -> str:
    """Format every problem, a line each, with the nearest name of `model` for an unknown one.

    `all_settings` is the command that lists all settings.
    """
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            near = suggestions.settings_like(where, model)
            message = "unknown setting" + (f"; did you mean {' or '.join(near)}?" if near else "")
        elif problem["type"] == "union_tag_invalid":
            where += ".type"
            unknown = problem["ctx"]["tag"]
            tags = problem["ctx"]["expected_tags"]
            near = suggestions.types_like(
                str(unknown), [tag.strip(" '") for tag in tags.split(",")]
            )
            message = (
                f"should be one of {tags} (given: {unknown!r}{f'; see {near[0]}' if near else ''})"
            )
        else:
            message += (
                f" (given: {problem['input']!r:.200})"
                if not isinstance(problem["input"], (dict, BaseModel))
                else ""
            )
        lines.append(f"  {where or 'settings'}: {message}")
    return (
        f"{len(lines)} problem{'s' * (len(lines) > 1)} in the configuration:\n"
        + "\n".join(lines)
        + f"\nAll settings: {all_settings}"
    )
