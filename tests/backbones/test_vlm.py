"""The contract of the vision-language embedders: every family, randomly initialised, on real
photographs."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from pydantic import TypeAdapter
from qwen_vl_utils import fetch_image, smart_resize
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from cirloop.backbones import BackboneConfig, EmbedInput
from cirloop.backbones.base import ImageFeatures, LoraSettings
from cirloop.backbones.weights import LORA_CONFIG, LORA_WEIGHTS, resolve
from cirloop.stages.resources import model_sizes
from cirloop.training.config import TrainingSettings
from cirloop.types import ImageId, UserError
from tests.backbones.tiny_models import WRITERS

PHOTOS = Path(__file__).resolve().parents[3] / "shared" / "data" / "photos"
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TEXTS = (
    "is blue with short sleeves",
    None,
    "the same one, but with a much longer skirt and no belt at all",
    "red",
    None,
)
SIZES = ((200, 150), (150, 200), (260, 90), (64, 64), (90, 260))
RESIZE = {"images_kwargs": {"size": {"shortest_edge": 64 * 64, "longest_edge": 128 * 128}}}
TUNING = TrainingSettings(lora=LoraSettings(r=4, alpha=8, dropout=0.0))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    return {name: write(directory / name) for name, write in WRITERS.items()}


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    """Five photographs of clothes in five shapes."""
    if not PHOTOS.is_dir():
        pytest.skip(f"the photographs are not at {PHOTOS}")
    paths = sorted(PHOTOS.rglob("*.jpg"))[:: max(1, len(list(PHOTOS.rglob("*.jpg"))) // 5)]
    pairs = zip(paths, SIZES, strict=False)
    return [Image.open(path).convert("RGB").resize(size) for path, size in pairs]


def settings(name: str, models: dict[str, Path], **more: Any) -> Any:
    budget = {"min_pixels": 64 * 64, "max_pixels": 128 * 128} if name in QWEN else {}
    kind = name.split("_next")[0].split("_onevision")[0]
    values = {"type": kind, "path": str(models[name]), "dtype": "float32", **budget, **more}
    return TypeAdapter(BackboneConfig).validate_python(values)


def items() -> list[EmbedInput]:
    return [EmbedInput(ImageId(str(i)), text) for i, text in enumerate(TEXTS)]


@torch.no_grad()
def embed(backbone: Any, rows: list[EmbedInput], vision: list[ImageFeatures]) -> torch.Tensor:
    backbone.module.eval()
    vectors: torch.Tensor = backbone.module(backbone.inputs(rows, vision))
    return vectors


def trained(backbone: Any, tuning: TrainingSettings = TUNING) -> Any:
    """With an adapter moved by hand."""
    backbone.make_trainable(tuning, seed=1)
    with torch.no_grad():
        for name, parameter in backbone.trainable().items():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return backbone


@torch.no_grad()
def plainly(model: Any, processor: Any, name: str, text: str, image: Image.Image) -> torch.Tensor:
    """transformers' own calls, from pixels: no file of ours has a hand in it."""
    more: dict[str, Any] = dict(RESIZE) if name in QWEN else {}
    if text.startswith("<s>"):
        more["add_special_tokens"] = False
    batch = processor(text=[text], images=[image], return_tensors="pt", **more)
    hidden = model.model(**batch, use_cache=False).last_hidden_state[0, -1]
    return hidden / hidden.norm()


def sized(name: str, image: Image.Image) -> Image.Image:
    """As qwen-vl-utils makes it, which is the only step before the processor."""
    if name not in QWEN:
        return image
    patch = 16 if name == "qwen3_vl" else 14
    budget = {"min_pixels": 64 * 64, "max_pixels": 128 * 128}
    made: Image.Image = fetch_image({"image": image, **budget}, patch)
    return made


