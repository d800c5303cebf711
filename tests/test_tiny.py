"""The embedded model: within its limits of size, and able to do what the loop asks of a foundation
model."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Qwen2VLForConditionalGeneration

from cirloop.backbones.weights import resolve
from cirloop.captioning import CaptioningSettings
from cirloop.captioning.batched_captioner import BatchedCaptioner
from cirloop.captioning.foundation import Qwen2VLFoundation
from cirloop.captioning.pipeline import check_format, generate_candidates, select, verify
from cirloop.data import ShapesSettings
from cirloop.data.shapes.splits import FAMILY_SIZE
from cirloop.types import ImageId, MinedNegative, Triplet


def test_is_small() -> None:
    directory = resolve("tiny", "qwen2_vl")
    model = Qwen2VLForConditionalGeneration.from_pretrained(directory)
    assert sum(p.numel() for p in model.parameters()) <= 8_000_000
    assert sum(f.stat().st_size for f in directory.iterdir()) <= 20e6


@pytest.mark.full
def test_accepted_texts_are_mostly_true(cache: Path) -> None:
    """For images of the reference's family, one to three changes away; greedy, without the
    embedder's check."""
    train = ShapesSettings(train_families=20, train_triplets=160).build().train
    oracle, ids, row = train.oracle, train.gallery.ids, train.gallery.rows()
    assert oracle is not None

    def confusion(triplet: Triplet) -> ImageId:
        start = row[triplet.query.reference] // FAMILY_SIZE * FAMILY_SIZE
        others = (image for image in ids[start : start + FAMILY_SIZE] if image != triplet.target)
        return next(
            image for image in others if 1 <= oracle.distance(triplet.query.reference, image) <= 3
        )

    mined = [
        MinedNegative(t.query.id, confusion(t), 1, 0.5, 2, 0.4, "top_k") for t in train.triplets
    ]
    settings = CaptioningSettings(num_candidates=1)
    captioner = Qwen2VLFoundation(path="tiny", dtype="float32").build()
    eyes = BatchedCaptioner(
        captioner, train.images, cache / "vision", settings.batch_size, lambda items, _: items
    )
    queries = {t.query.id: t.query for t in train.triplets}
    candidates = generate_candidates(eyes, mined, queries, settings, 0)
    candidates = verify(eyes, [check_format(c, settings) for c in candidates], settings)
    accepted, _ = select(candidates, set(), settings, 1, "tiny")
    texts = [(a.triplet.query.reference, a.triplet.query.text, a.triplet.target) for a in accepted]
    true = sum(oracle.text_is_true(*text) for text in texts)
    assert len(accepted) >= len(mined) / 3
    assert true >= 0.8 * len(accepted), f"true {true} of {len(accepted)}"
