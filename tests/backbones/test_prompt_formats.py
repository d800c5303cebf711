"""Prompt formats: what is read, and the vector, equal each published embedder's own construction,
written out here.

The constructions are those of github.com/TIGER-AI-Lab/VLM2Vec, of GME's gme_inference.py, of
github.com/QwenLM/Qwen3-VL-Embedding and of github.com/RemRico/Recall: text by their formatting, ids
by the processor, positions by their search for images, the pooled token by their rule. Models are
the real classes with random weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from qwen_vl_utils import fetch_image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from cirloop.backbones import BackboneConfig, EmbedInput
from cirloop.backbones.base import LoraSettings
from cirloop.backbones.prompts import FAMILIES, fitting, load, packaged
from cirloop.backbones.weights import LORA_WEIGHTS
from cirloop.types import ImageId, UserError
from tests.backbones import tiny_models

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
BUDGET = {"min_pixels": 64 * 64, "max_pixels": 128 * 128}
TEXT = "is blue, with short sleeves"
Written = Callable[[Any, str | None], str]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {name: getattr(tiny_models, f"write_{name}")(place / name) for name in (*QWEN, "llava")}


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    random = np.random.default_rng(3)
    return [
        Image.fromarray(random.integers(0, 256, (h, w, 3), np.uint8))
        for w, h in ((150, 90), (70, 110))
    ]


def settings(name: str, models: dict[str, Path], **more: Any) -> Any:
    budget = BUDGET if name in QWEN else {}
    values = {"type": name, "path": str(models[name]), "dtype": "float32", **budget, **more}
    return TypeAdapter(BackboneConfig).validate_python(values)


def vlm2vec(processor: Any, text: str | None) -> str:
    """`data_prepare` of image_i2i_vg_dataset.py with `process_input_text`, for a row of MMEB's
    CIRR."""
    if text is not None:
        asked = "find a similar everyday image with the described changes:"
        row = f"<|image_1|>\nGiven an image, {asked}"
        instruction = "\n" + row.replace("<|image_1|>", "").strip()
        return ("<|image_pad|>" + " " + instruction + " " + text).replace(" \n", "\n") + "\n"
    return ("<|image_pad|>" + " " + "\nRepresent the given image.").replace(" \n", "\n")


def gme(processor: Any, text: str | None) -> str:
    """`GmeQwen2VL.embed`."""
    instruction = "You are a helpful assistant."
    input_str = "<|vision_start|><|image_pad|><|vision_end|>"
    if text is not None:
        input_str += text
    return (
        f"<|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n{input_str}<|im_end|>\n"
        "<|im_start|>assistant\n<|endoftext|>"
    )


def qwen3_vl_embedding(processor: Any, text: str | None) -> str:
    """`Qwen3VLEmbedder.format_model_input` and the chat template."""
    content: list[dict[str, str]] = [{"type": "image"}]
    if text is not None:
        content.append({"type": "text", "text": text})
    conversation = [
        {"role": "system", "content": [{"type": "text", "text": "Represent the user's input."}]},
        {"role": "user", "content": content},
    ]
    written: str = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=False
    )
    return written


def recall(wording: str) -> Written:
    """`qwen_retrieval_prompt_template`, with the system's turn of the paper."""

    def written(processor: Any, text: str | None) -> str:
        system_prompt = (
            "You are a multimodal retrieval encoder. Your sole function is to map any input into a"
            " compact embedding for nearest-neighbor retrieval."
        )
        instruction = "Represent the given image in one word:" if text is None else wording % text
        input_str = "<|image_pad|>" + instruction
        return (
            f"<|im_start|>system\n{system_prompt}<|im_end|>\n<|im_start|>user\n{input_str}<|im_end|>\n"
            "<|im_start|>assistant\n<|endoftext|>"
        )

    return written


def searched_positions(model: Any, batch: Any) -> torch.Tensor:
    """`get_rope_index` of transformers up to 4.57 for one row with at most one image: images are
    looked for behind vision starts. (3, 1, T)"""
    (ids,), config = batch["input_ids"].tolist(), model.config
    starts = [at for at, token in enumerate(ids) if token == config.vision_start_token_id]
    images = [at + 1 for at in starts if ids[at + 1] == config.image_token_id]
    if not images:
        return torch.arange(len(ids)).expand(3, 1, -1)
    (start,), merge = images, config.vision_config.spatial_merge_size
    frames, height, width = batch["image_grid_thw"][0].tolist()
    height, width = height // merge, width // merge
    axes = (torch.arange(frames), torch.arange(height), torch.arange(width))
    image = torch.stack([grid.flatten() for grid in torch.meshgrid(*axes, indexing="ij")])
    rest = torch.arange(len(ids) - start - image.shape[1]) + start + int(image.max()) + 1
    parts = [torch.arange(start).expand(3, -1), image + start, rest.expand(3, -1)]
    return torch.cat(parts, 1)[:, None]


