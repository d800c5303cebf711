"""The Qwen2-VL embedder against transformers' own calls, and its promises about adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLForConditionalGeneration

from cirloop.backbones import EmbedInput, Qwen2VLSettings
from cirloop.backbones.features import VisionCache
from cirloop.backbones.qwen2_vl import IMAGE
from cirloop.backbones.weights import LORA_WEIGHTS, resolve
from cirloop.data import ShapesSettings
from cirloop.training.config import TrainingSettings
from cirloop.types import UserError

SETTINGS = Qwen2VLSettings(dtype="float32")


@pytest.fixture(scope="module")
def train() -> Any:
    return ShapesSettings(train_families=2, train_triplets=10, eval_families=2).build().train


@pytest.fixture(scope="module")
def backbone() -> Any:
    return SETTINGS.build()


def embed(backbone: Any, items: list[EmbedInput], features: VisionCache) -> torch.Tensor:
    backbone.module.eval()
    with torch.no_grad():
        vectors: torch.Tensor = backbone.module(
            backbone.inputs(items, features.get([i.image for i in items]))
        )
    return vectors


def items_of(train: Any) -> list[EmbedInput]:
    return [EmbedInput(t.query.reference, t.query.text) for t in train.triplets[:4]] + [
        EmbedInput(train.gallery.ids[0])
    ]


def test_embeddings_equal_the_librarys_own_forward_pass(
    backbone: Any, train: Any, tmp_path: Path
) -> None:
    """The cached vision path, its placing and its positions against `Qwen2VLModel` fed with
    pixels."""
    items = items_of(train)
    ours = embed(backbone, items, VisionCache(backbone, train.images, tmp_path))
    for item, vector in zip(items, ours, strict=True):
        text = (
            f"{IMAGE}\nRepresent the given image."
            if item.text is None
            else (
                f"{IMAGE}\nGiven an image, find a similar everyday image with the described"
                f" changes: {item.text}"
            )
        )
        batch = backbone.processor(
            text=[text], images=[train.images.load(item.image)], return_tensors="pt"
        )
        with torch.no_grad():
            hidden = backbone.vlm.model(**batch, use_cache=False).last_hidden_state[0, -1]
        assert torch.allclose(vector, hidden / hidden.norm(), atol=1e-5)


def test_padding_does_not_change_an_embedding(backbone: Any, train: Any, tmp_path: Path) -> None:
    items, features = items_of(train), VisionCache(backbone, train.images, tmp_path)
    alone = torch.cat([embed(backbone, [item], features) for item in items])
    assert torch.allclose(embed(backbone, items, features), alone, atol=1e-5)
    assert torch.allclose(alone.norm(dim=1), torch.ones(len(items)), atol=1e-5)


def test_cached_features_are_the_computed_ones_and_are_not_computed_again(
    backbone: Any, train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = list(train.gallery.ids)
    first = VisionCache(backbone, train.images, tmp_path).get(ids)

    def refuse(images: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(backbone, "encode_images", refuse)
    again = VisionCache(backbone, train.images, tmp_path).get(ids)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.tokens, b.tokens) and a.grid == b.grid


def test_a_damaged_feature_shard_is_made_again(backbone: Any, train: Any, tmp_path: Path) -> None:
    first = VisionCache(backbone, train.images, tmp_path).get(train.gallery.ids[:3])
    tokens = [
        each.tokens.clone() for each in first
    ]  # they are mapped from the file that is damaged next
    (shard,) = tmp_path.rglob("*.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-40] + bytes(40))
    again = VisionCache(backbone, train.images, tmp_path).get(train.gallery.ids[:3])
    assert all(torch.equal(a, b.tokens) for a, b in zip(tokens, again, strict=True))
    assert [each.grid for each in first] == [each.grid for each in again]
    assert shard.read_bytes() == whole


def test_another_pixel_budget_has_other_features(backbone: Any) -> None:
    small = SETTINGS.model_copy(update={"max_pixels": 56 * 56}).build()
    assert small.vision_key != backbone.vision_key
    assert small.fingerprint != backbone.fingerprint


def test_the_pixel_budget_is_kept(train: Any) -> None:
    small = SETTINGS.model_copy(update={"max_pixels": 56 * 56}).build()
    (vision,) = small.encode_images([train.images.load(train.gallery.ids[0])])
    assert vision.grid[1] * vision.grid[2] * 14 * 14 <= 56 * 56


def trained(directory: Path) -> Any:
    """A backbone whose adapter was moved by hand, and saved in `directory`."""
    backbone: Any = SETTINGS.build()
    backbone.make_trainable(TrainingSettings(), seed=1)
    with torch.no_grad():
        for name, parameter in backbone.trainable().items():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(len(name)))
    backbone.save_adapter(directory)
    return backbone


def test_lora_is_on_the_language_model_alone(tmp_path: Path) -> None:
    backbone = trained(tmp_path)
    names = backbone.trainable()
    assert len(names) == backbone.vlm.config.text_config.num_hidden_layers * 7 * 2
    assert all("language_model" in name and "visual" not in name for name in names)


def test_a_saved_adapter_loads_with_the_same_embeddings(
    backbone: Any, train: Any, tmp_path: Path
) -> None:
    made = trained(tmp_path / "a")
    loaded = SETTINGS.build(tmp_path / "a")
    features = VisionCache(backbone, train.images, tmp_path / "cache")
    items = items_of(train)
    assert torch.equal(embed(made, items, features), embed(loaded, items, features))
    assert not torch.allclose(
        embed(loaded, items, features), embed(backbone, items, features), atol=1e-3
    )
    assert loaded.fingerprint != backbone.fingerprint
    assert loaded.vision_key == backbone.vision_key


def test_peft_alone_loads_a_saved_adapter_with_the_same_embedding(
    train: Any, tmp_path: Path
) -> None:
    made = trained(tmp_path / "a")
    (item,) = items_of(train)[:1]
    ours = embed(made, [item], VisionCache(made, train.images, tmp_path / "cache"))[0]
    base = Qwen2VLForConditionalGeneration.from_pretrained(
        resolve("tiny", "qwen2_vl"), dtype=torch.float32
    )
    model = PeftModel.from_pretrained(base, str(tmp_path / "a")).eval()
    text = (
        f"{IMAGE}\nGiven an image, find a similar everyday image with the described changes:"
        f" {item.text}"
    )
    batch = made.processor(text=[text], images=[train.images.load(item.image)], return_tensors="pt")
    with torch.no_grad():
        hidden = model.get_base_model().model(**batch, use_cache=False).last_hidden_state[0, -1]
    assert torch.allclose(ours, hidden / hidden.norm(), atol=1e-5)


def test_an_adapter_with_other_keys_is_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    state = load_file(tmp_path / LORA_WEIGHTS)
    state.pop(sorted(state)[0])
    save_file(state, tmp_path / LORA_WEIGHTS)
    with pytest.raises(UserError, match="keys or shapes differ"):
        SETTINGS.build(tmp_path)


def test_an_adapter_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    backbone: Any = SETTINGS.build()
    backbone.make_trainable(TrainingSettings(), seed=1)
    backbone.save_adapter(tmp_path)
    with pytest.raises(UserError, match="changes nothing"):
        SETTINGS.build(tmp_path)


@pytest.mark.parametrize("path", ["/nowhere/model", "./not-here"])
def test_a_missing_model_path_says_the_way_out(path: str) -> None:
    with pytest.raises(UserError, match="tiny"):
        SETTINGS.model_copy(update={"path": path}).build()


def test_a_directory_that_is_no_model_names_all_that_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError) as error:
        SETTINGS.model_copy(update={"path": str(tmp_path)}).build()
    for problem in ("bert", "tokenizer_config.json", "safetensors", "preprocessor_config.json"):
        assert problem in str(error.value)
