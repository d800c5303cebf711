"""One encoder: mining, evaluation, training, and the tool without a cache give the same vectors,
whatever the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from cirloop.backbones import BackboneConfig, EmbedInput
from cirloop.backbones.features import VisionCache
from cirloop.data import ShapesSettings
from cirloop.distributed.worker import create_accelerator
from cirloop.retrieval.embed import DecodedImages, embed, embed_once, query_items
from cirloop.training import TrainingSettings
from cirloop.training.batches import BatchSampler
from cirloop.training.trainer import Trainer
from tests.backbones.tiny_models import WRITERS
from tests.test_models_loop import model_of

MODELS = [
    *WRITERS,
    "blip2",
    "clip sum",
    "clip combiner",
    "clip attention_fusion",
    "clip combiner trained",
    "towers",
]


@pytest.mark.parametrize("name", MODELS)
def test_all_paths_give_the_same_vectors(name: str, tmp_path: Path) -> None:
    train = ShapesSettings(train_families=2, train_triplets=10, eval_families=2).build().train
    backbone: Any = TypeAdapter(BackboneConfig).validate_python(model_of(name, tmp_path)).build()
    features = VisionCache(backbone, train.images, tmp_path / "cache")
    queries = query_items([t.query for t in train.triplets])
    images = [EmbedInput(image) for image in train.gallery.ids]
    searched = [
        embed(backbone, features, items, 3, lambda batches, _: batches, "")
        for items in (queries, images)
    ]
    if name != "clip sum":  # which has nothing to train while CLIP is frozen
        settings = TrainingSettings(batch_size=4)
        backbone.make_trainable(settings, 0)
        batches = BatchSampler(train.triplets, [], [], 4, 0.0, 0, 0)
        trainer = Trainer(
            backbone, features, batches, settings, 1, 0, "", tmp_path / "w", 0, create_accelerator()
        )
        trainer.module.eval()  # without dropout
        with torch.no_grad():
            trained = [
                made.numpy()
                for made in trainer.module(
                    [trainer.engine._inputs_of(each) for each in (queries, images)]
                )
            ]
        for one, other in zip(searched, trained, strict=True):
            assert one.shape == other.shape and np.abs(one - other).max() < 1e-5
    decoded = DecodedImages(backbone, [train.images.load(image) for image in train.gallery.ids])
    from_pixels = embed_once(backbone, decoded, [EmbedInput(image) for image in train.gallery.ids])
    assert np.abs(from_pixels - searched[1]).max() < 1e-5
    assert np.abs(np.linalg.norm(searched[0], axis=-1) - 1).max() < 1e-5
    assert searched[1].ndim == (3 if name == "blip2" else 2)
