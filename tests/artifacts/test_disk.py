"""Errors of a disk as the user reads them, and what killed writers leave behind."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
import torch

from cirloop.artifacts.atomic import write_text
from cirloop.artifacts.fs import (
    ABANDONED,
    os_error_hint,
    remove_stale_temp,
    remove_tree_quietly,
    save_tensors,
    with_filename,
)


def test_an_error_names_the_file_and_the_way_out() -> None:
    told = os_error_hint(OSError(errno.ENOSPC, "No space left on device", "/runs/a/manifest.json"))
    assert told is not None
    assert told.startswith("/runs/a/manifest.json: No space left on device. Free space there")
    moved = os_error_hint(OSError(errno.EROFS, "Read-only file system", "/a", None, "/b"))
    assert moved is not None and moved.startswith("/b: ") and "writable" in moved
    assert "shorter name" in str(
        os_error_hint(OSError(errno.ENAMETOOLONG, "File name too long", "/a"))
    )
    assert os_error_hint(OSError(errno.ENOENT, "No such file or directory", "/a")) is None


def test_a_write_that_fails_names_its_file_and_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"a\.json"):
        write_text(tmp_path / "a.json", "text")
    assert [*tmp_path.iterdir()] == []


def test_a_name_that_is_there_stays() -> None:
    with pytest.raises(FileNotFoundError, match="/no/such"), with_filename(Path("other")):
        Path("/no/such").stat()


def test_only_what_was_abandoned_is_swept(tmp_path: Path) -> None:
    for name, seconds in (
        (".a.1.tmp", 2 * ABANDONED),
        (".a.2.tmp", 0.0),
        (".b.1.tmp", 2 * ABANDONED),
        ("a", 1e6),
    ):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - seconds,) * 2)
    remove_stale_temp(tmp_path, ".a.")
    assert {path.name for path in tmp_path.iterdir()} == {".a.2.tmp", ".b.1.tmp", "a"}
    remove_stale_temp(tmp_path / "not_there")


def test_tensors_have_the_users_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        for umask in (0o022, 0o007):
            os.umask(umask)
            save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
            assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
    finally:
        os.umask(before)


def test_tensors_that_cannot_be_written_are_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a\.safetensors"):
        save_tensors(tmp_path / "none" / "a.safetensors", {"a": torch.zeros(2)})


def test_what_cannot_be_removed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr("shutil.rmtree", busy)
    remove_tree_quietly(tmp_path)
    assert f"{tmp_path} could not be removed" in caplog.text
    remove_tree_quietly(tmp_path / "not_there")
