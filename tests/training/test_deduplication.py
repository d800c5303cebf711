"""In a step equal inputs are embedded once and images prepared once; the gradient is that of each
row for itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from cirloop.backbones import BackboneConfig, EmbedInput, LoraSettings
from cirloop.backbones.features import VisionCache
from cirloop.backbones.similarity import similarity
from cirloop.data import ShapesSettings
from cirloop.distributed.worker import create_accelerator
from cirloop.training import TrainingSettings
from cirloop.training.batches import Batch, BatchSampler
from cirloop.training.losses import CandidateMasks
from cirloop.training.trainer import Trainer
from cirloop.types import ImageId, Query, QueryId, Triplet
from tests.test_models_loop import clip

TINY = {"type": "qwen2_vl", "path": "tiny", "dtype": "float32"}


class Seen:
    """The embedder's images, and how often each was loaded for it; the rows that its module was
    called with."""

    def __init__(self, images: Any) -> None:
        self._images, self.loads, self.rows = images, Counter[ImageId](), Counter[str]()

    def load(self, image: ImageId) -> Any:
        self.loads[image] += 1
        return self._images.load(image)

    def digest(self, image: ImageId) -> str:
        digest: str = self._images.digest(image)
        return digest

    def note(self, module: Any, args: Any) -> None:
        """As a hook before each call: rows with a text are queries."""
        inputs = args[0]
        if "image_of" in inputs:
            self.rows["pixels"] += len(inputs["images"])
            self.rows["query" if "text" in inputs else "candidate"] += len(inputs["image_of"])
        else:
            self.rows["all"] += len(inputs["input_ids"])


def doubled(triplets: list[Triplet]) -> Batch:
    """Seven queries: the third asks the first's question, the fourth and fifth of the first's
    reference, the sixth's reference is the first's target. Of seven candidates the last stands
    there a second time, known as right."""
    a, b, _, d, e, f, g = triplets
    reference = a.query.reference
    again = Query(QueryId("again"), reference, a.query.text)
    same = [replace(query, reference=reference) for query in (d.query, e.query)]
    asked = [a.query, b.query, again, *same, replace(f.query, reference=a.target), g.query]
    rows = [Triplet(q, t.target) for q, t in zip(asked, triplets, strict=True)]
    made = BatchSampler(rows, [], [], 7, 0.0, 0, 5)[0]
    last = (made.target_B == 0)[:, None] | made.known_positive_BN[:, :1]
    known = np.concatenate([made.known_positive_BN, last], axis=1)
    candidates = (*made.candidates, made.candidates[0])
    return replace(made, candidates=candidates, known_positive_BN=known)


def trainer_of(model: dict[str, Any], work: Path, chunk_size: int) -> tuple[Trainer, Seen]:
    """On a batch that repeats itself, with weights that all have a gradient, in float64 and without
    dropout."""
    data = ShapesSettings(train_families=4, train_triplets=24, eval_families=2).build().train
    backbone: Any = TypeAdapter(BackboneConfig).validate_python(model).build()
    is_clip = model["type"] == "clip_combiner"
    lora = {} if is_clip else {"lora": LoraSettings(dropout=0.0)}
    options = TrainingSettings(batch_size=7, grad_cache_chunk_size=chunk_size, **lora)
    backbone.make_trainable(options, seed=3)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(backbone.trainable().items()):
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(number))
    backbone.module.double()
    seen = Seen(data.images)
    backbone.module.register_forward_pre_hook(seen.note)
    triplets = list({t.target: t for t in data.triplets}.values())[:7]
    features: Any = VisionCache(backbone, seen, work / "vision")  # type: ignore[arg-type]
    batches: Any = {0: doubled(triplets)}
    rest = (1, 0, "", work, 0, create_accelerator())
    trainer = Trainer(backbone, features, batches, options, *rest)
    trainer.module.train()
    return trainer, seen


@pytest.mark.parametrize("chunk_size", [0, 2])
def test_a_step_makes_all_its_vision_features_in_one_go(
    chunk_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, seen = trainer_of(TINY, tmp_path, chunk_size)
    computed: list[int] = []
    compute = VisionCache.compute

    def counted(self: VisionCache, batches: Any, *args: Any) -> None:
        computed.extend([sum(map(len, batches))] * bool(batches))
        compute(self, batches, *args)

    monkeypatch.setattr(VisionCache, "compute", counted)
    trainer.engine.backward(0)
    assert computed == [len(seen.loads)] and {*seen.loads.values()} == {1}


def taken(trainer: Trainer) -> torch.Tensor:
    grads = [p.grad.flatten().clone() for p in trainer.parameters.values() if p.grad is not None]
    assert len(grads) == len(trainer.parameters)
    trainer.optimizer.zero_grad()
    return torch.cat(grads)


def plainly(trainer: Trainer) -> tuple[float, torch.Tensor]:
    """Loss and gradient with every row embedded in a call of its own."""
    batch = trainer.batches[0]

    def embed(items: list[EmbedInput]) -> torch.Tensor:
        module, inputs_of = trainer.backbone.module, trainer.engine._inputs_of
        return torch.cat([module(inputs_of([item])) for item in items])

    queries = embed([EmbedInput(q.reference, q.text) for q in batch.queries])
    candidates = embed([EmbedInput(image) for image in batch.candidates])
    arrays = (batch.target_B, batch.known_positive_BN, batch.hard_negatives_BK)
    masks = map(torch.from_numpy, arrays)
    loss = trainer.engine.loss(similarity(queries, candidates), CandidateMasks(*masks))
    loss.backward()
    return float(loss.detach()), taken(trainer)


@pytest.mark.parametrize("chunk_size", [0, 3])
@pytest.mark.parametrize("kind", ["qwen2_vl", "clip"])
def test_equal_inputs_are_embedded_once_and_change_nothing(
    kind: str, chunk_size: int, tmp_path: Path
) -> None:
    model = TINY if kind == "qwen2_vl" else clip(tmp_path, train_clip=True, combiner="sum")
    trainer, seen = trainer_of(model, tmp_path, chunk_size)
    loss = trainer.engine.backward(0)
    ours, calls = taken(trainer), 2 if chunk_size else 1
    rows = Counter({name: num // calls for name, num in seen.rows.items()})
    plain_loss, plain = plainly(trainer)
    assert abs(loss - plain_loss) < 1e-6 * plain_loss
    assert float((ours - plain).norm()) < 1e-6 * float(plain.norm())
    batch = trainer.batches[0]
    images = {*batch.candidates, *(q.reference for q in batch.queries)}
    # each image is prepared once, whoever asks for it
    assert seen.loads == Counter(dict.fromkeys(images, 1))
    assert (len(batch.queries), len(batch.candidates)) == (7, 8)
    if kind == "qwen2_vl":
        assert rows == {"all": 6 + 7}
    else:
        queries = list(dict.fromkeys((q.reference, q.text) for q in batch.queries))
        size = chunk_size or 7
        references = [{image for image, _ in queries[i : i + size]} for i in range(0, 6, size)]
        assert rows == {"query": 6, "candidate": 7, "pixels": 7 + sum(map(len, references))}
        assert rows["pixels"] < 6 + 7, "references repeat within a chunk"
