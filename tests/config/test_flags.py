"""A command is given what its flags say: variables of the environment that have a setting's name
are not for it."""

from __future__ import annotations

import pytest

from cirloop.cli.evaluate import EvalConfig
from cirloop.cli.mine_embeddings import EmbeddingMiningConfig
from cirloop.config import cli
from cirloop.tools.add_negatives.config import AddNegativesConfig
from cirloop.tools.demo.command import DemoConfig
from cirloop.tools.export.config import ExportConfig
from cirloop.tools.export_embeddings import ExportConfig as VectorsConfig
from cirloop.tools.search.command import SearchConfig

VECTORS = (
    "--query-embeddings q.npy --gallery-embeddings g.npy --targets t.npy --output o.json".split()
)
GIVEN: dict[type[cli.Flags], list[str]] = {
    EvalConfig: ["--experiment_dir", "run"],
    VectorsConfig: ["--experiment_dir", "run", "--iteration", "1", "--output", "o"],
    ExportConfig: ["--experiment_dir", "run", "--iteration", "1", "--format", "merged"],
    SearchConfig: ["--experiment_dir", "run"],
    DemoConfig: ["--experiment_dir", "run"],
    EmbeddingMiningConfig: VECTORS,
    AddNegativesConfig: ["--image-dir", "i", "--annotations", "a.json", "--output", "o.json"],
}


@pytest.mark.parametrize("model", GIVEN, ids=lambda model: model.__module__)
def test_the_environment_sets_nothing(
    model: type[cli.Flags], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = cli.parse(model, GIVEN[model], "command")
    for name in model.model_fields:
        monkeypatch.setenv(name.upper(), "7")
    assert cli.parse(model, GIVEN[model], "command") == expected