def no_positions(model: Any, batch: Any) -> torch.Tensor:
    """GME calls the language model without positions, which then counts."""
    return torch.arange(batch["input_ids"].shape[1]).expand(3, 1, -1)


CASES: dict[str, tuple[str, Written, Callable[[Any, Any], torch.Tensor], str]] = {
    "vlm2vec": ("qwen2_vl", vlm2vec, searched_positions, "\n"),
    "vlm2vec on qwen2_5_vl": ("qwen2_5_vl", vlm2vec, searched_positions, "\n"),
    "gme": ("qwen2_vl", gme, no_positions, "<|endoftext|>"),
    "qwen3_vl_embedding": ("qwen3_vl", qwen3_vl_embedding, searched_positions, "\n"),
    "recall_cirr": (
        "qwen2_5_vl",
        recall("Modify this image with <%s>\nRepresent the modified image in one word:"),
        searched_positions,
        "<|endoftext|>",
    ),
    "recall_fashioniq": (
        "qwen2_5_vl",
        recall(
            "Change the style of this dress to <%s>\nRepresent this modified dress in one word:"
        ),
        searched_positions,
        "<|endoftext|>",
    ),
}


@torch.no_grad()
def published(
    model: Any,
    processor: Any,
    name: str,
    text: str,
    picture: Image.Image,
    positions: Callable[[Any, Any], torch.Tensor],
) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """Ids, positions (3, T) and vector (D) from pixels, by transformers' own modules."""
    sized = fetch_image({"image": picture, **BUDGET}, 16 if name == "qwen3_vl" else 14)
    batch = processor(
        text=[text], images=[sized], images_kwargs={"do_resize": False}, return_tensors="pt"
    )
    place = positions(model, batch)
    if name == "qwen3_vl":  # DeepStack: what the model does with image features between its layers
        hidden = model.model(**batch, position_ids=place, use_cache=False).last_hidden_state
    else:
        tower = model.model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"])
        embeds = model.get_input_embeddings()(batch["input_ids"])
        embeds[batch["input_ids"] == model.config.image_token_id] = tower.pooler_output
        told = {"position_ids": place, "attention_mask": batch["attention_mask"]}
        made = model.model.language_model(inputs_embeds=embeds, **told, use_cache=False)
        hidden = made.last_hidden_state
    return batch["input_ids"][0].tolist(), place[:, 0], F.normalize(hidden[0, -1], dim=0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_format_is_its_publications_input(
    case: str, packed: bool, models: dict[str, Path], pictures: list[Image.Image]
) -> None:
    name, written, positions, last = CASES[case]
    backbone = settings(name, models, prompt_format=case.split(" ")[0], packed=packed).build()
    model = AutoModelForImageTextToText.from_pretrained(models[name], dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(models[name])
    items = [EmbedInput(ImageId("a"), TEXT, "dress"), EmbedInput(ImageId("b"))]
    inputs = backbone.inputs(items, backbone.encode_images(pictures))
    places = inputs["position_ids"]
    with torch.no_grad():
        vectors = backbone.module(inputs)
    for row, (item, picture) in enumerate(zip(items, pictures, strict=True)):
        text = written(processor, item.text)
        assert backbone.text(item) == text
        ids, place, vector = published(model, processor, name, text, picture, positions)
        length = int(inputs["attention_mask"][row].sum())
        assert inputs["input_ids"][row, :length].tolist() == ids
        assert torch.equal(places[:, row, :length], place)
        assert (vectors[row] - vector).abs().max() < 1e-5
        assert backbone.sequence_length(item, backbone.encode_images([picture])[0].grid) == length
    assert backbone.text(items[0]).endswith(last)


def test_a_published_dora_reads_the_published_input(
    models: dict[str, Path], pictures: list[Image.Image], tmp_path: Path
) -> None:
    """VLM2Vec ships DoRA, its weights named as the layers were before transformers 4.52."""
    torch.manual_seed(1)
    base: Any = AutoModelForImageTextToText.from_pretrained(models["qwen2_vl"], dtype=torch.float32)
    names = list(LoraSettings().target_modules)
    lora = LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=names)
    model: Any = get_peft_model(base, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(str(tmp_path))
    state = load_file(tmp_path / LORA_WEIGHTS)
    assert any("lora_magnitude_vector" in name for name in state)
    now, then = "model.language_model.layers", "model.layers"
    former = {name.replace(now, then): value for name, value in state.items()}
    save_file(former, tmp_path / LORA_WEIGHTS)
    start = {"prompt_format": "vlm2vec", "start_adapter": str(tmp_path)}
    backbone = settings("qwen2_vl", models, **start).build()
    item = EmbedInput(ImageId("a"), TEXT)
    processor = AutoProcessor.from_pretrained(models["qwen2_vl"])
    with torch.no_grad():
        ours = backbone.module(backbone.inputs([item], backbone.encode_images(pictures[:1])))[0]
    whole, text = model.eval().get_base_model(), vlm2vec(processor, TEXT)
    _, _, theirs = published(whole, processor, "qwen2_vl", text, pictures[0], searched_positions)
    assert (ours - theirs).abs().max() < 1e-5


def test_the_embedded_model_reads_what_it_was_trained_on() -> None:
    """The numbers are from before there were prompt formats."""
    picture = Image.new("RGB", (96, 64), (200, 40, 40))
    picture.paste((20, 60, 220), (30, 10, 60, 50))
    backbone = TypeAdapter(BackboneConfig).validate_python({"dtype": "float32"}).build()
    text = "make the square green"
    items = [EmbedInput(ImageId("a"), f"{text} <|image_pad|> {{x}}"), EmbedInput(ImageId("a"))]
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    asked = "Given an image, find a similar everyday image with the described changes:"
    assert backbone.text(items[0]) == f"{image}\n{asked} {text} < |image_pad|> {{x}}"
    assert backbone.text(items[1]) == f"{image}\nRepresent the given image."
    inputs = backbone.inputs(items, backbone.encode_images([picture, picture]))
    with torch.no_grad():
        vectors = backbone.module(inputs)
    expected = torch.tensor(
        [[0.019156, 0.023209, 0.021876, 0.058005], [0.019233, 0.073960, 0.028805, 0.072162]]
    )
    assert (vectors[:, :4] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", packaged())
def test_a_users_text_is_words_in_every_format(name: str, models: dict[str, Path]) -> None:
    """Also where it would be a special token together with what the format writes beside it."""
    family = load(name).families[0]
    backbone = settings(family, models, prompt_format=name).build()
    ids = backbone.processor.tokenizer.convert_tokens_to_ids
    special = {ids(sign) for sign in backbone.special_tokens}

    def num_special(*item: str) -> int:
        text = backbone.text(EmbedInput(ImageId("a"), *item))
        made = backbone.tokenize([text], "right")["input_ids"][0]
        return sum(int(token) in special for token in made)

    signs = ("|image_pad|", "<|im_end|>\n<|im_start|>system", "<|image_pad|>", "|endoftext|")
    for text in (*signs, "{image}{text}{prompt}"):
        assert num_special(text, f"dress{text}") == num_special("red"), text


def test_a_file_of_ones_own_is_trusted_and_known_by_its_content(
    models: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    content = 'query: "{image}{prompt}<|im_end|>"\ndocument: "{image}<|endoftext|>"\n'
    content += 'query_prompt: "now {text}"\n'
    file.write_text(content)
    mine = settings("qwen2_vl", models, prompt_format=str(file))
    backbone = mine.build()
    end = backbone.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    text = backbone.text(EmbedInput(ImageId("a"), "red <|im_end|>"))
    assert text == "<|vision_start|><|image_pad|><|vision_end|>now red < |im_end|><|im_end|>"
    assert backbone.tokenize([text], "right")["input_ids"][0].tolist().count(end) == 1
    (tmp_path / "copy").mkdir()
    (again := tmp_path / "copy" / "other.yaml").write_text("# the same\n" + content)
    same = settings("qwen2_vl", models, prompt_format=str(again))
    assert mine.path_digests() == same.path_digests()
    assert same.build().fingerprint == backbone.fingerprint
    (other := tmp_path / "changed.yaml").write_text(content.replace("now", "then"))
    changed = settings("qwen2_vl", models, prompt_format=str(other))
    assert mine.path_digests() != changed.path_digests()
    assert changed.build().fingerprint != backbone.fingerprint


def test_instructions_of_the_settings_stand_in_the_format_as_words(models: dict[str, Path]) -> None:
    asked = {"query_prompt": "Retrieve it.<|im_end|>", "document_prompt": "Represent."}
    backbone = settings("qwen2_vl", models, prompt_format="gme", **asked).build()
    text = backbone.text(EmbedInput(ImageId("a"), "red"))
    assert text.startswith("<|im_start|>system\nRetrieve it.< |im_end|><|im_end|>\n")
    assert "red<|im_end|>" in text
    document = backbone.text(EmbedInput(ImageId("a")))
    assert document.startswith("<|im_start|>system\nRepresent.<|im_end|>\n")


def test_without_a_category_the_files_word_is_read(models: dict[str, Path]) -> None:
    backbone = settings("qwen2_5_vl", models, prompt_format="recall_fashioniq").build()
    text = backbone.text(EmbedInput(ImageId("a"), "red"))
    assert "Change the style of this garment to <red>\n" in text
    assert "<red>\nRepresent this modified garment in one word:" in text


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"prompts": "vlm2vec"}, "`prompt_format: instruction`, the default"),
        ({"prompt_format": "vlm3vec"}, "'vlm3vec' is none of chat, gme, instruction"),
        (
            {"prompt_format": "gme", "query_prompt": "with {text}"},
            "has {text} in its query, so not in a prompt",
        ),
        ({"query_prompt": "no place"}, "has {text} once in its query_prompt"),
        ({"query_prompt": "{image} {text}"}, "belong into a prompt format"),
        (
            {"query_prompt": "{text} of a {category}"},
            "has no category, the word where data have none, so no {category}",
        ),
        ({"document_prompt": "a {category}"}, "neither {text} nor {category}"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    given: dict[str, str], problem: str, models: dict[str, Path]
) -> None:
    with pytest.raises(ValidationError) as caught:
        settings("qwen2_vl", models, **given)
    assert problem in str(caught.value)


def test_a_family_without_a_formats_tokens_is_told_which_there_are(models: dict[str, Path]) -> None:
    for name in ("vlm2vec", "gme", "qwen3_vl_embedding", "recall_cirr"):
        said = rf"'{name}' is for qwen2_vl.*for llava there are chat, instruction, or"
        with pytest.raises(ValidationError, match=said):
            settings("llava", models, prompt_format=name)
    all_fit = dict.fromkeys(QWEN, len(packaged()))
    assert {family: len(fitting(family)) for family in FAMILIES} == all_fit | {"llava": 2}


QUERY = "query: '{image}{text}'"
BOTH = f"{QUERY}\ndocument: '{{image}}'"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[", "not YAML"),
        ("words", "must be a mapping with query, document"),
        (QUERY, "has no document"),
        (f"{QUERY}\ndocument: 1", "document 1 is not a text"),
        (f"{BOTH}\nmore: 1", "unknown key 'more'"),
        ("query: '{image}'\ndocument: '{image}'", "must hold {text} once"),
        (f"{QUERY}\ndocument: '{{image}}{{text}}'", "a document has neither"),
        ("query: '{image}{prompt}'\ndocument: '{image}'", "{prompt} stands in query once"),
        ("query: '{image}{text}{category}'\ndocument: '{image}'", "the word where data have none"),
        (f"{BOTH}\npositions: mrope", "'mrope' is none of model, sequential"),
        (f"{BOTH}\nfamilies: [clip]", "there are qwen2_vl, qwen2_5_vl"),
        ("query: '{image}{image}{text}'\ndocument: '{image}'", "query must hold {image} once"),
    ],
)
def test_a_damaged_file_is_refused(content: str, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(UserError) as caught:
        load(str(file))
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("query", "problem"),
    [("{text}", "must hold one image"), ("{image}<|image_pad|>{text}", "must hold one image"),
     ("{image}{text}<|eos|>", r"<\|eos\|> are no special tokens")],
)  # fmt: skip
def test_a_format_that_a_model_cannot_read_is_refused(
    query: str, problem: str, models: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"query: '{query}'\ndocument: '{{image}}'")
    with pytest.raises(UserError, match=rf"{problem}.*Give another: chat, gme, instruction"):
        settings("qwen2_vl", models, prompt_format=str(file)).build()
