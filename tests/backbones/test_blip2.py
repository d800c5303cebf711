"""The BLIP-2 embedder against transformers' own calls, and its promises about what is trained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from cirloop.backbones import EmbedInput
from cirloop.backbones.base import LoraSettings
from cirloop.backbones.blip2 import normalize_caption
from cirloop.backbones.config import Blip2Settings
from cirloop.backbones.features import VisionCache
from cirloop.backbones.similarity import similarity
from cirloop.backbones.weights import PARTS_WEIGHTS, resolve
from cirloop.training.config import TrainingSettings
from cirloop.training.gradient_engine import QueryCandidateModule
from cirloop.types import UserError
from tests.backbones.tiny_blip2 import QUERY_TOKENS, build_tiny_blip2

ROOT = Path(__file__).resolve().parents[2]
PHOTOS = ROOT.parent / "shared" / "data" / "photos"
FILES = sorted(PHOTOS.glob("dress/*.jpg"))[:4] + sorted(PHOTOS.glob("shoes/*.jpg"))[:4]
TEXTS = [
    "is red",
    "is shorter and has long sleeves with white dots",
    "the same but without a collar, darker and more formal than this one",
    "has no heel",
]
NEEDS_PHOTOS = pytest.mark.skipif(not FILES, reason=f"no photographs in {PHOTOS}")
LORA = LoraSettings(target_modules=("query", "key", "value", "dense"))


class Photos:
    """Images by number, as the package's images."""

    def load(self, image: str) -> Image.Image:
        return Image.open(FILES[int(image)]).convert("RGB")

    def digest(self, image: str) -> str:
        return FILES[int(image)].stem


QUERIES = [EmbedInput(str(i), text) for i, text in enumerate(TEXTS)]  # type: ignore[arg-type]
IMAGES = [EmbedInput(str(i)) for i in range(len(FILES))]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_blip2(tmp_path_factory.mktemp("blip2"))


def built(path: Path | str, adapter: Path | None = None, **settings: Any) -> Any:
    return Blip2Settings(path=str(path), **settings).build(adapter)


def trainable(path: Path, **tuning: Any) -> Any:
    backbone = built(path)
    backbone.make_trainable(TrainingSettings(**tuning), seed=1)
    return backbone


@pytest.fixture(scope="module")
def backbone(path: Path) -> Any:
    return built(path)


@pytest.fixture(scope="module")
def vision(backbone: Any) -> Any:
    """Vision tokens of the photographs."""
    if not FILES:
        pytest.skip("needs ../shared/data/photos")
    return backbone.encode_images([Photos().load(item.image) for item in IMAGES])


def embed(backbone: Any, items: list[EmbedInput], vision: Any) -> torch.Tensor:
    backbone.module.eval()
    inputs = backbone.inputs(items, [vision[int(item.image)] for item in items])
    with torch.no_grad():
        vectors: torch.Tensor = backbone.module(inputs)
    return vectors


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5, rtol=0)


@NEEDS_PHOTOS
def test_queries_are_one_vector_and_images_one_per_query_token_all_of_unit_norm(
    backbone: Any, vision: Any
) -> None:
    queries, images = embed(backbone, QUERIES, vision), embed(backbone, IMAGES, vision)
    assert queries.shape == (4, 16) and images.shape == (8, QUERY_TOKENS, 16)
    assert queries.dtype == images.dtype == torch.float32
    for vectors in (queries, images):
        assert close(vectors.norm(dim=-1), torch.ones(vectors.shape[:-1]))
        assert (vectors.flatten(0, -2).std(0) > 1e-3).all(), "all alike"


@NEEDS_PHOTOS
def test_images_and_texts_equal_the_librarys_own(backbone: Any, vision: Any) -> None:
    """`image_embeds` and `text_embeds` of `Blip2ForImageTextRetrieval`, fed with pixels and its
    processor's tokens."""
    photos = [Photos().load(item.image) for item in IMAGES[:4]]
    cut = {"padding": True, "truncation": True, "max_length": 32 + QUERY_TOKENS}
    batch = backbone.processor(
        images=photos, text=[normalize_caption(text) for text in TEXTS], **cut, return_tensors="pt"
    )
    batch["input_ids"], batch["attention_mask"] = (
        batch[name][:, QUERY_TOKENS:] for name in ("input_ids", "attention_mask")
    )
    with torch.no_grad():
        out = backbone.model(**batch, use_image_text_matching_head=False)
        texts = backbone.module(backbone.text_inputs(TEXTS))
    assert close(embed(backbone, IMAGES[:4], vision), out.image_embeds)
    assert close(texts, out.text_embeds)


