"""Other families than the run's, DoRA, parts, half precision: proven by the code of the card, on
tiny real models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from cirloop.artifacts.store import Artifact
from cirloop.backbones.config import BackboneConfig
from cirloop.tools.export.export import write_export
from cirloop.tools.export.source import ExportSource
from cirloop.training.config import TrainingSettings
from cirloop.types import UserError
from tests.backbones import tiny_models
from tests.export.conftest import source_of

FAMILIES = {
    "qwen2_5_vl": "write_qwen2_5_vl",
    "qwen3_vl": "write_qwen3_vl",
    "llava": "write_llava",
    "llava_next": "write_llava_next",
    "llava_onevision": "write_llava_onevision",
}


def trained_model(
    run: Path, base: Path, place: Path, settings: dict[str, Any], tune: str = "lora"
) -> ExportSource:
    """As if the run had trained this model: its trained weights are drawn."""
    model: Any = TypeAdapter(BackboneConfig).validate_python({"path": str(base), **settings})
    backbone: Any = model.build()
    parts = ["model.language_model.layers.0"] if tune == "full" else []
    backbone.make_trainable(
        TrainingSettings.model_validate({"finetuning": tune, "trainable_patterns": parts}), seed=0
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.trainable().values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    backbone.save_adapter(place / "checkpoint")
    return replace(
        source_of(run, "merged"),
        settings=model,
        base=base,
        checkpoint=Artifact("c", place / "checkpoint", "0" * 64),
        lora=tune != "full",
    )


def made(model: ExportSource, export_format: str, place: Path) -> str:
    """The card; the comparison is part of the making."""
    place.mkdir()
    options = model.options.model_copy(update={"format": export_format, "output": place})
    write_export(replace(model, options=options), place)
    return (place / "README.md").read_text("utf-8")


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_exported(family: str, run: Path, tmp_path: Path) -> None:
    base = getattr(tiny_models, FAMILIES[family])(tmp_path / "base")
    kind = "llava" if family.startswith("llava") else family
    prompts = "chat" if family in ("qwen2_5_vl", "llava_next") else "instruction"
    model = trained_model(
        run, base, tmp_path, {"type": kind, "dtype": "float32", "prompt_format": prompts}
    )
    card = made(model, "sentence-transformers", tmp_path / "made")
    assert ("resized by Pillow" in card) == (kind != "llava")
    if family == "llava_next":
        made(model, "adapter", tmp_path / "adapter")
        assert (tmp_path / "adapter" / "base" / "config.json").is_file()


@pytest.mark.parametrize(
    ("name", "family", "export_format"),
    [
        ("vlm2vec", "qwen2_vl", "adapter"),
        pytest.param("gme", "qwen2_vl", "merged", marks=pytest.mark.full),
        ("recall_fashioniq", "qwen2_5_vl", "merged"),
        pytest.param(
            "qwen3_vl_embedding", "qwen3_vl", "sentence-transformers", marks=pytest.mark.full
        ),
    ],
)
def test_a_prompt_format_is_exported(
    name: str, family: str, export_format: str, run: Path, tmp_path: Path
) -> None:
    base = getattr(tiny_models, f"write_{family}")(tmp_path / "base")
    model = trained_model(
        run, base, tmp_path, {"type": family, "dtype": "float32", "prompt_format": name}
    )
    card = made(model, export_format, tmp_path / "made")
    assert ('batch["position_ids"]' in card) == (name != "qwen3_vl_embedding")
    assert ("Where this says `garment`" in card) == (name == "recall_fashioniq")


@pytest.mark.full
def test_parts_trained_in_full_are_in_their_places(run: Path, tmp_path: Path) -> None:
    base = tiny_models.write_qwen2_vl(tmp_path / "base")
    model = trained_model(run, base, tmp_path, {"type": "qwen2_vl", "dtype": "float32"}, "full")
    assert "with the parts that were trained in their places" in made(
        model, "merged", tmp_path / "made"
    )


@pytest.mark.full
def test_a_dora_is_merged_in_half_precision_and_the_card_says_how_near(
    run: Path, tmp_path: Path
) -> None:
    base = tiny_models.write_qwen2_vl(tmp_path / "base")
    model = trained_model(run, base, tmp_path, {"type": "qwen2_vl", "dtype": "bfloat16"}, "dora")
    card = made(model, "merged", tmp_path / "made")
    assert "In bfloat16 merging and arithmetic round." in card and "whole model in bfloat16" in card


@pytest.mark.full
def test_an_export_with_other_vectors_is_refused(run: Path, tmp_path: Path) -> None:
    """The comparison sees another adapter, another prompt, and an image that is resized
    otherwise."""
    base = tiny_models.write_qwen2_vl(tmp_path / "base")
    model = trained_model(run, base, tmp_path, {"type": "qwen2_vl", "dtype": "float32"})
    model = replace(model, options=model.options.model_copy(update={"format": "adapter"}))
    from cirloop.tools.export import roundtrip
    from cirloop.tools.export.card import code_of
    from cirloop.tools.export.formats import write_adapter
    from cirloop.tools.export.prompt_spec import read_prompt_spec

    backbone: Any = model.settings.build(model.checkpoint.path)  # type: ignore[attr-defined]
    prompt_spec = read_prompt_spec(backbone)
    inputs = roundtrip.inputs(prompt_spec.special_tokens)
    right = roundtrip.vectors_of(backbone, inputs)
    (place := tmp_path / "made").mkdir()
    write_adapter(model, place)
    prompt_spec.save(place)
    code = code_of(model, prompt_spec)
    assert roundtrip.compare(code, str(place), inputs, right, "float32").largest < 1e-5
    for wrong in (
        (code.replace('backend="pil"', 'backend="torchvision"')),
        code.replace("sum(1) - 1", "sum(1) - 2"),
    ):
        assert wrong != code
        with pytest.raises(AssertionError, match="gives other vectors than the run"):
            roundtrip.compare(wrong, str(place), inputs, right, "float32")
    replace(prompt_spec, document=prompt_spec.document + ".").save(place)
    with pytest.raises(AssertionError, match="gives other vectors than the run"):
        roundtrip.compare(code, str(place), inputs, right, "float32")


def test_a_chat_template_that_changes_texts_is_refused(run: Path, tmp_path: Path) -> None:
    from cirloop.tools.export.prompt_spec import read_prompt_spec

    base = tiny_models.write_qwen2_vl(tmp_path / "base")
    chat = base / "chat_template.jinja"
    chat.write_text(
        chat.read_text("utf-8").replace("content['text']", "content['text'] | trim"), "utf-8"
    )
    model: Any = TypeAdapter(BackboneConfig).validate_python(
        {"type": "qwen2_vl", "path": str(base), "dtype": "float32", "prompt_format": "chat"}
    )
    with pytest.raises(UserError, match="does not hold the text as it is"):
        read_prompt_spec(model.build())
