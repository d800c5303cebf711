"""Work on a GPU, as far as a simulated one shows it: what it is asked for is computed there, with
the results of the CPU, and not waited for once a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from pydantic import TypeAdapter

from cirloop.backbones import EmbedInput, LoraSettings, Qwen2VLSettings, blip2
from cirloop.backbones.config import BackboneConfig
from cirloop.backbones.features import VisionCache
from cirloop.backbones.transfer import one_behind, to_device, to_host
from cirloop.backbones.weights import load_pretrained
from cirloop.captioning.base import CaptionRequest
from cirloop.captioning.config import CaptioningSettings
from cirloop.captioning.foundation import FoundationConfig
from cirloop.cli import runner
from cirloop.config.run import RunConfig
from cirloop.distributed.worker import create_accelerator
from cirloop.monitoring import profiling
from cirloop.retrieval.embed import embed
from cirloop.retrieval.topk import topk
from tests.backbones.tiny_models import WRITERS
from tests.captioning.photographs import photographs
from tests.faults.harness import VERY_SMALL, tree
from tests.simulated_gpu import DEVICE, SimulatedGpu, simulate
from tests.test_models_loop import LAX, LOSSES, NO_TEXTS, model_of
from tests.training import test_trainer
from tests.training.test_trainer import trainer_of


@pytest.fixture
def gpu() -> Iterator[SimulatedGpu]:
    with SimulatedGpu() as simulated:
        yield simulated


def model(family: str, directory: Path, **settings: Any) -> dict[str, Any]:
    path = str(WRITERS[family](directory / "model"))
    return {"type": family, "path": path, "dtype": "float32", **settings}


def test_the_simulation_tells_places_apart(gpu: SimulatedGpu) -> None:
    host = torch.tensor([1.0, 2.0])
    there = to_device(host, DEVICE)
    assert there.device == DEVICE and host.device.type == "cpu" and (there + 1).is_cuda
    with pytest.raises(RuntimeError, match="on the GPU and on the CPU"):
        there + host
    with pytest.raises(TypeError):
        there.numpy()
    assert (
        int(there[0]) == 1 and there.tolist() == [1, 2] and there[there > 1].cpu().tolist() == [2]
    )
    assert [name.strip("_") for name in gpu.waits] == ["int", "tolist", "getitem", "cpu"]
    layer = torch.nn.Linear(2, 1).to(DEVICE)
    assert layer(there).is_cuda and torch.arange(2, device=there.device).is_cuda
    with pytest.raises(RuntimeError, match="on the GPU and on the CPU"):
        layer(host)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava"])
def test_embedding_waits_for_no_row(
    family: str, packed: bool, tmp_path: Path, gpu: SimulatedGpu
) -> None:
    settings = model(family, tmp_path, packed=packed)
    backbone: Any = TypeAdapter(BackboneConfig).validate_python(settings).build()
    images, ids = photographs(5, tmp_path)
    items = [EmbedInput(image, f"is {'very ' * n}red") for n, image in enumerate(ids)]

    def vectors(name: str) -> Any:
        features = VisionCache(backbone, images, tmp_path / name)
        return embed(backbone, features, items, 2, lambda batches, _: batches, "embed")

    expected = vectors("cpu")
    assert not gpu.waits
    backbone.vlm.to(DEVICE)
    assert backbone.device == DEVICE
    assert np.array_equal(vectors("gpu"), expected)
    pictures, towers_waits = [images.load(image) for image in ids], []
    for num in (2, 5):
        gpu.waits.clear()
        features = backbone.encode_images(pictures[:num])
        assert all(gpu.holds(each.tokens) for each in features)
        towers_waits.append(len(gpu.waits))
    assert towers_waits[0] == towers_waits[1] <= 2
    counts = []
    with profiling.metering() as spent, torch.inference_mode():
        for num in (2, 5):
            inputs = backbone.inputs(items[:num], features[:num])
            gpu.waits.clear()
            made = backbone.module(inputs)
            profiling.add_tokens(inputs)
            counts.append(len(gpu.waits))
    assert gpu.holds(made) and spent.tokens > 0 and spent.padding > 0
    # Qwen3-VL puts DeepStack's features in their places in each of its first layers
    assert counts[0] == counts[1] <= (6 if family == "qwen3_vl" else 3)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_questions_wait_for_no_row(family: str, tmp_path: Path, gpu: SimulatedGpu) -> None:
    foundation = TypeAdapter(FoundationConfig).validate_python(model(family, tmp_path))
    captioner: Any = foundation.build()
    captioner.vlm.generation_config.eos_token_id = None  # all answers have one length
    captioner.vlm.generation_config.pad_token_id = captioner.processor.tokenizer.pad_token_id
    prompts = CaptioningSettings().prompts(foundation)
    images, ids = photographs(5, tmp_path)
    pairs = [(0, 1), (0, 1), (0, 2), (3, 1), (3, 1), (3, 4)] * 4
    requests = [CaptionRequest(ids[a], ids[b], "so " * n) for n, (a, b) in enumerate(pairs)]

    @torch.inference_mode()
    def asked(num: int, name: str) -> tuple[list[Any], list[float]]:
        eyes = VisionCache(captioner, images, tmp_path / name).get(
            [ids[place] for pair in pairs[:num] for place in pair]
        )
        gpu.waits.clear()
        answers = captioner.generate(prompts.rewrite, requests[:num], eyes, 4, [0.0], 0)
        return answers, captioner.yes_probability(prompts.verify, requests[:num], eyes)

    expected = asked(24, "cpu")
    captioner.vlm.to(DEVICE)
    asked(3, "gpu")
    few = len(gpu.waits)
    assert asked(24, "gpu") == expected
    # of each of the three parts of a conversation transformers looks whether it has padding
    assert len(gpu.waits) <= few + 2 * 3


@pytest.mark.parametrize("lora", [{}, {"dtype": "base"}])
def test_training_is_the_same_there(
    lora: dict[str, str], tmp_path: Path, gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradient caching, with a step checkpoint; adapters in float32 and with master weights."""

    def trained(name: str, place: Callable[[Any], Any]) -> tuple[Any, ...]:
        directory = tmp_path / name
        with monkeypatch.context() as patch:
            build = Qwen2VLSettings.build
            patch.setattr(Qwen2VLSettings, "build", lambda *given: place(build(*given)))
            patch.setattr(test_trainer, "create_accelerator", lambda: place(create_accelerator()))
            trainer = trainer_of(
                directory, directory, "k", 2, {"dtype": "bfloat16"} if lora else None,
                grad_cache_chunk_size=3, lora=LoraSettings(**lora),
            )  # fmt: skip
            gpu.waits.clear()
            log = trainer.run(iter)
        adapter = {name: value.detach().cpu() for name, value in trainer.parameters.items()}
        return log, adapter, trainer

    def moved(subject: Any) -> Any:
        if isinstance(subject, Accelerator):
            monkeypatch.setattr(subject.state, "device", DEVICE)
        else:
            subject.vlm.to(DEVICE)
        return subject

    log, expected, _ = trained("cpu", lambda subject: subject)
    there, adapter, trainer = trained("gpu", moved)
    # a mask of each chunk, the loss and the norm; `cpu` is of checkpoints
    assert sum(name != "cpu" for name in gpu.waits) <= 25 * len(log)
    assert all(gpu.holds(weight) for weight in trainer.parameters.values())
    assert there == log and adapter.keys() == expected.keys()
    assert all(torch.equal(adapter[name], value) for name, value in expected.items())