@pytest.mark.parametrize("prompts", ["instruction", "chat"])
@pytest.mark.parametrize("name", WRITERS)
def test_embeddings_equal_plain_transformers_from_pixels(
    name: str, prompts: str, models: dict[str, Path], photos: list[Image.Image]
) -> None:
    backbone = settings(name, models, prompt_format=prompts).build()
    ours = embed(backbone, items(), backbone.encode_images(photos))
    model = AutoModelForImageTextToText.from_pretrained(models[name], dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(models[name])
    sign = "<|vision_start|><|image_pad|><|vision_end|>" if name in QWEN else "<image>"
    for item, image, vector in zip(items(), photos, ours, strict=True):
        asked = "Given an image, find a similar everyday image with the described changes:"
        text = "Represent the given image." if item.text is None else f"{asked} {item.text}"
        if prompts == "chat":
            turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
            form = {"add_generation_prompt": True, "tokenize": False}
            whole = processor.apply_chat_template([turn], **form)
        else:
            whole = f"{sign}\n{text}"
        assert backbone.text(item) == whole
        theirs = plainly(model, processor, name, whole, sized(name, image))
        assert torch.allclose(vector, theirs, atol=1e-5)
    nearest = (ours @ ours.T - torch.eye(len(ours))).abs().max()
    assert nearest < 0.999, "the model does not tell these apart"


@pytest.mark.parametrize("name", WRITERS)
def test_unit_norm_whatever_the_batch_and_the_padding(
    name: str, models: dict[str, Path], photos: list[Image.Image]
) -> None:
    backbone, rows = settings(name, models).build(), items()
    vision = backbone.encode_images(photos)
    together = embed(backbone, rows, vision)
    pairs = list(zip(rows, vision, strict=True))
    alone = torch.cat([embed(backbone, [row], [seen]) for row, seen in pairs])
    turned = embed(backbone, rows[::-1], vision[::-1]).flip(0)
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together, turned, atol=1e-5)
    assert torch.allclose(together.norm(dim=1), torch.ones(len(rows)), atol=1e-5)
    by_one = [backbone.encode_images([photo])[0] for photo in photos]
    for a, b in zip(vision, by_one, strict=True):
        assert torch.allclose(a.tokens, b.tokens, atol=1e-4)
    assert [backbone.num_image_tokens(v.grid) for v in vision] == [len(v.tokens) for v in vision]
    lengths = [backbone.sequence_length(row, seen.grid) for row, seen in pairs]
    assert lengths == backbone.inputs(rows, vision)["attention_mask"].sum(1).tolist()


@pytest.mark.parametrize("name", QWEN)
def test_a_long_narrow_image_is_sized_as_transformers_does(
    name: str, models: dict[str, Path]
) -> None:
    """Where qwen-vl-utils leaves it without one of its sides; what an export reads must be the
    same."""
    without = 0
    backbone = settings(name, models, min_pixels=32 * 32).build()
    processor = backbone.processor.image_processor
    factor = processor.patch_size * processor.merge_size
    for size in ((40, 3200), (31, 639), (3200, 16), (200, 1), (13, 2600), (1, 17)):
        picture = Image.linear_gradient("L").convert("RGB").resize(size)
        for max_pixels in (12_544, 35_840):
            backbone.max_pixels = max_pixels
            ours = backbone.prepare_images([picture])
            if min(smart_resize(size[1], size[0], factor, 32 * 32, max_pixels)) == 0:
                without += 1
                processor.size = {"shortest_edge": 32 * 32, "longest_edge": max_pixels}
                theirs = processor(images=[picture], return_tensors="pt")
                assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])
                assert torch.allclose(ours["pixel_values"], theirs["pixel_values"], atol=0.05)
            [made] = backbone.encode_images([picture], ours)
            assert len(made.tokens) == backbone.num_image_tokens(made.grid)
            assert torch.isfinite(made.tokens).all()
    assert without >= 4


@pytest.mark.parametrize("name", QWEN)
def test_the_pixel_budget_holds_on_both_sides(
    name: str, models: dict[str, Path], photos: list[Image.Image]
) -> None:
    backbone = settings(name, models).build()
    patch = backbone.processor.image_processor.patch_size
    assert patch == (16 if name == "qwen3_vl" else 14)
    small = [photos[0].resize((20, 30)), photos[1].resize((2000, 1500))]
    low, high = (v.grid[1] * v.grid[2] * patch**2 for v in backbone.encode_images(small))
    assert 64 * 64 <= low < high <= 128 * 128
    # below the least: what qwen-vl-utils makes is looked at, not believed
    backbone.max_pixels = 32 * 32
    with pytest.raises(AssertionError):
        backbone.encode_images(small)
    with pytest.raises(ValueError, match="is more than max_pixels"):
        settings(name, models, min_pixels=200 * 200)


