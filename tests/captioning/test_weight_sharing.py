"""Captions on the embedder's weights are those of a model of its own, and the embedder is left as
it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from cirloop.backbones import BackboneConfig, EmbedInput
from cirloop.backbones.features import VisionCache
from cirloop.captioning.base import CaptionRequest
from cirloop.captioning.batched_captioner import BatchedCaptioner
from cirloop.captioning.config import CaptioningSettings
from cirloop.captioning.foundation import FoundationConfig
from cirloop.training.config import TrainingSettings
from tests.backbones.tiny_models import WRITERS
from tests.captioning.photographs import photographs

FOUNDATION: Any = TypeAdapter(FoundationConfig)
BACKBONE: Any = TypeAdapter(BackboneConfig)
SETTINGS = CaptioningSettings()
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava")


def directory_of(family: str, directory: Path) -> str:
    return "tiny" if family == "qwen2_vl" else str(WRITERS[family](directory / family))


def moved(backbone: Any, finetuning: str = "lora") -> Any:
    """The embedder with a fresh trainable part, moved far from where it changes nothing."""
    backbone.make_trainable(TrainingSettings(finetuning=finetuning), seed=1)
    with torch.no_grad():
        for name, parameter in backbone.trainable().items():
            if "lora_A" not in name:
                drawn = torch.Generator().manual_seed(len(name))
                parameter.add_(torch.randn(parameter.shape, generator=drawn) * 0.05)
    return backbone


@pytest.fixture(scope="module", params=FAMILIES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Settings of a foundation model, an embedder on the same base with a LoRA that was moved, and
    photographs."""
    directory = tmp_path_factory.mktemp("lending")
    family: str = request.param
    base = {"type": family, "path": directory_of(family, directory), "dtype": "float32"}
    images, ids = photographs(3, directory)
    requests = [
        CaptionRequest(ids[0], ids[1], "make it red"),
        CaptionRequest(ids[1], ids[2], "with a longer hem and no sleeves"),
    ]
    packed = family in ("qwen2_5_vl", "llava")  # which captions know nothing of
    embedder = moved(BACKBONE.validate_python({**base, "packed": packed}).build())
    return FOUNDATION.validate_python(base), embedder, images, ids, requests


def captions(captioner: Any, images: Any, requests: list[CaptionRequest], cache: Path) -> Any:
    eyes = BatchedCaptioner(captioner, images, cache, 4, lambda b, _: b)
    prompts = SETTINGS.prompts(captioner.settings)
    return (
        eyes.generate(prompts.rewrite, requests, 8, [0.0, 1.5], 3, "test"),
        eyes.yes_probability(prompts.verify, requests, "test"),
    )


def embedded(backbone: Any, images: Any, ids: Any, cache: Path) -> torch.Tensor:
    items = [EmbedInput(ids[0], "make it red"), EmbedInput(ids[1])]
    backbone.module.eval()
    with torch.no_grad():
        vision = VisionCache(backbone, images, cache).get([item.image for item in items])
        vectors: torch.Tensor = backbone.module(backbone.inputs(items, vision))
    return vectors


def test_captions_are_those_of_a_model_of_its_own(both: Any, tmp_path: Path) -> None:
    foundation, embedder, images, ids, requests = both
    before = embedded(embedder, images, ids, tmp_path / "e")
    captioner, own = foundation.build(embedder), foundation.build()
    assert captioner.vlm is embedder.vlm and own.vlm is not embedder.vlm
    shared = captions(captioner, images, requests, tmp_path / "a")
    assert shared == captions(own, images, requests, tmp_path / "b")
    assert captioner.fingerprint == own.fingerprint
    assert getattr(captioner, "vision_key", None) == getattr(own, "vision_key", None)
    after = embedded(embedder, images, ids, tmp_path / "e")
    assert torch.equal(after, before), "the adapter did not come back"


def test_the_adapter_would_show_if_it_stayed_on(
    both: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foundation, embedder, images, _, requests = both
    right = captions(foundation.build(), images, requests, tmp_path)
    monkeypatch.setattr(embedder, "set_adapter_enabled", lambda on: None)
    assert captions(foundation.build(embedder), images, requests, tmp_path)[1] != right[1]


def test_training_goes_on_where_it_was(both: Any, tmp_path: Path) -> None:
    foundation, embedder, images, _, requests = both
    embedder.vlm.train()
    learning = set(embedder.trainable())
    assert learning
    captions(foundation.build(embedder), images, requests, tmp_path)
    assert set(embedder.trainable()) == learning
    assert embedder.vlm.training and all(module.training for module in embedder.vlm.modules())
    embedder.vlm.eval()


def test_an_adapter_that_was_off_stays_off(both: Any, tmp_path: Path) -> None:
    foundation, embedder, images, ids, requests = both
    on = embedded(embedder, images, ids, tmp_path)
    embedder.set_adapter_enabled(False)
    off = embedded(embedder, images, ids, tmp_path)
    captions(foundation.build(embedder), images, requests, tmp_path)
    assert torch.equal(embedded(embedder, images, ids, tmp_path), off)
    embedder.set_adapter_enabled(True)
    assert torch.equal(embedded(embedder, images, ids, tmp_path), on) and not torch.equal(on, off)


TINY = {"type": "qwen2_vl", "path": "tiny", "dtype": "float32"}


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": "bfloat16"},
        {"attention": "eager"},
        {"type": "generic"},
        {"type": "template", "path": ""},
    ],
)
def test_another_form_of_the_model_is_loaded_for_itself(other: dict[str, Any]) -> None:
    model, foundation = BACKBONE.validate_python(TINY), {**TINY, **other}
    if foundation["type"] == "template":
        foundation = {"type": "template"}
    settings = FOUNDATION.validate_python(foundation)
    assert not settings.shares_base_with(model)
    assert getattr(settings.build(model.build()), "shared_embedder", None) is None


def test_another_models_weights_are_loaded_for_themselves(tmp_path: Path) -> None:
    other = FOUNDATION.validate_python({**TINY, "path": str(WRITERS["qwen2_vl"](tmp_path))})
    embedder = BACKBONE.validate_python(TINY).build()
    assert other.build(embedder).vlm is not embedder.vlm


def test_another_pixel_budget_is_the_captioners_own() -> None:
    small = FOUNDATION.validate_python({**TINY, "max_pixels": 56 * 56})
    embedder = BACKBONE.validate_python(TINY).build()
    captioner = small.build(embedder)
    assert captioner.vlm is embedder.vlm and captioner.vision_key != embedder.vision_key


def test_what_was_trained_in_full_is_not_lent() -> None:
    """Parts trained in full cannot be switched off."""
    embedder = moved(BACKBONE.validate_python(TINY).build(), finetuning="full")
    assert FOUNDATION.validate_python(TINY).build(embedder).vlm is not embedder.vlm
