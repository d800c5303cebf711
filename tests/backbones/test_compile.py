"""Compiled layers against plain ones: the same embeddings, dropout and gradients, names, and no new
compilation for other lengths; and what differs or cannot be compiled is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from cirloop.backbones import vlm
from cirloop.backbones.base import LoraSettings
from cirloop.training.config import TrainingSettings
from cirloop.types import UserError
from tests.backbones.test_packed import ITEMS, embed, embed_eval, seen_by
from tests.backbones.test_vlm import settings
from tests.backbones.tiny_models import write_qwen2_vl

DROPPING = TrainingSettings(lora=LoraSettings(r=4, alpha=8, dropout=0.2))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"qwen2_vl": write_qwen2_vl(tmp_path_factory.mktemp("models") / "qwen2_vl")}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    """What other tests compiled counts towards torch's limit of compilations."""
    torch._dynamo.reset()


def trained(backbone: Any) -> Any:
    backbone.make_trainable(DROPPING, seed=1)
    with torch.no_grad():
        for name, weight in backbone.trainable().items():
            if "lora_B" in name:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    backbone.module.train()
    return backbone


def step(backbone: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Vectors without and with a graph from the same dropout, as gradient caching needs them, and
    gradients."""
    inputs = backbone.inputs(ITEMS, seen_by(backbone))
    with torch.no_grad():
        torch.manual_seed(7)
        first = backbone.module(inputs)
    torch.manual_seed(7)
    again = backbone.module(inputs)
    (again @ first.roll(1, 0).T).diagonal().sum().backward()
    return (
        first,
        again.detach(),
        {name: weight.grad for name, weight in backbone.trainable().items()},
    )


@pytest.mark.full
@pytest.mark.parametrize(("packed", "checkpointing"), [(True, False), (False, True)])
def test_compiled_layers_give_what_plain_ones_give(
    packed: bool, checkpointing: bool, models: dict[str, Path], tmp_path: Path
) -> None:
    more = {"packed": packed, "gradient_checkpointing": checkpointing}
    plain, compiled = (
        settings("qwen2_vl", models, compile=on, **more).build() for on in (False, True)
    )
    assert counters["stats"]["unique_graphs"] > 0
    with torch.inference_mode():
        for rows in ([0, 1, 2, 3], [2, 0], [1, 3, 3]):
            assert torch.allclose(embed(compiled, rows), embed(plain, rows), atol=1e-5)
    for backbone in (plain, compiled):
        trained(backbone)
    plain.module.skips_unread = False  # as with compiled layers: dropout draws for every token
    wanted, made = step(plain), step(compiled)
    assert torch.allclose(made[0], made[1], atol=1e-6)
    assert torch.allclose(made[0], wanted[0], atol=1e-5), "another dropout was drawn"
    assert made[2].keys() == wanted[2].keys()
    assert all(torch.allclose(made[2][n], grad, atol=1e-5) for n, grad in wanted[2].items())
    compiled.save_adapter(tmp_path)
    loaded = settings("qwen2_vl", models, packed=packed).build(tmp_path)
    assert torch.allclose(embed_eval(loaded), embed_eval(compiled), atol=1e-5)


@pytest.mark.full
def test_other_lengths_compile_nothing_anew(models: dict[str, Path]) -> None:
    backbone = settings("qwen2_vl", models, compile=True, packed=True).build()
    with torch.inference_mode():
        embed(backbone, [0, 1])
        with torch.compiler.set_stance("fail_on_recompile"):
            made = [embed(backbone, rows) for rows in ([2, 3], [1, 1, 3], [0, 1, 2, 3])]
    assert all(torch.isfinite(each).all() for each in made)


def scaled(language_model: Any) -> None:
    """Compiled to something else: what each layer gives is a tenth too large."""

    def backend(graph: Any, _: Any) -> Any:
        return lambda *given: [
            out * 1.1 if torch.is_floating_point(out) else out for out in graph(*given)
        ]

    for layer in language_model.layers:
        layer.compile(dynamic=True, backend=backend)


@pytest.mark.full
def test_layers_compiled_to_something_else_are_refused(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vlm, "compile_layers", scaled)
    said = r"model.compile changes embeddings: by .* Set model.compile false"
    with pytest.raises(UserError, match=said):
        settings("qwen2_vl", models, compile=True).build()


@pytest.mark.full
def test_without_a_compiler_the_way_out_is_said(models: dict[str, Path]) -> None:
    import torch._inductor.config as inductor

    said = r"torch.compile does not work here: (.|\n)*g\+\+(.|\n)*model.compile false"
    missing = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    with inductor.patch(missing), pytest.raises(UserError, match=said):
        settings("qwen2_vl", models, compile=True).build()