def test_a_llava_processor_of_another_size_is_named(
    models: dict[str, Path], photos: list[Image.Image], tmp_path: Path
) -> None:
    backbone = settings("llava", models).build()
    backbone.processor.image_processor.crop_size = {"height": 14, "width": 14}
    with pytest.raises(UserError, match="14x14 pixels, the vision tower takes 28x28"):
        backbone.encode_images(photos)


@pytest.mark.parametrize("name", WRITERS)
def test_a_text_with_the_sign_for_an_image_is_words(
    name: str, models: dict[str, Path], photos: list[Image.Image]
) -> None:
    for prompts in ("instruction", "chat"):
        backbone = settings(name, models, prompt_format=prompts).build()
        sign, vision = backbone.processor.image_token, backbone.encode_images(photos[:2])
        nested = sign[: len(sign) // 2] + sign + sign[len(sign) // 2 :]
        texts = (f"a {sign} and <|im_end|>{nested}", f"{sign}{sign}")
        rows = [EmbedInput(ImageId("a"), text) for text in texts]
        made = backbone.inputs(rows, vision)
        counts = (made["input_ids"] == backbone.vlm.config.image_token_id).sum(1).tolist()
        assert counts == [len(v.tokens) for v in vision]
        end = backbone.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
        ends = int((made["input_ids"] == end).sum())
        assert ends == (2 if prompts == "chat" and name in QWEN else 0)
        assert torch.isfinite(embed(backbone, rows, vision)).all()
        assert backbone.escape("plain < text > with | signs") == "plain < text > with | signs"
    alone = backbone.text_inputs([f"a {sign} b"])
    assert not (alone["input_ids"] == backbone.vlm.config.image_token_id).any()
    assert torch.allclose(backbone.module(alone).norm(dim=1), torch.ones(1), atol=1e-5)


@pytest.mark.parametrize("name", WRITERS)
def test_lora_is_on_the_language_model_alone(name: str, models: dict[str, Path]) -> None:
    backbone = settings(name, models).build()
    backbone.make_trainable(TUNING, seed=1)
    names = backbone.trainable()
    assert len(names) == backbone.vlm.config.text_config.num_hidden_layers * 7 * 2
    assert all("language_model" in each for each in names) and backbone.vision_is_frozen()


PROCESS = """
import sys, torch
from pathlib import Path
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from cirloop.backbones import BackboneConfig
for directory in sorted(Path(sys.argv[1]).iterdir()):
    settings = TypeAdapter(BackboneConfig).validate_json((directory / "settings.json").read_text())
    module = settings.build(directory).module.eval()
    with torch.no_grad():
        save_file({"vectors": module(load_file(directory / "inputs"))}, directory / "vectors")
"""


@pytest.mark.full
def test_saved_adapters_load_in_another_process(
    models: dict[str, Path], photos: list[Image.Image], tmp_path: Path
) -> None:
    vectors = {}
    for name in WRITERS:
        made = trained(settings(name, models).build())
        made.save_adapter(tmp_path / name)
        inputs = made.inputs(items(), made.encode_images(photos))
        vectors[name] = made.module.eval()(inputs).detach()
        kept = {key: value.contiguous() for key, value in inputs.items()}
        save_file(kept, tmp_path / name / "inputs")
        (tmp_path / name / "settings.json").write_text(made.settings.model_dump_json())
    subprocess.run([sys.executable, "-c", PROCESS, str(tmp_path)], check=True, timeout=300)
    for name, expected in vectors.items():
        assert torch.equal(load_file(tmp_path / name / "vectors")["vectors"], expected)


@pytest.mark.parametrize("name", WRITERS)
def test_a_saved_adapter_loads_with_the_same_embeddings_here_and_in_peft(
    name: str, models: dict[str, Path], photos: list[Image.Image], tmp_path: Path
) -> None:
    base = settings(name, models).build()
    vision = base.encode_images(photos)
    made = trained(settings(name, models).build())
    made.save_adapter(tmp_path)
    loaded = settings(name, models).build(tmp_path)
    ours = embed(loaded, items(), vision)
    assert torch.equal(ours, embed(made, items(), vision))
    assert (ours - embed(base, items(), vision)).abs().max() > 1e-2
    assert loaded.fingerprint != base.fingerprint and loaded.vision_key == base.vision_key
    model = AutoModelForImageTextToText.from_pretrained(models[name], dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(tmp_path)).eval().get_base_model()
    processor = AutoProcessor.from_pretrained(models[name])
    theirs = plainly(model, processor, name, loaded.text(items()[0]), sized(name, photos[0]))
    assert torch.allclose(ours[0], theirs, atol=1e-5)


@pytest.mark.parametrize("name", WRITERS)
def test_an_embedding_takes_no_lm_head_and_keeps_no_layer(
    name: str, models: dict[str, Path], photos: list[Image.Image]
) -> None:
    backbone = settings(name, models).build()
    language, heads, made = backbone.vlm.model.language_model, [], []
    backbone.vlm.lm_head.register_forward_hook(lambda *_: heads.append(name))
    language.register_forward_hook(lambda module, given, out: made.append(out))
    embed(backbone, items(), backbone.encode_images(photos))
    assert heads == []
    assert [(out.hidden_states, out.past_key_values) for out in made] == [(None, None)]
    backbone.vlm(input_ids=torch.tensor([[5, 6]]))
    language(input_ids=torch.tensor([[5, 6]]), output_hidden_states=True)
    assert heads == [name], "the hooks see what is not wanted"
    assert made[-1].hidden_states and made[-1].past_key_values


@pytest.mark.parametrize(
    ("tune", "dtype"), [("lora", "float32"), ("dora", "float32"), ("lora", "bfloat16")]
)
@pytest.mark.parametrize("name", WRITERS)
def test_a_step_reaches_every_lora_and_lowers_the_loss(
    name: str, tune: Any, dtype: str, models: dict[str, Path], photos: list[Image.Image]
) -> None:
    backbone = settings(name, models, gradient_checkpointing=True, dtype=dtype).build()
    vision = backbone.encode_images(photos)
    backbone.make_trainable(TUNING.model_copy(update={"finetuning": tune}), seed=1)
    backbone.module.train()
    rows = [EmbedInput(ImageId("q"), TEXTS[0]), *(EmbedInput(ImageId(str(i))) for i in range(3))]
    inputs = backbone.inputs(rows, [vision[0], *vision[1:4]])
    optimizer = torch.optim.AdamW(backbone.trainable().values(), lr=1e-3)
    losses = []
    for step in range(3):
        query, *candidates = backbone.module(inputs)
        scores = torch.stack(candidates) @ query / 0.05
        loss = torch.nn.functional.cross_entropy(scores, torch.tensor(1))
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            grads = {n: p.grad for n, p in backbone.trainable().items() if "lora_B" in n}
            assert [n for n, grad in grads.items() if not grad.any()] == []
        optimizer.step()
    assert losses[1] < losses[0] and losses[2] < losses[1]


def test_a_trained_dora_goes_on_being_trained(models: dict[str, Path], tmp_path: Path) -> None:
    tuning = TUNING.model_copy(update={"finetuning": "dora"})
    trained(settings("qwen2_5_vl", models).build(), tuning).save_adapter(tmp_path)
    settings("qwen2_5_vl", models).build(tmp_path).make_trainable(tuning, seed=2)
    with pytest.raises(UserError, match="'dora'"):
        settings("qwen2_5_vl", models).build(tmp_path).make_trainable(TUNING, seed=2)


def test_a_loaded_adapter_does_not_drop_out(models: dict[str, Path], tmp_path: Path) -> None:
    dropping = TUNING.model_copy(update={"lora": LoraSettings(r=4, alpha=8, dropout=0.5)})
    trained(settings("qwen2_vl", models).build(), dropping).save_adapter(tmp_path)
    loaded = settings("qwen2_vl", models).build(tmp_path)
    one, other = (loaded.module(loaded.text_inputs(["a red circle"])) for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.parametrize("part", ["model.language_model", "model.language_model.layers.0"])
@pytest.mark.parametrize("name", WRITERS)
def test_parts_train_in_full_on_a_base_of_half_precision(
    name: str, part: str, models: dict[str, Path], photos: list[Image.Image], tmp_path: Path
) -> None:
    backbone = settings(name, models, dtype="bfloat16").build()
    inputs = backbone.inputs(items(), backbone.encode_images(photos))
    before = backbone.module.eval()(inputs)
    backbone.make_trainable(TrainingSettings(finetuning="full", trainable_patterns=(part,)), seed=1)
    vectors = backbone.module.train()(inputs)
    (vectors @ vectors.detach().roll(1, 0).T).diagonal().sum().backward()
    for parameter in backbone.trainable().values():
        assert parameter.grad is not None and parameter.dtype == torch.float32
    assert torch.allclose(vectors, before, atol=0.05)
    torch.optim.AdamW(backbone.trainable().values(), lr=1e-2).step()
    backbone.save_adapter(tmp_path)
    loaded = settings(name, models, dtype="bfloat16").build(tmp_path)
    assert torch.equal(loaded.module.eval()(inputs), backbone.module.eval()(inputs))


def test_parts_in_full_but_not_the_vision_tower(models: dict[str, Path], tmp_path: Path) -> None:
    def full(*parts: str) -> TrainingSettings:
        return TrainingSettings(finetuning="full", trainable_patterns=parts)

    backbone = settings("llava_onevision", models).build()
    backbone.make_trainable(full("model.language_model.layers.2"), seed=1)
    assert backbone.trainable()
    assert all(n.startswith("model.language_model.layers.2") for n in backbone.trainable())
    for part in ("model.multi_modal_projector", "model", "model.image_newline"):
        with pytest.raises(UserError, match=f"{part} reach the vision tower"):
            settings("llava_onevision", models).build().make_trainable(full(part), seed=1)


def published(base: Path, directory: Path, rename: tuple[str, str] = ("", ""), **more: Any) -> Path:
    """An adapter as PEFT saves one, `rename` in the names of its weights."""
    torch.manual_seed(1)
    drawn = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "init_lora_weights": False}
    base_model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    model: Any = get_peft_model(base_model, LoraConfig(**{**drawn, **more}))
    model.save_pretrained(str(directory))
    state = load_file(directory / LORA_WEIGHTS)
    renamed = {name.replace(*rename): value for name, value in state.items()}
    save_file(renamed, directory / LORA_WEIGHTS)
    return directory


NAMES = list(LoraSettings().target_modules)
ON_LLAVA = r".*language_model\..*\.(" + "|".join(NAMES) + ")"
FORMER_LAYERS = ("model.language_model.layers", "model.layers")
FORMER = [
    ("qwen2_vl", ("", "")),
    ("qwen2_vl", FORMER_LAYERS),
    pytest.param("qwen3_vl", FORMER_LAYERS, marks=pytest.mark.full),
    ("llava_next", ("model.model.language_model", "model.language_model.model")),
]


def targets(name: str) -> dict[str, Any]:
    return {"target_modules": ON_LLAVA if name == "llava_next" else NAMES}


@pytest.mark.parametrize(("name", "rename"), FORMER)
def test_a_published_adapter_starts_also_by_its_former_names(
    name: str,
    rename: tuple[str, str],
    models: dict[str, Path],
    photos: list[Image.Image],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    adapter = published(models[name], tmp_path / "a", rename, **targets(name))
    base, start = settings(name, models), settings(name, models, start_adapter=str(adapter))
    backbone, vision = start.build(), base.build().encode_images(photos)
    assert "was trained on" not in caplog.text
    ours = embed(backbone, items(), vision)
    model = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(models[name], dtype=torch.float32),
        str(published(models[name], tmp_path / "now", **targets(name))),
    )
    processor, image = AutoProcessor.from_pretrained(models[name]), sized(name, photos[0])
    alone, text = model.eval().get_base_model(), backbone.text(items()[0])
    assert torch.allclose(ours[0], plainly(alone, processor, name, text, image), atol=1e-5)
    assert start.path_digests()["path"] == base.path_digests()["path"]
    assert start.path_digests() != base.path_digests()
    checkpoint = start.build(adapter_path(base, tmp_path))
    assert backbone.fingerprint not in (base.build().fingerprint, checkpoint.fingerprint)


@pytest.mark.parametrize(("name", "rename"), FORMER)
def test_a_published_adapter_goes_on_being_trained_as_it_is(
    name: str, rename: tuple[str, str], models: dict[str, Path], tmp_path: Path
) -> None:
    adapter = published(models[name], tmp_path, rename, **targets(name))
    start = settings(name, models, start_adapter=str(adapter))
    backbone = start.build()
    before = {n: w.clone() for n, w in backbone.adapter_state().items()}
    backbone.make_trainable(TUNING, seed=1)
    assert all(torch.equal(before[n], w) for n, w in backbone.adapter_state().items())
    assert len(backbone.trainable()) == len(before)
    lora = LoraSettings(r=8, alpha=8, dropout=0.0, target_modules=("q_proj", "v_proj"))
    said = r"r 4, not 8; target_modules .*gate_proj.*, not q_proj, v_proj"
    with pytest.raises(UserError, match=said) as error:
        start.build().make_trainable(TUNING.model_copy(update={"lora": lora}), seed=1)
    assert "alpha" not in str(error.value)


def adapter_path(config: Any, directory: Path) -> Path:
    """A checkpoint's adapter, which goes before `start_adapter`."""
    trained(config.build()).save_adapter(directory / "checkpoint")
    return directory / "checkpoint"


def test_an_adapter_of_a_base_of_another_name_is_told(
    models: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = published(models["qwen2_vl"], tmp_path, target_modules=NAMES)
    config = json.loads((adapter / LORA_CONFIG).read_text("utf-8"))
    config["base_model_name_or_path"] = "Qwen/Qwen2-VL-2B"
    (adapter / LORA_CONFIG).write_text(json.dumps(config))
    settings("qwen2_vl", models, start_adapter=str(adapter)).build()
    assert "was trained on Qwen/Qwen2-VL-2B, and starts on" in caplog.text


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_an_adapter_that_reaches_the_vision_tower_is_refused(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    adapter = published(models[name], tmp_path, target_modules=NAMES)
    with pytest.raises(UserError, match="LoRA outside the language model"):
        settings(name, models, start_adapter=str(adapter)).build()


@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision"])
def test_an_adapter_of_another_base_is_refused(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    other = "qwen3_vl" if name == "qwen2_vl" else "llava_next"
    trained(settings(other, models).build()).save_adapter(tmp_path)
    state = load_file(tmp_path / LORA_WEIGHTS)
    grown = {k: torch.cat([v, v], dim=1) if "lora_A" in k else v for k, v in state.items()}
    save_file(grown, tmp_path / LORA_WEIGHTS)
    with pytest.raises(
        UserError, match=r"does not fit the model .* shapes differ, .*\[\d+, \d+\], not \["
    ):
        settings(name, models).build(tmp_path)
    save_file(dict(list(state.items())[2:]), tmp_path / LORA_WEIGHTS)
    with pytest.raises(UserError, match=r"does not fit the model .*: 2 keys or shapes differ"):
        settings(name, models).build(tmp_path)
    (tmp_path / LORA_WEIGHTS).write_bytes(b"\x00" * 40)
    with pytest.raises(UserError, match="cannot be read"):
        settings(name, models).build(tmp_path)


def test_what_is_no_adapter_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    for content in ('{"peft_type": "IA3"}', "[]", "{"):
        (tmp_path / str(len(content))).mkdir()
        (tmp_path / str(len(content)) / LORA_CONFIG).write_text(content)
        (tmp_path / str(len(content)) / LORA_WEIGHTS).write_bytes(b"")
    (tmp_path / LORA_CONFIG).write_text("{}")
    for path, message in (
        (tmp_path / "20", "'IA3'"),
        (tmp_path / "2", "cannot be read"),
        (tmp_path / "1", "cannot be read"),
        (tmp_path, f"no {LORA_WEIGHTS}"),
        (models["llava"], "model.path"),
        ("/no/a", "not exist"),
    ):
        with pytest.raises(UserError, match=message):
            settings("qwen2_vl", models, start_adapter=str(path)).build()


def copied(source: Path, directory: Path) -> Path:
    directory.mkdir()
    for path in source.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 99}, "layer_types"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_act": "nonsense"}, "nonsense"),
        ({"hidden_size": 0}, ""),
    ],
)
def test_a_config_that_fits_nothing_is_named(
    change: dict[str, object], said: str, tmp_path: Path
) -> None:
    directory = copied(resolve("tiny"), tmp_path / "qwen2_vl")
    path = directory / "config.json"
    content = json.loads(path.read_text())
    content["text_config"].update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"(?s)qwen2_vl.*(cannot be loaded|do not fit).*{said}"):
        settings("qwen2_vl", {"qwen2_vl": directory}).build()
    with pytest.raises(UserError, match=f"(?s)config.json.*of no model.*{said}.*Restore it"):
        model_sizes(directory)


