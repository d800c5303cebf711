"""Every command in README.md and docs/ is run, as tests/docs/documented_commands.py says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import ROOT
from tests.docs.documented_commands import ROWS, Row
from tests.docs.sandbox import PHOTOS, World

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELLS = ("sh", "bash", "console", "shell")


def commands(page: Path) -> list[str]:
    """The commands of a page's blocks of shell, a line each, and its blocks of Python."""
    out = []
    for language, block in re.findall(
        r"^```(\w+)\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE
    ):
        if language == "python":
            num = 1 + sum(command.startswith("python ") for command in out)
            out.append(f"python {f'{num} ' if num > 1 else ''}of {page.relative_to(ROOT)}")
        elif language in SHELLS:
            lines = re.sub(r"\\\n\s*", "", block).splitlines()
            out += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return out


DOCUMENTED = {command for page in PAGES for command in commands(page)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("documents"))
    yield made
    made.close()


def test_each_command_of_the_documents_is_one_row_and_each_row_is_documented() -> None:
    rows = [row.command for row in ROWS]
    assert len(DOCUMENTED) > 30 and len(rows) == len({*rows})
    assert DOCUMENTED - {*rows} == set(), (
        "tests/docs/documented_commands.py must say how these are run"
    )
    assert {*rows} - DOCUMENTED == set(), "no document has these any more"


@pytest.mark.full
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.command.replace("/", "|")[-90:])
def test_command(row: Row, world: World) -> None:
    if row.not_here:
        pytest.skip(row.not_here)
    if (what := world.wrong(row)) is not None:
        pytest.fail(what, pytrace=False)


@pytest.mark.full
def test_the_tutorial_ran_on_photographs(world: World) -> None:
    if not PHOTOS.is_dir():
        pytest.skip(f"no photographs in {PHOTOS}; the tutorial ran on drawn images")
    assert {path.suffix for path in (world.home / "photos").rglob("*.*")} == {".jpg"}


@pytest.mark.full
def test_a_command_that_fails_or_makes_nothing_is_told(world: World) -> None:
    unknown = Row(".venv/bin/python eval_iterative.py --iteration 1")
    assert "Did you mean --iterations" in (world.wrong(unknown) or "")
    assert "did not make" in (
        world.wrong(Row(".venv/bin/python eval_iterative.py --help", makes=("x",))) or ""
    )
    assert "did not say" in (
        world.wrong(Row(".venv/bin/python add_hard_negatives.py --help", says="\0")) or ""
    )
