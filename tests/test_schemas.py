"""Versions of the JSON files: all have one, a newer one is refused by name, an older one is brought forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cirloop import schemas
from cirloop.artifacts import Artifact, write_json, write_sealed
from cirloop.config import from_json
from cirloop.evaluation.significance import compared
from cirloop.report.terminal import metric_rows
from cirloop.types import UserError

METRICS_1 = {"R@1": {"value": 33.333, "se": 27.217}, "any correct R@5": {"value": 66.667, "se": 27.217}}
EVALUATION_1 = {
    "schema": 1, "iteration": "0", "split": "shapes_val", "queries": 3, "gallery": 66,
    "protocol": "reference not ranked, annotated target", "model": "m", "metrics": METRICS_1,
    "ranks": [["val/0", 1], ["val/1", 2], ["val/2", 40]],
}  # fmt: skip
"""As versions up to the benchmarks' loaders wrote it."""
MINED_1 = {
    "schema": 1, "iteration": 0, "strategy": {"type": "top_k", "k": 2},
    "summary": {"queries": 3, "target_first": 1, "without_candidates": 0, "queries_mined": 2, "negatives": 3},
    "negatives": [{"query": q, "image": i, "rank": 1, "score": 0.5, "target_rank": 4, "target_score": 0.4,
                   "strategy": "top_k"} for q, i in (("a", "x"), ("a", "y"), ("b", "x"))],
}  # fmt: skip


def test_every_file_of_a_run_says_its_version(finished: Path) -> None:
    """`adapter_config.json` is PEFT's."""
    found = [path for path in finished.rglob("*.json") if path.name != "adapter_config.json"]
    assert len(found) >= 11
    for path in found:
        kind = schemas.kind_of(path.name)
        assert json.loads(path.read_text())["schema"] == schemas.KINDS[kind].version, path.name
        assert schemas.read(path)["schema"] == schemas.KINDS[kind].version


@pytest.mark.parametrize("kind", schemas.KINDS)
def test_a_newer_version_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    write_sealed(tmp_path / "x.json", kind, {"schema": 7})
    with pytest.raises(UserError) as error:
        schemas.read(tmp_path / "x.json", kind)
    up_to = schemas.KINDS[kind].version
    assert (
        f"{tmp_path / 'x.json'} was written by a newer cirloop (schema 7; this version reads up to {up_to}): "
        in str(error.value)
    )


@pytest.mark.parametrize("kind", schemas.KINDS)
def test_every_older_version_has_its_steps(kind: str) -> None:
    about = schemas.KINDS[kind]
    first = min([about.version, *about.steps])
    assert sorted(about.steps) == list(range(first, about.version))


@pytest.mark.parametrize("schema", ["2", True, None, 1.0, [], -1])
def test_what_is_no_version_is_damage(schema: Any, tmp_path: Path) -> None:
    write_json(tmp_path / "evaluation_base.json", EVALUATION_1 | {"schema": schema})
    with pytest.raises(UserError, match=r"evaluation_base\.json is damaged"):
        schemas.read(tmp_path / "evaluation_base.json")


def test_an_evaluation_of_schema_1_can_be_shown_and_compared(tmp_path: Path) -> None:
    write_json(tmp_path / "evaluation_iter_0.json", EVALUATION_1)
    made = Artifact("evaluation_iter_0.json", tmp_path / "evaluation_iter_0.json", "").read()
    assert made["schema"] == 3 and made["top"] == []
    assert made["ranks"] == [["val/0", 1, 1.0], ["val/1", 2, 0.0], ["val/2", 40, 0.0]]
    assert made["metrics"] == {"recall@1": 0.33333, "any correct recall@5": 0.66667}
    assert metric_rows([made], ["recall@1"]) == [["0", "33.3 ± 27.2"]]
    [row] = compared([made, made])
    assert row["metric"] == "recall@1" and row["p"] == 1.0
    assert json.loads((tmp_path / "evaluation_iter_0.json").read_text())["schema"] == 1, "the file stays as it is"


def test_results_of_schema_1(tmp_path: Path) -> None:
    rows = [{name: value for name, value in EVALUATION_1.items() if name not in ("ranks", "schema")}]
    write_json(tmp_path / "evaluation_results.json", {"schema": 1, "results": rows})
    made = schemas.read(tmp_path / "evaluation_results.json")
    assert made["results"][0]["standard_errors"]["recall@1"] == 0.27217 and made["compared"] == []


def test_mined_negatives_of_schema_1(tmp_path: Path) -> None:
    write_json(tmp_path / "hard_negatives_iter_0.json", MINED_1)
    made = schemas.read(tmp_path / "hard_negatives_iter_0.json")
    assert made["negatives"] == MINED_1["negatives"]
    assert made["summary"]["fewer_than_k"] == 1 and made["summary"]["filled_by_fallback"] == 0


def test_an_older_file_that_lacks_its_content_is_damaged(tmp_path: Path) -> None:
    write_json(tmp_path / "evaluation_base.json", {"schema": 1, "metrics": {}})
    with pytest.raises(UserError, match=r"evaluation_base\.json is damaged \(no content of schema 1"):
        schemas.read(tmp_path / "evaluation_base.json")


def test_settings_without_a_version_are_those_of_an_older_run(finished: Path, tmp_path: Path) -> None:
    content = json.loads((finished / "config.json").read_text())
    for name in ("schema", "run", "digest"):
        del content[name]
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert from_json(tmp_path / "config.json").decisive() == from_json(finished / "config.json").decisive()


def test_a_manifest_that_is_gone_is_not_a_new_run(finished: Path, tmp_path: Path, small: Any) -> None:
    import shutil

    from cirloop import experiment

    run = shutil.copytree(finished, tmp_path / "run")
    (run / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest\.json is missing, which says what of"):
        experiment.open_run(small(run, auto_resume=True))
    assert (run / "checkpoint_iter_1").is_dir()
