"""CLIP with combiners against open_clip's own calls and plain computations, on tiny CLIPs with
drawn weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from cirloop.artifacts.store import file_digest
from cirloop.backbones import EmbedInput
from cirloop.backbones.clip_source import find_checkpoint
from cirloop.backbones.combiners import AttentionFusion, ClipFeatures, Combiner
from cirloop.backbones.config import ClipCombinerSettings
from cirloop.backbones.features import VisionCache
from cirloop.training.config import TrainingSettings
from cirloop.types import ImageId, UserError

PHOTOS = Path(__file__).resolve().parents[3] / "shared" / "data" / "photos"
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
CLIPS: dict[str, dict[str, Any]] = {
    "vit": {"image_size": 32, "patch_size": 8, "width": 48, "layers": 2, "head_width": 16},
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32},
}
TEXTS = [
    "is red and has long sleeves",
    "longer",
    "the same hat, but of straw, with a wide brim and a dark ribbon",
]
COMBINERS = ["sum", "combiner", "attention_fusion"]
TRAINED = [(c, False) for c in COMBINERS[1:]] + [(c, True) for c in COMBINERS]


class Photos:
    """Images of the field's protocol: the files of a directory by name."""

    def __init__(self, files: list[Path]) -> None:
        self.files = {ImageId(file.name): file for file in files}

    def load(self, image: ImageId) -> Image.Image:
        return Image.open(self.files[image]).convert("RGB")

    def digest(self, image: ImageId) -> str:
        return file_digest(self.files[image])


