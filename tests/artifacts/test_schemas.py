"""Versions of the JSON files: all have one, and another one is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cirloop.artifacts import schema
from cirloop.artifacts.atomic import write_checked, write_json
from cirloop.types import UserError


def test_every_file_of_a_run_says_its_version(finished: Path) -> None:
    """`adapter_config.json` is PEFT's."""
    found = [path for path in finished.rglob("*.json") if path.name != "adapter_config.json"]
    assert len(found) >= 11
    for path in found:
        kind = schema.kind_of(path.name)
        assert json.loads(path.read_text())["schema"] == schema.SCHEMAS[kind].version, path.name
        assert schema.read(path)["schema"] == schema.SCHEMAS[kind].version


@pytest.mark.parametrize("kind", schema.SCHEMAS)
@pytest.mark.parametrize("version", [-1, 0, 7])
def test_another_version_is_refused_by_name(kind: str, version: int, tmp_path: Path) -> None:
    write_checked(tmp_path / "x.json", kind, {"schema": version})
    with pytest.raises(UserError) as error:
        schema.read(tmp_path / "x.json", kind)
    about = schema.SCHEMAS[kind]
    assert (
        f"{tmp_path / 'x.json'} was written by another version of cirloop (schema {version}; this"
        f" one reads {about.version}). Use that version, or: {about.remedy}" == str(error.value)
    )


@pytest.mark.parametrize(
    "content", [{"schema": each} for each in ("2", True, None, 1.0, [])] + [{}]
)
def test_what_is_no_version_is_damage(content: dict[str, Any], tmp_path: Path) -> None:
    write_json(tmp_path / "evaluation_base.json", content)
    with pytest.raises(UserError, match=r"evaluation_base\.json is damaged"):
        schema.read(tmp_path / "evaluation_base.json")


def test_a_manifest_that_is_gone_is_not_a_new_run(
    finished: Path, tmp_path: Path, small: Any
) -> None:
    import shutil

    from cirloop.cli import runner

    run = shutil.copytree(finished, tmp_path / "run")
    (run / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest\.json is missing, which says what of"):
        runner.open_run(small(run, auto_resume=True))
    assert (run / "checkpoint_iter_1").is_dir()
