"""`clip_combiner` on towers that are not CLIP's own: a small random timm network and a small random
BERT, from a directory, without the network."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from pydantic import ValidationError
from transformers import BertTokenizer

from cirloop.backbones import EmbedInput
from cirloop.backbones.clip_source import find_checkpoint
from cirloop.backbones.config import ClipCombinerSettings
from cirloop.backbones.features import VisionCache
from cirloop.retrieval.embed import embed, embed_texts
from cirloop.training.config import TrainingSettings
from cirloop.types import UserError
from tests.backbones.test_clip_combiner import (
    TEXT,
    TEXTS,
    Photos,
    gallery,
    items,
    loss_of,
    queries,
)
from tests.backbones.tiny_models import TOWERS, write_towers

CONFIG = "open_clip_config.json"


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_towers(tmp_path_factory.mktemp("pair") / "towers")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Photos:
    """Five pictures of coarse noise, of unlike sizes."""
    directory = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for number in range(5):
        pixels = draw.integers(0, 255, (4 + number, 5, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((70, 60 + 9 * number))
        picture.save(directory / f"{number}.png")
    return Photos(sorted(directory.iterdir()))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network is asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def build(directory: Path, adapter: Path | None = None, **changes: Any) -> Any:
    values = {"path": str(directory), "combiner_width": 2, "dropout": 0, **changes}
    return ClipCombinerSettings(**values).build(adapter)


def trainable(directory: Path, **changes: Any) -> Any:
    backbone = build(directory, **changes)
    backbone.make_trainable(TrainingSettings(), seed=0)
    backbone.module.train()
    return backbone


def train(backbone: Any, photos: Photos, steps: int = 2) -> list[float]:
    """The losses before each step of AdamW and after the last."""
    optimizer = torch.optim.AdamW(backbone.trainable().values(), lr=1e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(backbone, photos)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    with torch.no_grad():
        return [*losses, float(loss_of(backbone, photos))]


def texts_of(backbone: Any, texts: list[str] = TEXTS) -> torch.Tensor:
    """Text features, kept or computed from ids."""
    with torch.no_grad():
        features: torch.Tensor = backbone.module.encode_text(
            backbone.text_inputs(texts)["text"]
        ).pooled
    return features


def test_features_are_open_clips_by_its_own_calls(towers: Path, photos: Photos) -> None:
    """And a directory alone names its architecture and its preprocessing."""
    backbone = build(towers, pad_ratio=0)
    clip = find_checkpoint(str(towers / CONFIG), str(towers)).build(1)
    preprocess = PreprocessCfg(size=64, **TOWERS["preprocess_cfg"])
    transform = image_transform_v2(preprocess, is_train=False)
    pixels = torch.stack([transform(photos.load(image)) for image in photos.files])
    ids = HFTokenizer(str(towers / "text"), context_length=64)(TEXTS)
    assert isinstance(clip, open_clip.CustomTextCLIP) and ids.shape == (3, 64)
    with torch.no_grad():
        images, texts = clip.encode_image(pixels), clip.encode_text(ids)
        aligned = backbone.module.combiner.texts(texts)
    assert images.shape == (5, 256) and texts.shape == (3, 32)
    assert torch.allclose(gallery(backbone, photos), F.normalize(images, dim=-1), atol=1e-5)
    assert torch.allclose(texts_of(backbone), texts, atol=1e-5)
    assert np.allclose(embed_texts(backbone, TEXTS), F.normalize(aligned, dim=-1), atol=1e-5)
    assert (images @ images.T).std() > 0 and (texts @ texts.T).std() > 0


@pytest.mark.parametrize("project_images", [0, 24])
def test_a_vector_does_not_depend_on_its_batch(
    towers: Path, photos: Photos, project_images: int, tmp_path: Path
) -> None:
    backbone = build(towers, project_images=project_images)
    together = queries(backbone, photos)
    assert together.shape == (3, project_images or 256)
    assert torch.allclose(together.norm(dim=1), torch.ones(3), atol=1e-5)
    assert gallery(backbone, photos).shape == (5, project_images or 256)
    alone = torch.cat([queries(backbone, photos, [row]) for row in items(photos)])
    assert torch.allclose(together, alone, atol=1e-5)
    kept: Any = VisionCache(backbone, photos, tmp_path)  # type: ignore[arg-type]
    embedded = embed(backbone, kept, items(photos), 2, lambda rows, _: rows, "queries")
    assert np.allclose(embedded, together, atol=1e-5)
    # to the bit
    assert torch.equal(texts_of(backbone), texts_of(backbone, TEXTS[::-1]).flip(0))
    assert torch.equal(texts_of(backbone)[:1], texts_of(build(towers), TEXTS[:1]))


def test_kept_texts_are_those_encoded_anew_and_each_is_encoded_once(
    towers: Path, photos: Photos, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever encodes a text first: training can use what was embedded in inference mode."""
    kept, plain, anew = (trainable(towers, cache_texts=value) for value in (True, False, None))
    with torch.inference_mode():
        first = kept.text_inputs(TEXTS)["text"]
    assert first.dtype == torch.float32
    assert plain.text_inputs(TEXTS)["text"].dtype == torch.long
    assert torch.allclose(first, texts_of(plain), atol=1e-5)
    encoded: list[str] = []
    encode = kept.module.clip.text.forward
    monkeypatch.setattr(
        kept.module.clip.text, "forward", lambda ids: (encoded.append("text"), encode(ids))[1]
    )
    text_inputs = anew.text_inputs

    def forget(texts: list[str]) -> Any:
        anew._text_feature.cache_clear()
        return text_inputs(texts)

    monkeypatch.setattr(anew, "text_inputs", forget)
    assert train(kept, photos) == train(anew, photos)
    states = kept.adapter_state(), anew.adapter_state()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not encoded, "all texts were there"
    kept.text_inputs(["another text", TEXTS[0], "another text"])
    assert len(encoded) == 1


