"""Packed rows against rows alone: the same embeddings and gradients, no padding computed; and what
leaks is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cirloop.backbones import EmbedInput, packing, vlm_module
from cirloop.backbones.base import ImageFeatures, LoraSettings
from cirloop.training.config import TrainingSettings
from cirloop.types import ImageId, UserError
from tests.backbones.test_vlm import settings, trained
from tests.backbones.tiny_models import WRITERS

TEXTS = (
    "red",
    None,
    "the same one, but with a much longer skirt and no belt at all",
    "is blue with short sleeves",
)
GRIDS = ((1, 4, 4), (1, 8, 4), (1, 2, 2), (1, 2, 8))
ITEMS = [EmbedInput(ImageId(str(number)), text) for number, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    return {name: write(directory / name) for name, write in WRITERS.items()}


def seen_by(backbone: Any) -> list[ImageFeatures]:
    """Vision tokens of four images, drawn."""
    drawn = torch.Generator().manual_seed(3)
    sizes = [(backbone.num_image_tokens(grid), backbone.vision_width()) for grid in GRIDS]
    tokens = [torch.randn(*size, generator=drawn) for size in sizes]
    return [ImageFeatures(*pair) for pair in zip(tokens, GRIDS, strict=True)]


@torch.no_grad()
def embed(backbone: Any, rows: list[int]) -> torch.Tensor:
    vision = seen_by(backbone)
    inputs = backbone.inputs([ITEMS[i] for i in rows], [vision[i] for i in rows])
    made: torch.Tensor = backbone.module(inputs)
    return made


def embed_eval(backbone: Any) -> torch.Tensor:
    backbone.module.eval()
    return embed(backbone, [0, 1, 2, 3])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", WRITERS)
def test_packed_rows_are_as_each_alone(name: str, attention: str, models: dict[str, Path]) -> None:
    packed = settings(name, models, packed=True, attention=attention).build()
    plain = settings(name, models, attention=attention).build()
    alone = torch.cat([embed(plain, [row]) for row in range(len(ITEMS))])
    for rows in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 2, 0]):
        assert torch.allclose(embed(packed, rows), alone[rows], atol=1e-5)
    nearest = (alone @ alone.T - torch.eye(len(alone))).abs().max()
    assert nearest < 0.999, "the model does not tell these apart"
    texts = ["red", "a much longer text than that", "blue"]
    with torch.no_grad():
        ours, theirs = (each.module(each.text_inputs(texts)) for each in (packed, plain))
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", WRITERS)
def test_packed_rows_have_the_same_gradients(
    name: str, checkpointing: bool, models: dict[str, Path]
) -> None:
    made = {}
    for packed in (False, True):
        options = {"packed": packed, "gradient_checkpointing": checkpointing}
        backbone = trained(settings(name, models, **options).build())
        backbone.module.train()
        vectors = backbone.module(backbone.inputs(ITEMS, seen_by(backbone)))
        (vectors @ vectors.detach().roll(1, 0).T).diagonal().sum().backward()
        made[packed] = {name: weight.grad for name, weight in backbone.trainable().items()}
    assert all(grad.any() for grad in made[False].values())
    assert all(torch.allclose(made[True][n], grad, atol=1e-5) for n, grad in made[False].items())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", WRITERS)
def test_the_last_mlp_reads_pooled_tokens_only(
    name: str, packed: bool, models: dict[str, Path]
) -> None:
    backbone = trained(settings(name, models, packed=packed).build())
    last = backbone.vlm.model.language_model.layers[-1].mlp
    shapes = []
    hook = last.register_forward_hook(lambda _, args, output: shapes.append(output.shape))
    made = []
    for skips in (False, True):
        backbone.module.skips_unread = skips
        vectors = backbone.module(backbone.inputs(ITEMS, seen_by(backbone)))
        loss = (vectors @ vectors.detach().roll(1, 0).T).diagonal().sum()
        gradients = torch.autograd.grad(loss, [*backbone.trainable().values()])
        made.append([vectors.detach(), *gradients])
    hook.remove()
    assert shapes[0][:2].numel() > vlm_module.MIN_MLP_ROWS == shapes[1][:2].numel()
    for full, skipped in zip(*made, strict=True):
        assert full.any()
        assert torch.allclose(full, skipped, atol=1e-6)


@pytest.mark.parametrize("name", ["qwen3_vl", "llava"])
def test_no_padding_goes_through_the_layers(name: str, models: dict[str, Path]) -> None:
    shapes = []
    for packed in (False, True):
        backbone = settings(name, models, packed=packed).build()
        mlp = backbone.vlm.model.language_model.layers[0].mlp
        mlp.register_forward_hook(lambda *a: shapes.append(a[2].shape[:2]))
        inputs = backbone.inputs(ITEMS, seen_by(backbone))
        backbone.module(inputs)
    mask = inputs["attention_mask"]
    assert shapes == [mask.shape, (1, int(mask.sum()))] and int(mask.sum()) < 0.9 * mask.numel()


def without_places(placed: Any, attention: str) -> Any:
    return {**packing.pack(placed, attention), "packed_tokens": None}


def without_text_positions(placed: Any, attention: str) -> Any:
    packed = packing.pack(placed, attention)
    positions = packed["position_ids"]
    plain = torch.arange(positions.numel())[None]
    return {**packed, "position_ids": positions[1:] if positions.ndim == 3 else plain}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    ("attention", "broken"), [("sdpa", without_places), ("eager", without_text_positions)]
)
def test_rows_that_leak_are_refused(
    name: str, attention: str, broken: Any, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vlm_module, "pack", broken)
    said = r"model.packed changes embeddings: by [01](\.\d+)? on .* Set model.packed false"
    with pytest.raises(UserError, match=said):
        settings(name, models, packed=True, attention=attention).build()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_passes_and_its_leaks_do_not(
    dtype: str, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(settings("qwen2_vl", models, packed=True, dtype=dtype).build())
    monkeypatch.setattr(vlm_module, "pack", without_places)
    with pytest.raises(UserError, match=r"model.packed changes embeddings"):
        settings("qwen2_vl", models, packed=True, dtype=dtype).build()


def test_a_wrong_gradient_is_refused(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    padded = packing._padded
    monkeypatch.setattr(packing, "_padded", lambda *given: padded(*given).detach())
    backbone = settings("qwen2_vl", models, packed=True).build()
    with pytest.raises(UserError, match=r"model.packed changes gradients"):
        backbone.make_trainable(TrainingSettings(lora=LoraSettings(r=4)), seed=1)


def test_the_proof_leaves_mode_and_random_numbers_as_they_were(models: dict[str, Path]) -> None:
    def drawn(packed: bool) -> tuple[list[bool], torch.Tensor, list[torch.Tensor]]:
        torch.manual_seed(5)
        backbone = settings("qwen2_vl", models, packed=packed).build()
        backbone.make_trainable(TrainingSettings(lora=LoraSettings(r=4)), seed=1)
        assert all(weight.grad is None for weight in backbone.trainable().values())
        modes = [module.training for module in backbone.module.modules()]
        return modes, torch.rand(3), [*backbone.trainable().values()]

    plain, packed = drawn(False), drawn(True)
    assert plain[0] == packed[0] and torch.equal(plain[1], packed[1])
    assert all(torch.equal(a, b) for a, b in zip(plain[2], packed[2], strict=True))


def test_a_loaded_adapter_is_compared_without_dropout(
    models: dict[str, Path], tmp_path: Path
) -> None:
    dropping = TrainingSettings(lora=LoraSettings(r=4, dropout=0.5))
    trained(settings("qwen2_vl", models).build(), dropping).save_adapter(tmp_path)
    kinds = (settings("qwen2_vl", models, packed=on) for on in (True, False))
    packed, plain = (kind.build(tmp_path) for kind in kinds)
    assert torch.allclose(embed_eval(packed), embed_eval(plain), atol=1e-5)
    packed.make_trainable(dropping, seed=2)


def altered(source: Path, directory: Path, **text: Any) -> dict[str, Path]:
    """The model of `source` with other settings of its language model; its weights are not read."""
    directory.mkdir()
    for path in source.iterdir():
        (directory / path.name).symlink_to(path)
    config = json.loads((source / "config.json").read_text("utf-8"))
    config["text_config"].update(text)
    (directory / "config.json").unlink()
    (directory / "config.json").write_text(json.dumps(config), "utf-8")
    return {"qwen2_vl": directory, "llava": directory}


def test_models_that_cannot_be_packed_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    said = r"'gemma'; rows can be packed for .*qwen2_vl_text.* Set model.packed false"
    with pytest.raises(UserError, match=said):
        gemma = altered(models["llava"], tmp_path / "a", model_type="gemma")
        settings("llava", gemma, packed=True).build()
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    sliding = altered(models["qwen2_vl"], tmp_path / "b", **window, layer_types=None)
    with pytest.raises(UserError, match="a window of 8 tokens"):
        settings("qwen2_vl", sliding, packed=True).build()
    mistral = altered(models["llava"], tmp_path / "c", model_type="mistral", sliding_window=16)
    with pytest.raises(UserError, match="a window of 16 tokens"):
        settings("llava", mistral, packed=True).build()


def test_flash_attention_is_told_where_rows_end() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    placed = {"inputs_embeds": torch.arange(15.0).view(3, 5, 1), "attention_mask": mask}
    made = packing.pack(placed, "flash_attention_2")
    assert made["attention_mask"] is None
    assert made["inputs_embeds"].flatten().tolist() == [0, 1, 2, 5, *range(10, 15)]
    assert made["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 2, 3, 4]]
    assert made["cu_seq_lens_q"].tolist() == made["cu_seq_lens_k"].tolist() == [0, 3, 4, 9]
    assert made["cu_seq_lens_q"].dtype == torch.int32
    assert made["max_length_q"] == made["max_length_k"] == 5


def test_the_setting_is_part_of_the_fingerprint(models: dict[str, Path]) -> None:
    plain = settings("qwen2_vl", models).build()
    packed = settings("qwen2_vl", models, packed=True).build()
    assert plain.fingerprint != packed.fingerprint and plain.vision_key == packed.vision_key