@pytest.fixture(scope="module")
def photos() -> Photos:
    files = sorted(PHOTOS.rglob("*.jpg"))[::60][:5]
    if not files:
        pytest.skip(f"no photographs in {PHOTOS}")
    return Photos(files)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Configs of two tiny CLIPs, a ViT and a ResNet."""
    directory = tmp_path_factory.mktemp("clips")
    for name, vision in CLIPS.items():
        config = {"embed_dim": 32, "quick_gelu": True, "vision_cfg": vision, "text_cfg": TEXT}
        (directory / f"{name}.json").write_text(json.dumps(config))
    return {name: str(directory / f"{name}.json") for name in CLIPS}


def settings(clip: str, **changes: Any) -> ClipCombinerSettings:
    return ClipCombinerSettings(**{"clip": clip, "path": "random", "combiner": "sum", **changes})


def items(photos: Photos) -> list[EmbedInput]:
    return [EmbedInput(image, text) for image, text in zip(photos.files, TEXTS, strict=False)]


def inputs_of(backbone: Any, photos: Photos, rows: list[EmbedInput]) -> Any:
    return backbone.inputs(rows, backbone.encode_images([photos.load(row.image) for row in rows]))


def queries(backbone: Any, photos: Photos, rows: list[EmbedInput] | None = None) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = backbone.module(inputs_of(backbone, photos, rows or items(photos)))
    return made


def gallery(backbone: Any, photos: Photos) -> torch.Tensor:
    return queries(backbone, photos, [EmbedInput(image) for image in photos.files])


@pytest.mark.parametrize("kind", CLIPS)
@pytest.mark.parametrize("inside", [False, True])
def test_features_are_open_clips(
    clips: dict[str, str], photos: Photos, kind: str, inside: bool
) -> None:
    backbone: Any = settings(clips[kind], pad_ratio=0, train_clip=inside).build()
    clip = find_checkpoint(clips[kind], "random").build(0)
    transform = image_transform_v2(PreprocessCfg(size=clip.visual.image_size), is_train=False)
    pixels = torch.stack([transform(photos.load(image)) for image in photos.files])
    with torch.no_grad():
        images = clip.encode_image(pixels)
        texts = clip.encode_text(open_clip.get_tokenizer("RN50x4")(TEXTS))
        alone = backbone.module(backbone.text_inputs(TEXTS))
    assert torch.allclose(gallery(backbone, photos), F.normalize(images, dim=-1), atol=1e-5)
    assert torch.allclose(alone, F.normalize(texts, dim=-1), atol=1e-5)
    assert torch.allclose(
        queries(backbone, photos), F.normalize(images[: len(TEXTS)] + texts, dim=-1), atol=1e-5
    )
    assert (images @ images.T).std() > 0, "all photographs look the same to this CLIP"


@pytest.mark.parametrize("kind", CLIPS)
@pytest.mark.parametrize("combiner", COMBINERS)
def test_batches_and_both_paths_give_the_same_unit_vectors(
    clips: dict[str, str], photos: Photos, kind: str, combiner: str, tmp_path: Path
) -> None:
    """Frozen or trained CLIP, alone or in a batch, features computed or kept: one embedding."""
    frozen: Any = settings(clips[kind], combiner=combiner).build()
    inside: Any = settings(clips[kind], combiner=combiner, train_clip=True).build()
    together = queries(frozen, photos)
    assert together.shape == (3, 32)
    assert torch.allclose(together.norm(dim=1), torch.ones(3), atol=1e-5)
    alone = torch.cat([queries(frozen, photos, [row]) for row in items(photos)])
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together, queries(inside, photos), atol=1e-5)
    assert torch.allclose(gallery(frozen, photos), gallery(inside, photos), atol=1e-5)
    for backbone in (frozen, inside):
        kept = VisionCache(backbone, photos, tmp_path)  # type: ignore[arg-type]
        kept.precompute(list(photos.files))
        vision = kept.get([row.image for row in items(photos)])
        with torch.no_grad():
            assert torch.allclose(
                backbone.module(backbone.inputs(items(photos), vision)), together, atol=1e-5
            )
    assert frozen.vision_key != inside.vision_key and frozen.base_digest == inside.base_digest


@pytest.mark.parametrize("kind", CLIPS)
def test_image_tokens_have_the_global_feature_first(
    clips: dict[str, str], photos: Photos, kind: str
) -> None:
    rows = [photos.load(image) for image in photos.files]
    tokens = settings(clips[kind], combiner="attention_fusion").build().encode_images(rows)
    places = {"vit": 16, "resnet": 4}[kind]
    assert {v.tokens.shape for v in tokens} == {(1 + places, 32)}
    pooled = settings(clips[kind]).build().encode_images(rows)
    for whole, feature in zip(tokens, pooled, strict=True):
        assert torch.allclose(whole.tokens[:1], feature.tokens, atol=1e-5)
    assert len({round(float(t.norm()), 4) for t in tokens[0].tokens}) == 1 + places


def test_attention_fusion_starts_as_the_sum(clips: dict[str, str], photos: Photos) -> None:
    """And its text tokens are the text's only: the token at the end sign is the text feature."""
    fusion: Any = settings(clips["vit"], combiner="attention_fusion").build()
    assert torch.allclose(
        queries(fusion, photos), queries(settings(clips["vit"]).build(), photos), atol=1e-5
    )
    ids = fusion.text_inputs(TEXTS)["text"]
    with torch.no_grad():
        text = fusion.module.encode_text(ids)
        pooled = fusion.module.clip.encode_text(ids)
    ends = text.mask.sum(1) - 1
    assert ends.tolist() == [len(fusion.tokenizer.encode(t)) + 1 for t in TEXTS]
    assert torch.allclose(text.tokens[torch.arange(3), ends], pooled, atol=1e-5)