@pytest.mark.parametrize(
    ("combiner", "project_images"), [("combiner", 0), ("combiner", 24), ("sum", 24)]
)
def test_maps_are_trained_saved_and_loaded(
    towers: Path, photos: Photos, combiner: str, project_images: int, tmp_path: Path
) -> None:
    network = {"combiner": combiner, "project_images": project_images}
    backbone = trainable(towers, **network)
    names = {*backbone.trainable()}
    assert names and all(name.startswith("combiner.") for name in names)
    assert ("combiner.images.weight" in names) == bool(project_images)
    before = {name: weight.clone() for name, weight in backbone.trainable().items()}
    gallery_before = gallery(backbone, photos)
    losses = train(backbone, photos, steps=3)
    assert losses[-1] < losses[0]
    assert not [n for n, w in backbone.trainable().items() if torch.equal(w, before[n])]
    assert torch.equal(gallery(backbone, photos), gallery_before) != bool(project_images)
    backbone.module.eval()
    backbone.save_adapter(tmp_path)
    loaded = build(towers, tmp_path, **network)
    assert torch.equal(queries(loaded, photos), queries(backbone, photos))
    assert torch.equal(gallery(loaded, photos), gallery(backbone, photos))
    assert loaded.vision_key == backbone.vision_key, "the frozen features are the same"
    other = build(towers, **{**network, "project_images": 8})
    assert len({each.fingerprint for each in (loaded, backbone, other)}) == 3
    with pytest.raises(UserError, match="does not fit"):
        build(towers, tmp_path, **{**network, "project_images": 8})


def test_a_trained_text_tower_is_not_kept_and_loads_with_its_own_features(
    towers: Path, photos: Photos, tmp_path: Path
) -> None:
    backbone = trainable(towers, train_clip=True, project_images=24)
    assert backbone.text_inputs(TEXTS)["text"].dtype == torch.long
    before = texts_of(backbone)
    losses = train(backbone, photos)
    assert losses[-1] < losses[0]
    assert not torch.allclose(texts_of(backbone), before, atol=1e-4)
    backbone.save_adapter(tmp_path)
    loaded = build(towers, tmp_path, project_images=24)
    assert loaded.text_inputs(TEXTS)["text"].dtype == torch.float32
    assert torch.allclose(texts_of(loaded), texts_of(backbone), atol=1e-5)
    alone = build(towers, project_images=24)
    alone.make_trainable(TrainingSettings(trainable_patterns=("clip.text",)), seed=0)
    train(alone, photos)
    alone.save_adapter(tmp_path / "alone")
    loaded = build(towers, tmp_path / "alone", project_images=24)
    assert torch.allclose(texts_of(loaded), texts_of(alone), atol=1e-5)
    again = build(towers, project_images=24)
    tuning = TrainingSettings(trainable_patterns=("clip.text", "combiner"))
    again.make_trainable(tuning, seed=0)
    assert again.text_inputs(TEXTS)["text"].dtype == torch.long
    with pytest.raises(UserError, match=r"Leave model\.cache_texts out"):
        build(towers, cache_texts=True).make_trainable(tuning, seed=0)