@NEEDS_PHOTOS
def test_a_query_is_the_mean_of_what_the_matching_head_reads(backbone: Any, vision: Any) -> None:
    """The query tokens' outputs with image and text, caught where transformers hands them to its
    matching head."""
    caught = []
    hook = backbone.model.itm_head.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    for item in QUERIES:
        photo, ids = Photos().load(item.image), backbone.text_inputs([item.text])
        pixels = backbone.processor.image_processor(photo, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            backbone.model(pixel_values=pixels, **ids, use_image_text_matching_head=True)
    hook.remove()
    with torch.no_grad():
        theirs = F.normalize(backbone.model.text_projection(torch.cat(caught)).mean(1), dim=-1)
    assert close(embed(backbone, QUERIES, vision), theirs)


@NEEDS_PHOTOS
@pytest.mark.parametrize("items", [QUERIES, IMAGES], ids=["queries", "images"])
def test_a_batchs_other_rows_and_its_padding_change_nothing(
    backbone: Any, vision: Any, items: list[EmbedInput]
) -> None:
    alone = torch.cat([embed(backbone, [item], vision) for item in items])
    assert close(embed(backbone, items, vision), alone)
    assert close(embed(backbone, items[::-1], vision), alone.flip(0))


@NEEDS_PHOTOS
def test_text_and_reference_both_decide_a_query(backbone: Any, vision: Any) -> None:
    changed: Any = [QUERIES[0], EmbedInput("0", TEXTS[1]), EmbedInput("1", TEXTS[0])]  # type: ignore[arg-type]
    first, text, image = embed(backbone, changed, vision)
    assert not torch.allclose(first, text, atol=1e-3)
    assert not torch.allclose(first, image, atol=1e-3)


@NEEDS_PHOTOS
def test_kept_features_are_the_towers_on_pixels(
    backbone: Any, vision: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids: Any = [item.image for item in IMAGES]
    kept: Any = Photos()
    VisionCache(backbone, kept, tmp_path).get(ids)
    monkeypatch.setattr(backbone, "encode_images", None)
    again = VisionCache(backbone, kept, tmp_path).get(ids)
    for item, made in zip(IMAGES, again, strict=True):
        pixels = backbone.processor.image_processor(Photos().load(item.image), return_tensors="pt")[
            "pixel_values"
        ]
        with torch.no_grad():
            hidden = backbone.model.vision_model(pixel_values=pixels).last_hidden_state[0]
        assert made.grid == (1, 4, 4) and close(made.tokens, hidden)
    assert torch.equal(embed(backbone, QUERIES, again), embed(backbone, QUERIES, vision))


@NEEDS_PHOTOS
def test_other_pixels_or_another_dtype_have_other_features(
    backbone: Any, path: Path, vision: Any
) -> None:
    padding, half = built(path, pad_ratio=1.25), built(path, dtype="bfloat16")
    assert len({backbone.vision_key, padding.vision_key, half.vision_key}) == 3
    assert len({backbone.fingerprint, padding.fingerprint, half.fingerprint}) == 3
    (rough,) = half.encode_images([Photos().load("0")])
    (padded,) = padding.encode_images([Photos().load("0")])
    assert rough.tokens.dtype == torch.bfloat16 and half.model.query_tokens.dtype == torch.float32
    assert torch.allclose(rough.tokens.float(), vision[0].tokens, atol=0.1)
    assert not torch.allclose(padded.tokens, vision[0].tokens, atol=0.1)
    assert embed(half, IMAGES[:1], [rough]).dtype == torch.float32


def test_a_text_is_words_also_where_it_looks_like_a_sign(backbone: Any) -> None:
    ids = backbone.text_inputs(["a [SEP] b <image> c [PAD]"])["input_ids"][0]
    special = {*backbone.processor.tokenizer.added_tokens_decoder}  # with its processor's `<image>`
    assert [int(i) in special for i in ids] == [True, *[False] * (len(ids) - 2), True]
    assert normalize_caption("Is RED. (very)  red!") == "is red very red"


def test_long_texts_are_cut_at_the_settings_tokens(backbone: Any) -> None:
    assert backbone.text_inputs(["red " * 100, "red"])["input_ids"].shape == (2, 32)


def test_queries_and_images_in_one_batch_are_our_mistake(backbone: Any, vision: Any) -> None:
    with pytest.raises(AssertionError, match="one batch"):
        backbone.inputs([QUERIES[0], IMAGES[0]], vision[:2])


def contrastive(backbone: Any, vision: Any) -> torch.Tensor:
    """InfoNCE of queries on images, the most similar of an image's vectors counting."""
    queries, images = (
        backbone.module(backbone.inputs(items, vision[:4])) for items in (QUERIES, IMAGES[:4])
    )
    return F.cross_entropy(similarity(queries, images) / 0.1, torch.arange(4))


@NEEDS_PHOTOS
def test_everything_that_is_trained_gets_a_gradient_and_the_tower_none(
    path: Path, vision: Any
) -> None:
    backbone = trainable(path)
    backbone.module.eval()
    contrastive(backbone, vision).backward()
    trained = backbone.trainable()
    assert not [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
    assert {p.dtype for p in trained.values()} == {torch.float32}
    rest = {name for name, _ in backbone.root_module.named_parameters()} - set(trained)
    text_ffn = ("qformer.encoder.layer.2.intermediate.", "qformer.encoder.layer.2.output.")
    assert all(name.startswith(("vision_model.", "itm_head.", *text_ffn)) for name in rest)
    assert backbone.vision_is_frozen()


@NEEDS_PHOTOS
def test_distributed_training_misses_no_gradient(path: Path, vision: Any, tmp_path: Path) -> None:
    """The second call of `DistributedDataParallel` fails where the first left a trained weight
    without a gradient."""
    backbone = trainable(path)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        module = torch.nn.parallel.DistributedDataParallel(QueryCandidateModule(backbone.module))
        for _ in range(2):
            queries, images = module(
                [backbone.inputs(items, vision[:4]) for items in (QUERIES, IMAGES[:4])]
            )
            similarity(queries, images).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()


@NEEDS_PHOTOS
def test_dropout_is_on_while_training_but_not_in_the_tower(path: Path, vision: Any) -> None:
    backbone = built(path)
    backbone.module.train()
    batch = backbone.inputs(QUERIES, vision[:4])
    assert not torch.allclose(backbone.module(batch), backbone.module(batch), atol=1e-4)
    assert not any(module.training for module in backbone.model.vision_model.modules())
    backbone.module.eval()
    assert torch.equal(backbone.module(batch), backbone.module(batch))


@NEEDS_PHOTOS
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_step_lowers_the_loss_of_its_batch(path: Path, vision: Any, tune: Any) -> None:
    backbone = trainable(path, finetuning=tune, lora=LORA)
    backbone.module.eval()
    optimizer = torch.optim.AdamW(backbone.trainable().values(), lr=1e-3)
    before = contrastive(backbone, vision)
    before.backward()
    if tune == "lora":
        grads = [p.grad for n, p in backbone.trainable().items() if "lora_B" in n]
        assert all(grad is not None and grad.any() for grad in grads)
    optimizer.step()
    assert contrastive(backbone, vision) < before - 1e-3


def test_lora_is_on_the_qformer_alone_and_other_names_are_refused(path: Path) -> None:
    backbone = trainable(path, finetuning="lora", lora=LORA)
    assert all(name.startswith("qformer.") and "lora_" in name for name in backbone.trainable())
    with pytest.raises(UserError, match="target_modules"):
        trainable(path, finetuning="lora")


@pytest.mark.parametrize("part", ["vision_model", "itm_head", "v", "nothing"])
def test_parts_that_are_not_trained_are_refused(path: Path, part: str) -> None:
    with pytest.raises(UserError, match=part):
        trainable(path, finetuning="full", trainable_patterns=(part,))


def moved(path: Path, directory: Path, **tuning: Any) -> Any:
    """A backbone whose trained weights were moved by hand, and saved in `directory`."""
    backbone = trainable(path, **tuning)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in backbone.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    backbone.save_adapter(directory)
    return backbone


IN_ANOTHER_PROCESS = """
import sys
from pathlib import Path
from safetensors.torch import save_file
from cirloop.backbones.config import Blip2Settings
from tests.backbones.test_blip2 import IMAGES, QUERIES, Photos, embed
for adapter in map(Path, sys.argv[2:]):
    backbone = Blip2Settings(path=sys.argv[1]).build(adapter)
    vision = backbone.encode_images([Photos().load(item.image) for item in IMAGES])
    made = {"queries": embed(backbone, QUERIES, vision), "images": embed(backbone, IMAGES, vision)}
    save_file(made, adapter / "made")
"""


@pytest.mark.full
@NEEDS_PHOTOS
def test_saved_adapters_give_the_same_embeddings_in_another_process(
    path: Path, backbone: Any, vision: Any, tmp_path: Path
) -> None:
    tunings: dict[str, Any] = {
        "full": {},
        "lora": {"finetuning": "lora", "lora": LORA},
        "part": {"trainable_patterns": ("vision_projection",)},
    }
    made = {
        tmp_path / name: moved(path, tmp_path / name, **tuning) for name, tuning in tunings.items()
    }
    subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, str(path), *map(str, made)], check=True, cwd=ROOT
    )
    for directory, here in made.items():
        there = load_file(directory / "made")
        assert torch.equal(there["queries"], embed(here, QUERIES, vision))
        assert torch.equal(there["images"], embed(here, IMAGES, vision))
        assert not close(there["images"], embed(backbone, IMAGES, vision))


def test_an_adapter_changes_the_fingerprint_and_not_the_vision_key(
    path: Path, backbone: Any, tmp_path: Path
) -> None:
    moved(path, tmp_path)
    loaded = built(path, tmp_path)
    assert loaded.fingerprint != backbone.fingerprint and loaded.vision_key == backbone.vision_key
    assert not loaded.trainable()


def altered(path: Path, directory: Path, change: Any) -> str:
    """A copy of the model with other weights or settings; `change(state, config)` alters both."""
    directory.mkdir()
    for file in path.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    state = load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text("utf-8"))
    change(state, config)
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config), "utf-8")
    return str(directory)