def loaded_copy(*args: Any, **kwargs: Any) -> Any:
    """A model with weights in memory of their own, not in that of its file."""
    loaded: Any = load_pretrained(*args, **kwargs)
    for weight in loaded.parameters():
        weight.data = weight.data.clone()
    return loaded


@pytest.mark.parametrize(
    "name",
    ["tiny", *(pytest.param(name, marks=pytest.mark.full) for name in [*sorted(WRITERS), *LOSSES])],
)
def test_a_run_is_the_same_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All files of a run, and of its cache."""
    tiny = VERY_SMALL["model"]
    model = tiny if name == "tiny" else model_of(name, tmp_path)
    texts = {"foundation": model, "captioning": LAX} if name.startswith("qwen") else NO_TEXTS
    changes = {} if name == "tiny" else {"model": model, **texts}

    def run(place: str) -> dict[str, str]:
        directory = tmp_path / place
        runtime = {**VERY_SMALL["runtime"], "cache_dir": directory / "cache"}
        settings = {**VERY_SMALL, **changes, "runtime": runtime}
        runner.run(RunConfig(experiment_dir=directory / "run", **settings))
        return tree(directory)

    # the last bit of one row's projection hangs on where weights lie: in their file, or copied
    monkeypatch.setattr(blip2, "load_pretrained", loaded_copy)
    # which beside a function mode torch's multi-head attention does not take
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)
    expected = run("cpu")
    simulate(monkeypatch.setattr)
    with SimulatedGpu() as gpu:
        there = run("gpu")
    assert there.keys() == expected.keys() and len(there) > 10
    assert len(gpu.kept) > 1000
    assert there == expected


def test_mining_finds_the_same_there(gpu: SimulatedGpu) -> None:
    drawn = np.random.default_rng(0).normal(size=(60, 16)).astype(np.float32)
    unit = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    queries, gallery = unit[:10], unit[10:]
    expected = topk(queries, gallery, 5, "cpu")
    found = topk(queries, gallery, 5, "cuda:0")
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
    assert gpu.waits


def test_a_batch_is_fetched_when_the_next_is_made() -> None:
    events: list[str] = []

    def made() -> Iterator[int]:
        for number in range(3):
            events.append(f"made {number}")
            yield number

    for number in one_behind(made()):
        events.append(f"fetched {number}")
    assert events == ["made 0", "made 1", "fetched 0", "made 2", "fetched 1", "fetched 2"]
    assert [*one_behind([])] == []


def test_a_copy_on_the_host_has_memory_of_its_own() -> None:
    values = torch.arange(3)
    copied = to_host(values[1:])
    assert copied().tolist() == [1, 2]
    assert copied().untyped_storage().nbytes() == 2 * values.element_size()


def test_a_copy_that_is_not_waited_for_holds_nothing(gpu: SimulatedGpu) -> None:
    values = to_device(torch.tensor([1.0, 2.0]), DEVICE) + 1
    early = values.to("cpu", non_blocking=True)
    copied = to_host(values)
    assert early.isnan().all()
    assert copied().tolist() == [2, 3] and not gpu.waits


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava"])
def test_embeddings_on_a_gpu_are_those_of_the_cpu(
    family: str, attention: str, tmp_path: Path
) -> None:
    settings = model(family, tmp_path, attention=attention)
    backbone: Any = TypeAdapter(BackboneConfig).validate_python(settings).build()
    images, ids = photographs(5, tmp_path)
    items = [EmbedInput(image, "is red") for image in ids]
    made = []
    for device in ("cuda", "cpu"):
        backbone.vlm.to(device)
        features = VisionCache(backbone, images, tmp_path / device)
        made.append(embed(backbone, features, items, 2, lambda batches, _: batches, "embed"))
    assert np.abs(made[0] - made[1]).max() < 1e-3


@pytest.mark.gpu
def test_a_copy_does_not_wait_for_what_is_asked_later() -> None:
    """Products of large matrices follow the copy; they still run when the copy is there."""
    device = torch.device("cuda")
    matrix = torch.randn(8192, 8192, device=device)
    values = to_device(torch.arange(1000), device) * 2
    copied = to_host(values)
    for _ in range(50):
        matrix = matrix @ matrix.clamp(-1, 1)
    done = torch.cuda.current_stream().record_event()
    assert copied().tolist() == list(range(0, 2000, 2))
    assert not done.query()