def test_clips_own_texts_are_kept_where_that_is_asked_for(tmp_path: Path) -> None:
    vision = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 1, "head_width": 16}
    config = tmp_path / "clip.json"
    config.write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": TEXT}))
    plain, kept = (
        build(Path("random"), clip=str(config), cache_texts=value) for value in (None, True)
    )
    assert plain.text_inputs(TEXTS)["text"].shape == (3, 77)
    assert kept.text_inputs(TEXTS)["text"].shape == (3, 32)
    assert torch.allclose(texts_of(plain), texts_of(kept), atol=1e-5)
    assert torch.equal(texts_of(kept)[1:2], texts_of(kept, TEXTS[1:2]))


def test_signs_in_a_text_are_words_and_a_cut_text_is_named(
    towers: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = build(towers, cache_texts=False)
    (ids,) = backbone.text_inputs(["a [SEP] b [PAD] [MASK]"])["text"]
    tokenizer = backbone.tokenizer.tokenizer
    special = tokenizer.convert_tokens_to_ids(["[SEP]", "[PAD]", "[MASK]"])
    assert [int((ids == number).sum()) for number in special] == [1, 0, 0]
    exact = "a " * 62
    assert backbone.text_inputs([exact, "b"])["text"].shape == (2, 64) and not caplog.records
    backbone.text_inputs(["b", exact + "c"])
    (record,) = caplog.records
    assert "64 tokens are cut; the first has 65" in record.getMessage()


def test_the_place_of_a_directory_is_no_part_of_its_digest_but_every_file_is(
    towers: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(towers, tmp_path / "copy")
    settings = [ClipCombinerSettings(path=str(path)) for path in (towers, copy)]
    assert settings[1].clip == str(copy / CONFIG)
    digests = {each.weights_digest() for each in settings}
    assert len(digests) == 1 and settings[0].path_digests() == settings[1].path_digests()
    renamed = shutil.copytree(towers, tmp_path / "renamed")
    file = renamed / "text" / "tokenizer_config.json"
    file.write_text(file.read_text() + "\n")
    assert ClipCombinerSettings(path=str(renamed)).weights_digest() not in digests


def test_a_tokenizer_may_lie_beside_the_config_as_open_clip_has_it(
    towers: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(towers, tmp_path / "copy")
    for file in (copy / "text").glob("tokenizer*"):
        file.rename(copy / file.name)
    config = json.loads((copy / CONFIG).read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "somebody/on-the-hub"
    (copy / CONFIG).write_text(json.dumps(config))
    assert torch.equal(texts_of(build(copy)), texts_of(build(towers)))


def test_a_config_json_in_half_precision_gives_a_tower_in_float32(
    towers: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(towers, tmp_path / "copy")
    file = copy / "text" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "dtype": "float16"}))
    assert torch.equal(texts_of(build(copy)), texts_of(build(towers)))
    half = texts_of(build(towers, dtype="bfloat16"))
    assert half.dtype == torch.float32
    assert F.cosine_similarity(half, texts_of(build(towers))).min() > 0.99


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a hub's name": (
        {},
        {"hf_model_name": "roberta-base"},
        r"no .*roberta-base/config.json.*text/",
    ),
    "no tokenizer": ({}, {"hf_tokenizer_name": None}, r"hf_model_name without hf_tokenizer_name"),
    "no files of a tokenizer": ({}, {"hf_tokenizer_name": "none"}, r"no tokenizer in .*tokenizer"),
    "widths": ({"embed_dim": 48}, {}, r"needs the tower's width 32 as embed_dim, which is 48"),
    "projection": ({}, {"hf_proj_type": "none"}, r"'none'; give null, linear or mlp"),
    "pooler": ({}, {"hf_pooler_type": "median"}, r"'median'; give one of mean_pooler"),
    "length": ({}, {"context_length": 65}, r"context_length is 65; the tower has 64 positions"),
    "no image tower": ({"vision_cfg": {"timm_model_name": "resnet81"}}, {}, r"Near: resnet"),
    "an image tower of the hub": (
        {"vision_cfg": {"timm_model_name": "hf_hub:timm/resnet18"}},
        {},
        r"'hf_hub:timm/resnet18' is no model of timm's",
    ),
    "an image tower's projection": (
        {"vision_cfg": {"timm_model_name": "test_resnet", "timm_proj": "identity"}},
        {},
        r"timm_proj 'identity' is none of",
    ),
    "a decoder": ({"multimodal_cfg": {}}, {}, r"decoder"),
}


def rewrite(directory: Path, model: dict[str, Any], text: dict[str, Any]) -> Path:
    config = json.loads((directory / CONFIG).read_text())
    config["model_cfg"] |= model
    config["model_cfg"]["text_cfg"] |= text
    (directory / CONFIG).write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_in_a_config_is_said_before_anything_is_built(
    towers: Path, case: str, tmp_path: Path
) -> None:
    model, text, match = WRONG[case]
    copy = rewrite(shutil.copytree(towers, tmp_path / "copy"), model, text)
    with pytest.raises(UserError, match=match):
        ClipCombinerSettings(path=str(copy)).resolve_dir()


