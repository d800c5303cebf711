"""What holds for every data set of the union."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, get_args

import pytest

from cirloop.cli import runner
from cirloop.data import DataConfig
from cirloop.data.cirr import CirrSettings
from cirloop.stages.preflight import check
from cirloop.types import EvalProtocol
from cirloop.validation import ValidationFailed
from tests.fake_datasets import (
    write_circo,
    write_cirr,
    write_fashioniq,
    write_hp_fashioniq,
    write_huggingface,
    write_jsonl,
)
from tests.tiers import one_in

MEMBERS = get_args(get_args(DataConfig)[0])


@pytest.mark.parametrize(
    "settings", MEMBERS, ids=lambda settings: settings.model_fields["type"].default
)
def test_each_says_how_its_rankings_are_scored(settings: Any) -> None:
    protocol = settings.protocol
    assert isinstance(protocol, EvalProtocol) and protocol.description
    assert protocol.primary_metric in protocol.reported
    assert list(protocol.cutoffs) == sorted(set(protocol.cutoffs)) and protocol.cutoffs[0] >= 1


def test_one_without_a_protocol_is_refused_before_a_run(small: Any, tmp_path: Path) -> None:
    class Unfinished(CirrSettings):
        protocol: ClassVar[Any] = None

    config = small(tmp_path / "run").model_copy(update={"data": Unfinished(), "data_dir": tmp_path})
    with pytest.raises(ValidationFailed, match=r"data\.type cirr: has no protocol"):
        check(config)


COLUMNS = {"reference": "query_image", "text": "modification", "target": "target_image"}
DATA_SETS: dict[str, tuple[dict[str, Any], Callable[[Path], Path] | None]] = {
    "jsonl": ({}, write_jsonl),
    "cirr": ({}, write_cirr),
    "circo": ({"train": {"type": "cirr"}}, write_circo),
    "fashioniq": ({}, write_fashioniq),
    "hp_fashioniq": ({}, write_hp_fashioniq),
    "huggingface": ({"columns": COLUMNS}, write_huggingface),
    "shapes": ({"train_families": 4, "train_triplets": 24, "eval_families": 3}, None),
}
"""Every data set by its type: the settings of a small copy, and what writes its files."""


def test_every_data_set_has_a_small_copy() -> None:
    assert {settings.model_fields["type"].default for settings in MEMBERS} == DATA_SETS.keys()


@pytest.mark.parametrize("name", one_in(len(DATA_SETS), DATA_SETS))
def test_each_is_loaded_mined_trained_on_and_evaluated(
    name: str, small: Any, tmp_path: Path
) -> None:
    settings, write_files = DATA_SETS[name]
    directories = {"data_dir": write_files(tmp_path / "data")} if write_files else {}
    if name == "circo":
        directories["train_dir"] = write_cirr(tmp_path / "cirr")
    training = {"iteration_0_steps": 1, "steps_per_iteration": 1, "batch_size": 4}
    config = small(
        tmp_path / "run", data={"type": name, **settings}, training=training, **directories
    )
    results = runner.run(config)
    assert [result["iteration"] for result in results] == ["base", "0", "1"]
    assert config.data.protocol.primary_metric in results[-1]["metrics"]
    mined = json.loads((tmp_path / "run/hard_negatives_iter_0.json").read_text("utf-8"))
    assert mined["negatives"]