def without_projection(state: Any, config: Any) -> None:
    del state["text_projection.weight"]


def wider(state: Any, config: Any) -> None:
    config["image_text_hidden_size"] = 24


def no_text(state: Any, config: Any) -> None:
    config["qformer_config"]["use_qformer_text_input"] = False


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without_projection, r"1 weights do not fit config\.json: no text_projection\.weight"),
        (wider, r"4 weights do not fit config\.json: .*projection.*\[16\], not \[24\]"),
        (no_text, "takes no text"),
    ],
)
def test_weights_that_are_not_what_the_config_says_are_refused(
    path: Path, tmp_path: Path, change: Any, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        built(altered(path, tmp_path / "m", change))


def test_a_processor_of_another_size_is_refused(path: Path, tmp_path: Path) -> None:
    other = Path(altered(path, tmp_path / "m", lambda state, config: None))
    processor = json.loads((other / "processor_config.json").read_text("utf-8"))
    processor["image_processor"]["size"] = {"height": 21, "width": 21}
    (other / "processor_config.json").write_text(json.dumps(processor), "utf-8")
    with pytest.raises(UserError, match=r"21x21 pixels, config\.json's vision tower takes 28x28"):
        built(other)


def test_weights_beyond_those_needed_and_no_matching_head_do_no_harm(
    path: Path, tmp_path: Path, backbone: Any
) -> None:
    def change(state: Any, config: Any) -> None:
        state["language_model.lm_head.weight"] = torch.ones(2, 2)
        del state["itm_head.weight"], state["itm_head.bias"]

    other = built(altered(path, tmp_path / "m", change))
    # bits depend on where weights lie in memory
    assert torch.allclose(other.probe_output(), backbone.probe_output(), atol=1e-6)


def test_cut_weights_are_named(path: Path, tmp_path: Path) -> None:
    cut = Path(altered(path, tmp_path / "m", lambda state, config: None))
    content = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be loaded"):
        built(cut)


def test_another_architecture_and_a_name_out_of_reach_are_refused() -> None:
    with pytest.raises(UserError, match="'qwen2_vl', expected 'blip-2'"):
        built(resolve("tiny", "qwen2_vl"))
    said = r"Salesforce/blip2-itm-vit-g.*neither a directory here nor"
    with pytest.raises(UserError, match=said):
        Blip2Settings().build()


def test_an_adapter_of_another_base_is_refused(path: Path, tmp_path: Path) -> None:
    def change(state: Any, config: Any) -> None:
        config["image_text_hidden_size"] = 24
        for side in ("vision", "text"):
            state[f"{side}_projection.weight"] = torch.randn(24, 32)
            state[f"{side}_projection.bias"] = torch.randn(24)

    moved(Path(altered(path, tmp_path / "m", change)), tmp_path / "adapter")
    with pytest.raises(UserError, match="4 keys or shapes differ"):
        built(path, tmp_path / "adapter")
    moved(path, tmp_path / "cut")
    state = load_file(tmp_path / "cut" / PARTS_WEIGHTS)
    state.pop("query_tokens")
    save_file(state, tmp_path / "cut" / PARTS_WEIGHTS)
    with pytest.raises(UserError, match="1 keys or shapes differ"):
        built(path, tmp_path / "cut")
