"""The templates of this package: chat template, code and card. Their delimiters leave Jinja's own
to what they make."""

from __future__ import annotations

from importlib.metadata import version
from importlib.resources import files
from typing import Any

import jinja2

from cirloop.io.redact import escape_control


def render(name: str, /, **values: Any) -> str:
    """Return a template with values. A value that is missing is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(
            lambda name: (files("cirloop.tools.export") / name).read_text("utf-8")
        ),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        variable_start_string="<<",
        variable_end_string=">>",
        block_start_string="<%",
        block_end_string="%>",
        comment_start_string="<#",
        comment_end_string="#>",
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        python=repr, code=code, cell=_cell, percent=_percent, installed=_installed
    )
    return environment.get_template(name).render(**values)


def code(value: object) -> str:
    """Return a value as code within a line of Markdown: nothing in it is markup, and nothing in it
    ends it."""
    text = escape_control(str(value)).replace("\n", "\\n").replace("\t", "\\t")
    runs = [len(run) for run in "".join(c if c == "`" else " " for c in text).split()]
    fence = "`" * (max(runs, default=0) + 1)
    space = " " if text.startswith("`") or text.endswith("`") or not text.strip() else ""
    return f"{fence}{space}{text}{space}{fence}"


def _cell(value: object) -> str:
    """Code in a table, where a bar would begin a cell."""
    return code(value).replace("|", "\\|")


def _percent(part: int | None, total: int) -> str:
    if part is None:
        return "not known"
    return f"{part} ({100 * part / total:.1f}%)" if total else str(part)


def _installed(package: str) -> str:
    return f"{package} {version(package)}"
