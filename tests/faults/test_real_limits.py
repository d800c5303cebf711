"""Limits of the system itself, not injected: the size of files, a full file system, a directory of
another user."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.fault_case import REFUSED, goes_on, refused_clearly
from tests.faults.harness import Harness

NOBODY = 65534


@pytest.mark.full
@pytest.mark.parametrize(
    ("stage", "file_bytes", "names"),
    [
        ("checkpoint_iter_1", 200_000, "state.safetensors"),
        pytest.param("evaluation_iter_1.json", 600, "config.json", marks=pytest.mark.full),
        pytest.param("evaluation_base.json", 5_000, "cache/vision/", marks=pytest.mark.full),
    ],
)
def test_a_file_that_may_not_grow(
    stage: str, file_bytes: int, names: str, harness: Harness
) -> None:
    directory = harness.case(stage)
    (directory / "run" / "costs.json").unlink(missing_ok=True)  # it is written first
    ended = harness.child(directory, "run", file_bytes=file_bytes)
    assert ended.code == REFUSED, ended.said
    refused_clearly(ended.said, directory)
    assert names in ended.said and "ulimit -f" in ended.said
    goes_on(harness, directory, "run", None)


@pytest.mark.full
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_directory_of_another_user(harness: Harness) -> None:
    directory = harness.case("hard_negatives_iter_0.json")
    for each in (
        directory,
        *directory.rglob("*"),
    ):  # its ancestors let others pass, or the case cannot run
        each.chmod(0o755 if each.is_dir() else 0o644)
    shut = [each for each in directory.parents if not each.stat().st_mode & 0o001]
    for each in shut:
        each.chmod(each.stat().st_mode | 0o001)
    ended = harness.child(directory, "run", uid=NOBODY)
    assert ended.code == REFUSED, ended.said
    refused_clearly(ended.said, directory)
    assert "Make it writable" in ended.said
    goes_on(harness, directory, "run", None)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(disk)]
    if (
        os.getuid() != 0
        or shutil.which("mount") is None
        or subprocess.run(mount, check=False).returncode
    ):
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.full
@pytest.mark.parametrize(
    ("stage", "left"),
    [
        pytest.param("checkpoint_iter_1", 20_000, marks=pytest.mark.full),
        ("evaluation_iter_1.json", 0),
    ],
)
def test_a_full_disk(stage: str, left: int, small_disk: Path, harness: Harness) -> None:
    state = harness.case(stage)
    directory = small_disk / "case"
    shutil.copytree(state, directory)
    rest = shutil.disk_usage(small_disk).free
    with (small_disk / "filler").open("wb") as filler:
        filler.write(b"x" * max(0, rest - left))
    ended = harness.child(directory, "run")
    assert ended.code == REFUSED, ended.said
    if stage == "checkpoint_iter_1":  # seen before any work: the adapters do not fit
        assert "runtime.cache_dir" in ended.said and "are free" in ended.said, ended.said
    else:
        refused_clearly(ended.said, directory)
        assert "No space left on device" in ended.said and "Free space" in ended.said
    (small_disk / "filler").unlink()
    shutil.rmtree(state)
    shutil.copytree(directory, state)  # the small disk is too small for all of it
    goes_on(harness, state, "run", None)
