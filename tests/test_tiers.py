"""The tiers: what run_tests.sh and .ci/run ask of pytest, and samples that are what they say."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import settings

from tests.commands import ROOT
from tests.tiers import in_share, one_in

WORDS = "-m|pytest|-n|2|--dist|worksteal|"


def asked(directory: Path, program: str, *arguments: str) -> str:
    """What a program gives to Python at its end, in a checkout where everything is installed and
    the check passes."""
    (directory / "scripts").mkdir()
    for name in ("run_tests.sh", ".ci/run"):
        (directory / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, directory / name)
    for name, text in (
        ("python", '#!/bin/bash\nIFS="|"\necho "$*"\n'),
        ("chromium", "#!/bin/bash\n"),
        ("scripts/check.sh", "#!/bin/bash\n"),
        (
            "scripts/setup_env.sh",
            f"setup_env() {{ root='{directory}' python='{directory}/python'; }}\n",
        ),
    ):
        (directory / name).write_text(text)
        (directory / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{directory}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", str(directory / program), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ([], ""),
        (["--full"], "-m|not gpu|--hypothesis-profile|full"),
        (
            ["tests/data", "--full", "-k", "a or b"],
            "tests/data|-m|not gpu|--hypothesis-profile|full|-k|a or b",
        ),
        (["-m", "gpu"], "-m|gpu"),
    ],
)
def test_arguments_go_on_to_pytest(arguments: list[str], given: str, tmp_path: Path) -> None:
    assert asked(tmp_path, "run_tests.sh", *arguments) == (WORDS + given).rstrip("|")


def test_continuous_integration_takes_a_share_of_the_full_tier(tmp_path: Path) -> None:
    said = asked(tmp_path, ".ci/run")
    assert said.startswith(f"{WORDS}-m|not gpu|--full_share|") and int(said.rpartition("|")[2]) > 1


def test_a_share_is_of_its_size_and_one_in_one_is_all() -> None:
    names = [f"tests/faults/test_kills.py::test_killed[case {number}]" for number in range(1000)]
    for every in (2, 4, 10):
        assert 0.8 / every < sum(in_share(name, every) for name in names) / len(names) < 1.2 / every
    assert all(in_share(name, 1) for name in names)


def test_a_sample_begins_with_the_first_and_the_rest_is_full() -> None:
    cases = one_in(3, "ab", [1, 2])
    assert [(case.values, case.id, bool(case.marks)) for case in cases] == [
        (("a", 1), "a-1", False),
        (("a", 2), "a-2", True),
        (("b", 1), "b-1", True),
        (("b", 2), "b-2", False),
    ]


def test_property_tests_have_as_many_examples_as_their_tier_says() -> None:
    few, many = settings.get_profile("default"), settings.get_profile("full")
    assert (few.max_examples, few.derandomize) == (30, True)
    assert (many.max_examples, many.derandomize, many.print_blob) == (500, False, True)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        words = [
            word
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
            if isinstance(node, ast.Call)
            for word in node.keywords
        ]
        assert not {word.arg for word in words} & {"max_examples", "derandomize"}, path
