"""The formulas against torch's own counter, which looks at every product a model really does, and published sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from cirloop import cost
from cirloop.backbones import BackboneConfig, Item, LoraSettings, flops
from cirloop.backbones.flops import Flops
from cirloop.captioning.base import Ask
from cirloop.captioning.config import Qwen2VLFoundation
from cirloop.captioning.prompts import REWRITE, VERIFY
from cirloop.training.config import TrainingSettings
from cirloop.types import ImageId
from tests.backbones.tiny_models import WRITERS

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
ITEM = Item(ImageId("a"), "the same one, but with a much longer skirt and no belt at all")
TARGETS = LoraSettings().targets


class Bare:
    """What the formulas look at of an embedder."""

    def __init__(self, vlm: Any) -> None:
        self.vlm = vlm


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    directory = tmp_path_factory.mktemp("models")

    def make(name: str) -> Any:
        path = directory / name
        if not path.exists():
            WRITERS[name](path)
        budget = {"min_pixels": 64 * 64, "max_pixels": 256 * 256} if name in QWEN else {}
        given = {"type": name.split("_next")[0].split("_onevision")[0], "path": str(path), "dtype": "float32"}
        return TypeAdapter(BackboneConfig).validate_python({**given, **budget, "attention": "eager"}).build()

    return make


def counted(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def picture(size: tuple[int, int] = (224, 168)) -> Image.Image:
    return Image.effect_noise(size, 80).convert("RGB")


def dense(formula: Flops, n: int) -> float:
    """Forward with the masked half of attention, which eager attention computes and the formula leaves out."""
    return formula.linear * n + 2 * formula.square * n * n


def test_qwen2_vl_2b_by_its_published_config() -> None:
    """5.11e9 T + 2.62e6 T^2 for an image of T tokens, 2.62e9 L + 8.6e4 L^2 for a row of L."""
    config = Qwen2VLConfig(
        text_config={"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12,
                     "num_key_value_heads": 2, "intermediate_size": 8960, "vocab_size": 151936},
        vision_config={"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "mlp_ratio": 4, "num_heads": 16,
                       "patch_size": 14, "spatial_merge_size": 2},
    )  # fmt: skip
    with torch.device("meta"):
        encoder = Bare(Qwen2VLForConditionalGeneration(config))
    language, vision = flops.language(encoder), flops.vision(encoder)
    assert language is not None and vision is not None
    assert language.linear == pytest.approx(2.62e9, rel=0.01) and language.square == pytest.approx(8.6e4, rel=0.01)
    assert 4 * vision.linear == pytest.approx(5.11e9, rel=0.01) and 16 * vision.square == pytest.approx(
        2.62e6, rel=0.01
    )
    assert language.head == 2 * 1536 * 151936


@pytest.mark.parametrize("name", WRITERS)
def test_the_language_model_costs_what_torch_counts(name: str, build: Callable[[str], Any]) -> None:
    encoder = build(name)
    (vision,) = encoder.encode_images([picture()])
    inputs, formula = encoder.inputs([ITEM], [vision]), flops.language(encoder)
    with torch.no_grad():
        found = counted(lambda: encoder.module(inputs))
    assert formula is not None
    assert dense(formula, inputs["input_ids"].shape[1]) == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize("name", QWEN)
def test_the_vision_tower_costs_what_torch_counts(name: str, build: Callable[[str], Any]) -> None:
    encoder = build(name)
    ready, formula = encoder.prepare_images([picture()]), flops.vision(encoder)
    made: list[Any] = []
    found = counted(lambda: made.extend(encoder.encode_images([picture()], ready)))
    assert formula is not None
    with cost.metering() as spent:
        flops.count_images(formula, [each.grid for each in made])
    assert spent.flops["cpu float32"] == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision"])
def test_a_tower_whose_work_does_not_follow_from_the_grid_is_not_known(name: str, build: Callable[[str], Any]) -> None:
    assert flops.vision(build(name)) is None
    with cost.metering() as spent:
        flops.count_images(None, [(1, 1, 9)])
    assert spent.flops_unknown == 1 and spent.flops == {}


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_training_costs_what_torch_counts(tune: Any, build: Callable[[str], Any]) -> None:
    """But for the first layer, below which nothing is trained: torch computes no gradient of its input."""
    encoder = build("qwen2_vl")
    encoder.make_trainable(TrainingSettings(tune=tune, lora=LoraSettings(rank=4, dropout=0.0)), 0)
    (vision,) = encoder.encode_images([picture()])
    inputs, formula = encoder.inputs([ITEM], [vision]), flops.language(encoder)
    assert formula is not None and (formula.trained == formula.linear) == (tune == "full")
    assert formula.trained > 0
    n = inputs["input_ids"].shape[1]
    found = counted(lambda: encoder.module(inputs).sum().backward())
    masked = 3 * formula.square * n * n
    assert formula.forward([n]) + formula.backward([n]) + masked == pytest.approx(found, rel=0.05)
    with cost.metering() as spent:
        flops.count(formula, inputs, backward=True, again=1)
    assert spent.flops["cpu float32"] == 2 * formula.forward([n]) + formula.backward([n])


def test_an_adapter_counts_where_it_is_on(build: Callable[[str], Any]) -> None:
    encoder = build("qwen2_vl")
    before = flops.language(encoder)
    encoder.make_trainable(TrainingSettings(lora=LoraSettings(rank=4)), 0)
    on, off = flops.language(encoder), flops.language(encoder, adapters=False)
    assert on is not None and before is not None and off is not None
    assert off.linear == before.linear < on.linear and on.linear - off.linear == on.trained


def test_padding_is_told_apart_and_costs_nothing_by_the_formula() -> None:
    mask, formula = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]), Flops("cpu float32", 10.0, 1.0, head=100.0)
    with cost.metering() as spent:
        assert flops.count(formula, {"attention_mask": mask}) == (7, 1)
    assert (spent.tokens, spent.padding, spent.flops) == (7, 1, {"cpu float32": 70.0 + 9 + 16})
    with cost.metering() as spent:
        flops.count_answers(formula, mask, torch.tensor([[5, 5, 0], [5, 0, 0]]), pad=0)
    assert (spent.tokens, spent.tokens_written, spent.padding) == (7, 3, 1)
    assert spent.flops["cpu float32"] == formula.forward([4, 4]) + 300
    with cost.metering() as spent:
        assert flops.count(None, {"text": mask}) == (0, 0)
    assert spent.flops_unknown == 1


def test_captioning_costs_what_torch_counts() -> None:
    """One greedy answer, and one question of yes or no, of the embedded model."""
    captioner: Any = Qwen2VLFoundation(path="tiny", dtype="float32", attention="eager").build()
    vision = captioner.encode_images([picture(), picture()])
    asks = [Ask(ImageId("a"), ImageId("b"), "make it red")]
    head, square = captioner.flops.head, captioner.flops.square
    for work in (
        lambda: captioner.write(REWRITE, asks, vision, 12, [0.0], 0),
        lambda: captioner.yes(VERIFY, asks, vision),
    ):
        with cost.metering() as spent:
            found = counted(work)
        masked = square * spent.tokens**2  # of the question; an answer's tokens see all that is before them
        assert spent.flops["cpu float32"] + masked == pytest.approx(found, rel=0.01)
    assert head > 0


def test_the_limit_is_a_rate() -> None:
    assert flops.limit("cpu float32", 0.01) > 1e8
