"""The patch embedding as a product of matrices: the convolution's features, weights, names and
shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText

from cirloop.backbones import BackboneConfig
from cirloop.backbones.patches import PatchProduct, use_product
from cirloop.captioning.foundation import FoundationConfig
from cirloop.types import UserError
from tests.backbones.tiny_models import WRITERS

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    return {name: WRITERS[name](directory / name) for name in QWEN}


def pictures() -> list[Image.Image]:
    return [
        Image.effect_noise(size, 80).convert("RGB") for size in ((200, 150), (90, 260), (64, 64))
    ]


def settings(name: str, path: Path, dtype: str = "float32") -> dict[str, Any]:
    return {
        "type": name,
        "path": str(path),
        "dtype": dtype,
        "min_pixels": 64 * 64,
        "max_pixels": 128 * 128,
    }


def embedder(name: str, path: Path, dtype: str = "float32") -> Any:
    return TypeAdapter(BackboneConfig).validate_python(settings(name, path, dtype)).build()


def plain(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' own model, with its convolution."""
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype).eval()
    assert type(model.model.visual.patch_embed.proj) is nn.Conv3d
    return model


@pytest.mark.parametrize("name", QWEN)
def test_features_are_the_convolutions(name: str, models: dict[str, Path]) -> None:
    backbone, images = embedder(name, models[name]), pictures()
    captioner: Any = (
        TypeAdapter(FoundationConfig).validate_python(settings(name, models[name])).build()
    )
    prepared = backbone.prepare_images(images)
    visual = plain(models[name]).model.visual
    with torch.no_grad():
        wanted = backbone.token_features(
            visual(prepared["pixel_values"], grid_thw=prepared["image_grid_thw"])
        )
    for encoder in (backbone, captioner):
        assert isinstance(encoder.vlm.model.visual.patch_embed.proj, PatchProduct)
        made = torch.cat([vision.tokens for vision in encoder.encode_images(images)])
        assert made.shape == wanted.shape and wanted.std() > 0.1
        assert (made - wanted).abs().max() < 1e-5
    assert captioner.vision_key == backbone.vision_key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_passes_its_check(dtype: str, models: dict[str, Path]) -> None:
    for name in QWEN:
        assert isinstance(
            embedder(name, models[name], dtype).vlm.model.visual.patch_embed.proj, PatchProduct
        )


@pytest.mark.parametrize("name", QWEN)
def test_weights_keep_their_names_and_shapes(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    vlm = embedder(name, models[name]).vlm
    wanted = plain(models[name]).state_dict()
    assert [*vlm.state_dict()] == [*wanted]
    assert all(torch.equal(weight, wanted[key]) for key, weight in vlm.state_dict().items())
    vlm.save_pretrained(tmp_path)
    saved, original = (
        load_file(tmp_path / "model.safetensors"),
        load_file(models[name] / "model.safetensors"),
    )
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[key], original[key]) for key in original)


def test_features_kept_by_the_convolution_are_not_read(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = embedder("qwen2_vl", models["qwen2_vl"])
    now = backbone.vision_key
    del backbone.vision_key
    monkeypatch.setattr("cirloop.backbones.patches.VERSION", "another way")
    assert backbone.vision_key != now


@pytest.mark.parametrize("wrong", ["scaled", "not a number"])
def test_a_wrong_product_is_refused_with_both_values(
    wrong: str, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = PatchProduct.forward
    factor = {"scaled": 1.001, "not a number": float("nan")}[wrong]
    monkeypatch.setattr(PatchProduct, "forward", lambda self, input: right(self, input) * factor)
    with pytest.raises(
        UserError,
        match=r"differs from the convolution by (0\.001|nan) .* at most 1e-05 .*\n?.*dtype",
    ):
        embedder("qwen2_vl", models["qwen2_vl"])


def test_a_convolution_that_is_none_of_whole_patches_is_refused(models: dict[str, Path]) -> None:
    model = plain(models["qwen2_vl"])
    model.model.visual.patch_embed.proj.padding = (0, 1, 1)
    with pytest.raises(UserError, match="patch embedding"):
        use_product(model, "here")


def test_other_families_keep_their_towers(tmp_path: Path) -> None:
    model = plain_llava(tmp_path)
    before = {name: type(module) for name, module in model.named_modules()}
    use_product(model, "here")
    assert {name: type(module) for name, module in model.named_modules()} == before


def plain_llava(directory: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(WRITERS["llava"](directory)).eval()