def test_text_past_the_end_sign_does_not_reach_a_fused_query() -> None:
    torch.manual_seed(0)
    fusion = AttentionFusion(8, 2, 0.0)
    torch.nn.init.normal_(fusion.gate)
    image = ClipFeatures(torch.randn(2, 8), torch.randn(2, 5, 8))
    tokens, mask = torch.randn(2, 6, 8), torch.arange(6) < torch.tensor([[3], [6]])
    other = torch.where(mask.unsqueeze(-1), tokens, torch.randn(2, 6, 8))
    text = torch.randn(2, 8)
    made = fusion(image, ClipFeatures(text, tokens, mask))
    assert torch.allclose(made, fusion(image, ClipFeatures(text, other, mask)), atol=1e-6)
    assert not torch.allclose(
        made, fusion(image, ClipFeatures(text, other, torch.ones_like(mask))), atol=1e-3
    )
    turned = image._replace(tokens=image.tokens.flip(0))  # type: ignore[union-attr]
    assert not torch.allclose(made, fusion(turned, ClipFeatures(text, tokens, mask)), atol=1e-3)


def test_the_combiner_is_clip4cirs_formula() -> None:
    """In float64 with numpy, from the paper's figure: projections, mixture, share, weighted sum."""
    torch.manual_seed(0)
    network = Combiner(6, 4, 0.5).eval().double()
    image, text = torch.randn(3, 6).double(), torch.randn(3, 6).double()
    w = {name: value.detach().numpy() for name, value in network.state_dict().items()}

    def layer(x: Any, name: str) -> Any:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    t, i = text.numpy(), image.numpy()
    both = np.concatenate(
        [np.maximum(layer(t, "project_text.0"), 0), np.maximum(layer(i, "project_image.0"), 0)], 1
    )
    assert both.shape == (3, 2 * 4 * 6)
    share = 1 / (1 + np.exp(-layer(np.maximum(layer(both, "share.0"), 0), "share.3")))
    mixture = layer(np.maximum(layer(both, "mixture.0"), 0), "mixture.3")
    made = network(ClipFeatures(image), ClipFeatures(text)).detach().numpy()
    assert np.allclose(made, mixture + share * t + (1 - share) * i, atol=1e-12)
    assert share.shape == (3, 1) and w["mixture.0.weight"].shape == (8 * 6, 8 * 6)


def trainable(clip: str, combiner: str, inside: bool, **tuning: Any) -> Any:
    backbone: Any = settings(clip, combiner=combiner, train_clip=inside, combiner_width=2).build()
    backbone.make_trainable(TrainingSettings(**tuning), seed=0)
    return backbone


def loss_of(backbone: Any, photos: Photos) -> torch.Tensor:
    """InfoNCE of three queries against the photographs: query i's target is photograph i + 1."""
    rows, candidates = items(photos), [EmbedInput(image) for image in photos.files]
    vectors = [backbone.module(inputs_of(backbone, photos, each)) for each in (rows, candidates)]
    return F.cross_entropy(vectors[0] @ vectors[1].T / 0.1, torch.arange(len(rows)) + 1)


@pytest.mark.parametrize("kind", CLIPS)
@pytest.mark.parametrize(("combiner", "inside"), TRAINED)
def test_training_reaches_every_weight_and_lowers_the_loss(
    clips: dict[str, str], photos: Photos, kind: str, combiner: str, inside: bool
) -> None:
    """Weights behind the fusion's gate, or behind a ResNet block that starts as the identity, move
    from step 2 on."""
    backbone = trainable(clips[kind], combiner, inside)
    parameters = backbone.trainable()
    assert {name.split(".")[0] for name in parameters} == set(backbone.default_trainable_patterns)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
    before = float(loss_of(backbone, photos).detach())
    backbone.module.train()
    for step in range(2):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss_of(backbone, photos).backward()
        assert [n for n, p in parameters.items() if p.grad is None] == []
        if step == 1:
            assert [n for n, p in parameters.items() if not p.grad.any()] == []
        optimizer.step()
        if step == 0:
            backbone.module.eval()
            assert float(loss_of(backbone, photos).detach()) < before
            backbone.module.train()


