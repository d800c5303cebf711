"""Flags from settings models: argparse underneath, with the user's errors as `UserError`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliSettingsSource,
    SettingsConfigDict,
)

from cirloop.config import errors
from cirloop.config.base import FlagSettings
from cirloop.config.suggestions import flags_like
from cirloop.types import UserError
from cirloop.validation import ValidationFailed, ValidationReport

S = TypeVar("S", bound=BaseSettings)
MODES = ("--vectors",)
"""Flags that choose another set of flags, for messages."""


class Flags(FlagSettings):
    """What a command is given by its flags, and by nothing else."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )


def program(script: str) -> str:
    """Return the command that a person typed: `cirloop NAME`, or `script` where it was not that."""
    invoked = Path(sys.argv[0])
    by_module = invoked.name == "__main__.py" and invoked.parent.name == "cirloop"
    if len(sys.argv) > 1 and (invoked.name == "cirloop" or by_module):
        return " ".join(["cirloop", sys.argv[1], *(word for word in MODES if word in sys.argv)])
    return script


def underscored(argv: Sequence[str]) -> list[str]:
    """Return a command line with `_` for each `-` in the names of flags."""
    words = []
    for word in argv:
        name, sign, value = word.partition("=")
        flag = f"--{name[2:].replace('-', '_')}" if name.startswith("--") else name
        words.append(flag + sign + value)
    return words


class HelpFormatter(argparse.HelpFormatter):
    """A line for each flag where it fits into 100 columns, and no default where that is nothing."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=100)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help and action.help.replace(" (default: None)", "")


class Parser(argparse.ArgumentParser):
    """argparse without guessing at shortened flags, with `-` and `_` for each other in their names;
    an unknown flag is answered with the nearest ones.

    `prog` is the script that has the flags. `help_flag` is what prints every flag.
    """

    def __init__(self, prog: str, *args: Any, help_flag: str = "--help", **kwargs: Any) -> None:
        kwargs |= {"allow_abbrev": False, "formatter_class": HelpFormatter}
        super().__init__(program(prog), f"{program(prog)} [flags]", *args, **kwargs)
        self.help_flag = help_flag

    def parse_known_args(  # type: ignore[override]  # argparse has overloads
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        argv = sys.argv[1:] if args is None else args
        return super().parse_known_args(self._as_defined(argv), namespace)

    def _as_defined(self, argv: Sequence[str]) -> list[str]:
        """Return a command line with its flags as they are defined."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        by_name = {flag.replace("_", "-"): flag for flag in flags}
        split = [word.partition("=") for word in argv]
        return [
            by_name.get(name.replace("_", "-"), name) + sign + rest for name, sign, rest in split
        ]

    def error(self, message: str) -> NoReturn:
        words = message.split() if message.startswith("unrecognized") else []
        unknown = [word.split("=")[0] for word in words if word.startswith("--")]
        flags = [flag for action in self._actions for flag in action.option_strings]
        near = flags_like(unknown, flags)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"{message}.{hint} All flags: {self.prog} {self.help_flag}")

    def help_on(self, word: str) -> str:
        """Return the entries of all flags with `word` in one of their names; empty where there are
        none."""
        formatter = self._get_formatter()
        formatter.add_arguments(
            [a for a in self._actions if any(word in flag for flag in a.option_strings)]
        )
        return formatter.format_help()


def parse(model: type[S], argv: Sequence[str], parser: Parser | str) -> S:
    """Read `model` from flags, over the sources it names, by a new parser (or one of the program's
    name).

    Raises UserError or pydantic's ValidationError.
    """
    if isinstance(parser, str):
        parser = Parser(prog=parser, description=model.__doc__)
    source: Any = CliSettingsSource(model, root_parser=parser)
    try:
        return CliApp.run(model, cli_args=list(argv), cli_settings_source=source)
    except (UserError, ValidationError):
        raise
    except (
        ValueError,
        StopIteration,
        RecursionError,
    ) as error:  # what pydantic-settings' own parser of values ends in
        way_out = f"All flags: {parser.prog} {parser.help_flag}"
        raise UserError(
            f"a flag's value cannot be read: {error or 'brackets or quotes'}. {way_out}"
        ) from None


def parse_flags(model: type[S], argv: Sequence[str], prog: str) -> S:
    """Read `model` from flags alone. Raises UserError with every flag that is missing or wrong."""
    try:
        return parse(model, argv, prog)
    except ValidationError as error:
        raise flag_errors(error, model, f"{program(prog)} --help") from None


def flag_errors(
    error: ValidationError, model: type[BaseSettings], help_command: str
) -> ValidationFailed:
    """Return an error with a problem for each flag of `model` that is missing or wrong.

    `help_command` lists all flags.
    """
    problems = ValidationReport(f"All flags: {help_command}")
    for row in error.errors():
        where, problem = errors.describe(row, model)
        field = model.model_fields.get(where)
        if row["type"] == "missing":
            problem = f"is needed{f': {field.description}' if field else ''}"
        if model.model_config.get("cli_kebab_case"):
            where = where.replace("_", "-")
        problems.add(f"--{where}" if row["loc"] else "settings", problem)
    return ValidationFailed(problems.rows, problems.remedies)