@pytest.mark.parametrize("name", WRITERS)
def test_damaged_weights_are_named(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    directory = copied(models[name], tmp_path / name)
    weights = directory / "model.safetensors"
    whole = weights.read_bytes()
    for cut in (40, len(whole) // 2):
        weights.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=f"{name}.*cannot be loaded"):
            settings(name, {name: directory}).build()
    weights.write_bytes(whole)
    state = load_file(weights)
    first = next(key for key in sorted(state) if key.endswith("layers.0.input_layernorm.weight"))
    save_file({k: v for k, v in state.items() if k != first}, weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights do not fit config\.json: no .*input_layernorm"):
        settings(name, {name: directory}).build()
    state[first] = state[first][:1].clone()
    save_file(state, weights, {"format": "pt"})
    said = r"1 weights do not fit config.json: .*input_layernorm.weight \[1\], not \[64\]"
    with pytest.raises(UserError, match=said):
        settings(name, {name: directory}).build()
    index = '{"weight_map": {"a": "model-00002.safetensors"}}'
    (directory / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"no model-00002\.safetensors"):
        settings(name, {name: directory}).build()


@pytest.mark.parametrize("name", WRITERS)
def test_another_architecture_is_named(name: str, models: dict[str, Path]) -> None:
    other = "llava_next" if name in QWEN else "qwen2_vl"
    with pytest.raises(UserError, match=f"model_type '{other}', expected .*'{name}'"):
        settings(name, {name: models[other]}).build()
    if name != "qwen2_vl":
        with pytest.raises(UserError, match="model_type 'qwen2_vl'"):
            settings(name, {name: Path("tiny")}).build()


@pytest.mark.parametrize("name", WRITERS)
def test_a_tokenizer_without_the_image_token_is_named(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    directory = copied(models[name], tmp_path / name)
    sign = "<|image_pad|>" if name in QWEN else "<image>"
    for path in directory.glob("*token*.json"):
        content = path.read_text("utf-8")
        path.write_text(content.replace(json.dumps(sign), '"<|nothing|>"'))
    with pytest.raises(UserError, match=r"image token|cannot be loaded"):
        settings(name, {name: directory}).build()


def test_a_merged_embedder_with_code_of_its_own_loads_without_that_code(
    models: dict[str, Path], photos: list[Image.Image], tmp_path: Path
) -> None:
    """GME's directories name a class of their own in config.json; its weights are Qwen2-VL's."""
    directory = copied(models["qwen2_vl"], tmp_path / "gme")
    config = json.loads((directory / "config.json").read_text("utf-8"))
    autos = ("AutoModel", "AutoModelForImageTextToText")
    config["auto_map"] = dict.fromkeys(autos, "modeling_gme.Gme")
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "modeling_gme.py").write_text("raise RuntimeError('code of the model was run')")
    directories = (directory, models["qwen2_vl"])
    merged, base = (settings("qwen2_vl", {"qwen2_vl": d}).build() for d in directories)
    vision = base.encode_images(photos)
    assert torch.equal(embed(merged, items(), vision), embed(base, items(), vision))
    assert merged.fingerprint != base.fingerprint and merged.vision_key == base.vision_key


def test_chat_prompts_need_a_chat_template(models: dict[str, Path], tmp_path: Path) -> None:
    directory = copied(models["llava"], tmp_path / "llava")
    (directory / "chat_template.jinja").unlink()
    settings("llava", {"llava": directory}).build()
    with pytest.raises(UserError, match="no chat template"):
        settings("llava", {"llava": directory}, prompt_format="chat").build()


def test_an_attention_that_is_not_installed_is_named(models: dict[str, Path]) -> None:
    if find_spec("flash_attn"):
        pytest.skip("flash_attn is installed here")
    with pytest.raises(UserError, match=r"cannot be loaded: .*[Ff]lash"):
        settings("llava", models, attention="flash_attention_2").build()


def test_four_bits_need_bitsandbytes_and_a_gpu(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"quantization nf4 needs .*a CUDA GPU.*quantization none"):
        settings("qwen2_vl", models, quantization="nf4").build()
    if not find_spec("bitsandbytes"):
        with pytest.raises(UserError, match="pip install bitsandbytes"):
            settings("llava", models, quantization="nf4").build()
