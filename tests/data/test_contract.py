"""What holds for every data set of the union."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, get_args

import pytest

from cirloop.data import DataConfig
from cirloop.data.cirr import CirrSettings
from cirloop.stages.preflight import check
from cirloop.types import EvalProtocol
from cirloop.validation import ValidationFailed
from tests.fake_datasets import DATA_SETS
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


def test_every_data_set_has_a_small_copy() -> None:
    assert {settings.model_fields["type"].default for settings in MEMBERS} == DATA_SETS.keys()


@pytest.mark.parametrize("name", one_in(len(DATA_SETS), DATA_SETS))
def test_each_is_loaded_mined_trained_on_and_evaluated(name: str, run_on: Any) -> None:
    made = run_on(name)
    assert [result["iteration"] for result in made.results] == ["base", "0", "1"]
    (settings,) = (one for one in MEMBERS if one.model_fields["type"].default == name)
    assert settings.protocol.primary_metric in made.results[-1]["metrics"]
    mined = json.loads((made.run / "hard_negatives_iter_0.json").read_text("utf-8"))
    assert mined["negatives"]