def test_clip_stays_in_eval_mode_and_only_the_combiner_drops(
    clips: dict[str, str], photos: Photos
) -> None:
    backbone = trainable(clips["resnet"], "combiner", True)
    means = {n: b.clone() for n, b in backbone.module.clip.named_buffers()}
    backbone.module.train()
    assert backbone.module.combiner.training and not backbone.module.clip.visual.bn1.training
    assert torch.equal(gallery(backbone, photos), gallery(backbone, photos))
    assert not torch.equal(queries(backbone, photos), queries(backbone, photos))
    assert all(torch.equal(b, means[n]) for n, b in backbone.module.clip.named_buffers())


IN_A_NEW_PROCESS = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from tests.backbones.test_clip_combiner import ClipCombinerSettings, Photos, gallery, queries
photos = Photos([Path(file) for file in sys.argv[3:]])
told = json.loads(sys.argv[1])
built = {name: ClipCombinerSettings(**values).build(Path(name)) for name, values in told.items()}
made = {name: torch.cat([queries(b, photos), gallery(b, photos)]) for name, b in built.items()}
save_file(made, sys.argv[2])
print(*[b.fingerprint for b in built.values()])
"""


@pytest.mark.full
def test_saved_weights_give_the_same_queries_in_a_new_process(
    clips: dict[str, str], photos: Photos, tmp_path: Path
) -> None:
    expected, told = {}, {}
    for combiner, inside in TRAINED:
        backbone = trainable(clips["vit"], combiner, inside)
        optimizer = torch.optim.AdamW(backbone.trainable().values(), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(backbone, photos).backward()
            optimizer.step()
        name = str(tmp_path / f"{combiner}-{inside}")
        backbone.save_adapter(Path(name))
        expected[name] = torch.cat([queries(backbone, photos), gallery(backbone, photos)])
        told[name] = backbone.settings.model_dump(mode="json")
        untrained = queries(backbone.settings.build(), photos)
        assert not torch.allclose(untrained, expected[name][:3], atol=1e-3)
    words = [json.dumps(told), str(tmp_path / "made.safetensors"), *map(str, photos.files.values())]
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, *words]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    made = load_file(tmp_path / "made.safetensors")
    assert all(torch.allclose(made[name], expected[name], atol=1e-5) for name in expected)
    assert len(set(out.stdout.split())) == len(TRAINED)


def test_a_trained_clip_loads_frozen_with_features_of_its_own(
    clips: dict[str, str], photos: Photos, tmp_path: Path
) -> None:
    backbone = trainable(clips["vit"], "combiner", True)
    torch.nn.init.normal_(backbone.module.clip.visual.proj)
    backbone.save_adapter(tmp_path)
    frozen: Any = settings(clips["vit"], combiner="combiner", combiner_width=2).build(tmp_path)
    assert torch.allclose(queries(frozen, photos), queries(backbone, photos), atol=1e-5)
    assert frozen.vision_key != settings(clips["vit"], combiner="combiner").build().vision_key  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="train_clip"):
        frozen.make_trainable(TrainingSettings(), seed=0)


def test_the_text_tower_alone_can_be_trained_with_kept_image_features(
    clips: dict[str, str], photos: Photos
) -> None:
    backbone = trainable(clips["vit"], "sum", False, trainable_patterns=("clip.(?!visual)",))
    loss_of(backbone, photos).backward()
    assert [
        n for n, p in backbone.trainable().items() if p.grad is None or n.startswith("clip.visual")
    ] == []


def test_what_cannot_be_trained_says_the_way_out(clips: dict[str, str]) -> None:
    frozen: Any = settings(clips["vit"]).build()
    for tuning, match in (
        ({}, "train_clip"),
        ({"finetuning": "lora"}, "in full"),
        ({"trainable_patterns": ("clip",)}, "train_clip"),
        ({"trainable_patterns": ("combinator",)}, "match no weight"),
    ):
        with pytest.raises(UserError, match=match):
            frozen.make_trainable(TrainingSettings(**tuning), seed=0)
    half: Any = settings(clips["vit"], train_clip=True, dtype="bfloat16").build()
    with pytest.raises(UserError, match="float32"):
        half.make_trainable(TrainingSettings(), seed=0)


def test_half_precision_is_near(clips: dict[str, str], photos: Photos) -> None:
    for kind in CLIPS:
        dtypes = ("float32", "bfloat16")
        full, half = (settings(clips[kind], combiner="combiner", dtype=d).build() for d in dtypes)
        assert (queries(full, photos) * queries(half, photos)).sum(1).min() > 0.99
        assert full.vision_key != half.vision_key  # type: ignore[attr-defined]


def test_padding_is_part_of_the_vision_key(clips: dict[str, str]) -> None:
    a, b = (settings(clips["vit"], pad_ratio=ratio).build() for ratio in (0, 1.25))
    assert a.vision_key != b.vision_key and a.fingerprint != b.fingerprint  # type: ignore[attr-defined]
    with pytest.raises(ValidationError, match="ratio"):
        settings(clips["vit"], pad_ratio=0.5)


def test_a_sign_in_a_text_is_words(clips: dict[str, str]) -> None:
    backbone: Any = settings(clips["vit"]).build()
    texts = ["red <END_OF_TEXT> dress", "red &lt;start_of_text&gt; dress"]
    for ids in backbone.text_inputs(texts)["text"]:
        assert ids.argmax() > 6 and (ids >= 49406).sum() == 2


def test_a_text_that_is_cut_is_named(
    clips: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    backbone: Any = settings(clips["vit"]).build()
    exact = " ".join(["red"] * 75)
    ids = backbone.text_inputs([exact, "a"])["text"]
    assert ids.shape == (2, 77) and ids[0, -1] == 49407 and not caplog.records
    longer = backbone.text_inputs([f"{exact} and blue"])["text"]
    assert torch.equal(longer[0], ids[0])
    backbone.text_inputs([f"{exact} or green"])
    (record,) = caplog.records
    assert "77 tokens are cut" in record.getMessage() and "and blue" in record.getMessage()


@pytest.mark.full
def test_rn50x4_builds_without_weights_and_gives_640_dimensions(photos: Photos) -> None:
    backbone: Any = ClipCombinerSettings(path="random").build()
    assert sum(p.numel() for p in backbone.module.clip.visual.parameters()) == 87_137_080
    assert gallery(backbone, photos).shape == (5, 640) and queries(backbone, photos).shape == (
        3,
        640,
    )
    assert backbone.module.combiner.mixture[0].weight.shape == (5120, 5120)


def test_weights_come_from_a_file_or_a_directory(
    clips: dict[str, str], photos: Photos, tmp_path: Path
) -> None:
    drawn = settings(clips["vit"], random_seed=3)
    clip = find_checkpoint(drawn.clip, "random").build(3)
    save_file(clip.state_dict(), tmp_path / "open_clip_model.safetensors")
    config = {
        "model_cfg": json.loads(Path(clips["vit"]).read_text()),
        "preprocess_cfg": {"size": 32},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    expected = queries(drawn.build(), photos)
    for path in (tmp_path, tmp_path / "open_clip_model.safetensors"):
        found = settings(clips["vit"], path=str(path))
        assert torch.allclose(queries(found.build(), photos), expected, atol=1e-6)
        assert found.resolve_dir() == tmp_path / "open_clip_model.safetensors"
    assert (
        drawn.weights_digest() != settings(clips["vit"]).weights_digest() != found.weights_digest()
    )
    assert drawn.resolve_dir() == Path(clips["vit"])


def test_a_directory_with_another_architecture_is_refused(
    clips: dict[str, str], tmp_path: Path
) -> None:
    weights = find_checkpoint(clips["vit"], "random").build(0).state_dict()
    save_file(weights, tmp_path / "open_clip_model.safetensors")
    config = {"model_cfg": json.loads(Path(clips["vit"]).read_text())}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"vision_cfg.width 80, not 48"):
        settings("RN50x4", path=str(tmp_path)).resolve_dir()
    with pytest.raises(UserError, match="another architecture"):
        settings(clips["resnet"], path=str(tmp_path / "open_clip_model.safetensors")).build()


def test_weights_that_cannot_be_had_say_the_way_out(clips: dict[str, str], tmp_path: Path) -> None:
    cut, pickled, config = tmp_path / "cut.safetensors", tmp_path / "RN50x4.pt", tmp_path / "a.json"
    save_file({"a": torch.zeros(100)}, cut)
    cut.write_bytes(cut.read_bytes()[:60])
    pickled.write_bytes(b"")
    config.write_text(json.dumps({"embed_dim": 8, "vision_cfg": {"depth": 3}, "text_cfg": {}}))
    for clip, path, match in (
        ("RN50x5", "random", r"Near: RN50x4"),
        ("hf-hub:a/b", "random", r"no architecture"),
        ("coca_ViT-B-32", "random", r"not CLIP's own"),
        ("/nowhere/clip.json", "random", r"cannot be read"),
        (str(config), "random", r"depth"),
        ("RN50x4", "/nowhere/clip.safetensors", r"does not exist.*openai"),
        ("RN50x4", str(cut), r"cannot be read as safetensors"),
        ("RN50x4", str(pickled), r"pickle.*save_file"),
        ("RN50x4", "openai", r"timm/resnet50x4_clip.openai.*beforehand"),
        ("RN50x4", "hf-hub:nobody/nothing", r"nobody/nothing.*network"),
    ):
        with pytest.raises(UserError, match=match):
            settings(clip, path=path).resolve_dir()


def test_attention_fusion_refuses_towers_without_tokens(tmp_path: Path) -> None:
    vision = {"timm_model_name": "resnet18", "timm_pool": "avg", "timm_proj": "linear"}
    vision["image_size"] = 32
    config = tmp_path / "timm.json"
    config.write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": TEXT}))
    assert settings(str(config)).build()
    with pytest.raises(UserError, match="ViT or ResNet"):
        settings(str(config), combiner="attention_fusion").build()


def test_building_does_not_move_torchs_generator(clips: dict[str, str]) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    settings(clips["vit"], combiner="combiner").build()
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.full
def test_the_loop_teaches_a_tiny_clip_to_find_images_far_above_chance(
    small: Any, tmp_path: Path
) -> None:
    """Warm-up, a mined round and evaluation, from drawn weights. Chance is 10 of 109 images; the
    drawn CLIP has 0.18.

    What so few triplets teach is mostly to find the reference's own family of images, less to read
    the text.
    """
    from cirloop.cli import runner

    config = {
        "embed_dim": 64,
        "vision_cfg": {
            **CLIPS["vit"],
            "image_size": 56,
            "patch_size": 14,
            "width": 64,
            "head_width": 32,
        },
        "text_cfg": {**TEXT, "width": 64, "context_length": 32},
    }
    (tmp_path / "clip.json").write_text(json.dumps(config))
    network = {"combiner": "combiner", "combiner_width": 2, "dropout": 0, "train_clip": True}
    training = {"iteration_0_steps": 120, "steps_per_iteration": 30, "batch_size": 48}
    run = small(
        tmp_path / "run",
        model=settings(str(tmp_path / "clip.json"), **network).model_dump(),
        data={"train_families": 40, "train_triplets": 600, "eval_families": 10},
        captioning={"enabled": False},
        training={**training, "learning_rate": 1e-3},
    )
    base, *_, last = runner.run(run)
    assert last["gallery"] == 110 and last["queries"] == 60
    assert last["metrics"]["recall@10"] > max(3.5 * 10 / 109, base["metrics"]["recall@10"] + 0.15)
