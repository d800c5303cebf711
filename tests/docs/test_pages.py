"""The documents are true: command pages as the code says, messages that the program has, links that
lead somewhere."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from tests.commands import ROOT

PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "experiments").glob("*.md")),
    ROOT / "src" / "cirloop" / "tiny" / "README.md",
]


@cache
def text_of(page: Path) -> str:
    return page.read_text("utf-8")


def prose(page: Path) -> str:
    """A page without its blocks of code, and without what stands between backticks."""
    return re.sub(
        r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    )


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    out: set[str] = set()
    blocks = re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#+ +(.*)$", blocks, re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        taken = sum(1 for each in out if re.fullmatch(rf"{re.escape(name)}(-\d+)?", each))
        out.add(f"{name}-{taken}" if taken else name)
    return out


def broken(page: Path) -> list[str]:
    """Links of a page to files, folders and headings that are not there."""
    found = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(page)) + re.findall(
        r'\bsrc="([^"]+)"', prose(page)
    )
    out = []
    for link in found:
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        goal = (page.parent / name).resolve() if name else page
        if not goal.exists() or (anchor and goal.suffix == ".md" and anchor not in anchors(goal)):
            out.append(link)
    return out


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page) == []


def test_a_planted_broken_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two`\n# Again\n# Again\n[a](#one-two) [b](#again-1) [c](#three) [d](gone.md)"
        " [e](page.md#one)\n`[f](code.md)` <img src='x' src=\"gone.png\">"
        " [g](https://example.com)\n```sh\n# no heading\n[h](code.md)\n```\n"
    )
    assert broken(page) == ["#three", "gone.md", "page.md#one", "gone.png"]


def test_every_block_of_code_says_its_language() -> None:
    """What is `sh` or `python` is run by test_commands.py; what is neither must say so."""
    bare = []
    for page in PAGES:
        if page.is_relative_to(ROOT / "docs") or page == ROOT / "README.md":
            fences = re.findall(r"^ *```(.*)$", text_of(page), re.MULTILINE)
            bare += [f"{page.name}: {fence!r}" for fence in fences[::2] if not fence.strip()]
    assert bare == []


@cache
def command_pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "command_pages", ROOT / "scripts" / "command_pages.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["command_pages"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_command_pages_are_what_the_code_says() -> None:
    made: dict[str, str] = command_pages().pages()
    there = {
        path.name: path.read_text("utf-8") for path in (ROOT / "docs" / "commands").glob("*.md")
    }
    assert {*made} == {*there}
    assert [name for name in made if made[name] != there[name]] == [], (
        "run python scripts/command_pages.py"
    )


def test_pages_have_every_flag_of_the_parser_and_no_other() -> None:
    pages = command_pages()
    for command in pages.COMMANDS:
        text = pages.page(command)
        listed = set(
            re.findall(
                r"`(--?[\w.-]+)`",
                "\n".join(re.findall(r"^\| ((?:`-[^|]*`)+) \|", text, re.MULTILINE)),
            )
        )
        known: set[str] = set()
        for name in command.models.values():
            module, _, kind = name.partition(":")
            known |= pages.parsed(getattr(importlib.import_module(module), kind))
        assert listed <= known, command.page
        whole = {
            flag for flag in known if any(each.startswith(f"{flag}.") for each in known)
        }  # a group as JSON
        assert known - whole - listed <= {"-h", "--help"}, command.page


def strings(path: Path) -> list[str]:
    """What a Python file's strings say, `…` for values."""
    out = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.JoinedStr):
            out.append(
                "".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values)
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            out.append(re.sub(r"%\.?\d*[sdgfr]", "…", node.value))
        elif (
            isinstance(node, ast.BinOp)
            and isinstance(node.op, ast.Add)
            and isinstance(node.left, ast.Constant)
        ):
            out.append(str(node.left.value))
    return out


@cache
def sayings() -> tuple[str, ...]:
    files = sorted((ROOT / "src" / "cirloop").rglob("*.py"))
    said = [re.sub(r"\s+", " ", text) for file in files for text in strings(file)]
    return (*said, (ROOT / "scripts" / "setup_env.sh").read_text("utf-8"))


def says(text: str, message: str) -> bool:
    """Whether a string of the sources says the fixed parts of a message, in their order."""
    fixed = [part.strip() for part in message.split("…") if part.strip(" .:,;()'")]
    return bool(fixed) and re.search(".*?".join(map(re.escape, fixed)), text, re.DOTALL) is not None


QUOTED = re.findall(r"^> `(.*)`$", text_of(ROOT / "docs" / "troubleshooting.md"), re.MULTILINE)


@pytest.mark.parametrize("message", QUOTED)
def test_troubleshooting_quotes_what_the_program_says(message: str) -> None:
    assert any(says(text, message) for text in sayings())


def test_troubleshooting_has_each_message_once_and_all_quotes_are_looked_at() -> None:
    text = text_of(ROOT / "docs" / "troubleshooting.md")
    assert len(QUOTED) == len({*QUOTED}) == len(re.findall(r"^>", text, re.MULTILINE)) >= 25


def test_a_message_nobody_says_is_seen() -> None:
    assert not any(says(text, "the … of … is not what it was") for text in sayings())
    assert not any(says(text, "…: …") for text in sayings())