def test_damaged_files_and_other_towers_are_named(towers: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(towers, tmp_path / "copy")
    file = copy / "text" / "config.json"
    good = file.read_text()
    for content, match in (
        ('{"model_type": "bert"', "cannot be read"),
        ('{"model_type": "gpt2"}', "of a gpt2; open_clip has text towers of bert"),
        (json.dumps({**json.loads(good), "vocab_size": 9}), "9 and pads with 0. Give the tower's"),
        (json.dumps({**json.loads(good), "pad_token_id": 3}), "pads with 3. Give the tower's"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=match):
            build(copy, clip=str(copy / CONFIG), path="random")
    file.write_text(good)
    (copy / "text" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer in .*cannot be loaded"):
        build(copy)
    (copy / "open_clip_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"open_clip_model.safetensors cannot be read"):
        build(copy)
    with pytest.raises(UserError, match=r"layers|text_cfg.hf_model_name"):
        build(towers, clip="RN50x4")


def test_image_towers_that_give_no_vector_are_named(towers: Path, tmp_path: Path) -> None:
    vision = {"timm_model_name": "test_efficientnet", "timm_proj": "none", "timm_pool": ""}
    copy = rewrite(
        shutil.copytree(towers, tmp_path / "copy"), {"vision_cfg": {**vision, "image_size": 64}}, {}
    )
    with pytest.raises(UserError, match=r"gives \[1, 256, \d, \d\].*timm_pool"):
        build(copy)
    vision = {"timm_model_name": "test_vit_relpos", "timm_proj": "none", "image_size": 64}
    rewrite(copy, {"vision_cfg": vision}, {})
    with pytest.raises(UserError, match=r"takes no images of 64x64 pixels.*preprocess_cfg"):
        build(copy, clip=str(copy / CONFIG), path="random")


def test_combiners_that_cannot_work_say_the_way_out(towers: Path) -> None:
    with pytest.raises(UserError, match=r"256 dimensions and the text tower 32.*project_images"):
        build(towers, combiner="sum")
    with pytest.raises(UserError, match="ViT or ResNet"):
        build(towers, combiner="attention_fusion")
    for changes, match in (
        ({"train_clip": True}, "frozen"),
        ({"combiner": "attention_fusion"}, "tokens"),
    ):
        with pytest.raises(ValidationError, match=match):
            ClipCombinerSettings(cache_texts=True, **changes)


def test_a_text_tower_with_a_projection_shares_the_images_space(
    towers: Path, photos: Photos, tmp_path: Path
) -> None:
    """As in open_clip's published pairs: then `sum` works, and nothing is mapped."""
    copy = shutil.copytree(towers, tmp_path / "copy")
    vision = {**TOWERS["model_cfg"]["vision_cfg"], "timm_proj": "linear"}
    rewrite(copy, {"embed_dim": 16, "vision_cfg": vision}, {"hf_proj_type": "mlp"})
    backbone = build(copy, clip=str(copy / CONFIG), path="random", combiner="sum")
    assert queries(backbone, photos).shape == (3, 16)
    assert [*backbone.module.combiner.parameters()] == []
    row = EmbedInput(items(photos)[0].image)
    with torch.no_grad():
        image = backbone.encode_images([photos.load(row.image)])[0].tokens
    expected = F.normalize(image + texts_of(backbone, TEXTS[:1]), dim=-1)
    assert torch.allclose(queries(backbone, photos)[:1], expected, atol=1e-5)


def test_a_tokenizer_of_the_vocabulary_works_with_open_clips_own_text_tower(
    towers: Path, tmp_path: Path
) -> None:
    """As SigLIP has it; there padding is part of the text, which is not cut."""
    copy = shutil.copytree(towers, tmp_path / "copy")
    size = len(BertTokenizer.from_pretrained(towers / "text"))
    text = {"width": 32, "heads": 2, "layers": 1, "context_length": 64, "vocab_size": size}
    own = {"hf_model_name": None, "hf_tokenizer_name": "text", "pool_type": "last", **text}
    rewrite(copy, {"custom_text": True}, own)
    backbone = build(copy, clip=str(copy / CONFIG), path="random")
    assert backbone.text_inputs(TEXTS)["text"].shape == (3, 64)
    rewrite(copy, {}, {"vocab_size": size - 1})
    with pytest.raises(UserError, match="its text tower has"):
        build(copy, clip=str(copy / CONFIG), path="random")
