"""Running out of memory is told from other errors, and said with what to set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cirloop.captioning.base import CaptionRequest
from cirloop.captioning.batched_captioner import BatchedCaptioner
from cirloop.captioning.foundation import Qwen2VLFoundation
from cirloop.captioning.prompts import load
from cirloop.data import ShapesSettings
from cirloop.monitoring import oom
from cirloop.negatives import MiningSettings
from cirloop.negatives.base import MiningContext
from cirloop.negatives.miner import MiningInputs, mine
from cirloop.types import UserError

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    ("error", "so"),
    [
        (FULL, True),
        (
            RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
            ),
            True,
        ),
        (MemoryError(), True),
        (RuntimeError("Error in void* faiss::gpu: err == cudaMalloc error out of memory"), True),
        (RuntimeError("size mismatch"), False),
    ],
)
def test_running_out_of_memory_is_told_from_other_errors(error: Exception, so: bool) -> None:
    with (
        pytest.raises(UserError if so else type(error)) as caught,
        oom.explain_oom("mining", "Set mining.search."),
    ):
        raise error
    assert ("mining.search" in str(caught.value)) == so


def test_captioning_names_what_to_set(tmp_path: Path) -> None:
    train = ShapesSettings(train_families=2, train_triplets=2, eval_families=2).build().train
    captioner: Any = Qwen2VLFoundation(path="tiny", dtype="float32").build()
    eyes = BatchedCaptioner(captioner, train.images, tmp_path, 3, lambda batches, _: batches)
    asks = [CaptionRequest(train.gallery.ids[i], train.gallery.ids[i + 1], "") for i in range(3)]

    def full(*_: Any) -> None:
        raise FULL

    captioner.vlm.get_input_embeddings().register_forward_pre_hook(full)
    for ask in (lambda: eyes.generate(load("rewrite-json-1"), asks, 4, [0.0], 0, "write"),
                lambda: eyes.yes_probability(load("verify-1"), asks, "verify")):  # fmt: skip
        with pytest.raises(UserError, match="3 questions at once: CUDA out of memory") as caught:
            ask()
        assert "captioning.batch_size" in str(caught.value)
        assert "foundation.max_pixels" in str(caught.value)


class Full(np.ndarray[Any, Any]):
    """A gallery of which no row can be read: the property that memory does not suffice for it."""

    def __getitem__(self, key: Any) -> Any:
        raise MemoryError("Unable to allocate 9.00 TiB for an array")


def test_mining_names_what_to_set() -> None:
    vectors = MiningInputs(
        np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32).view(Full), np.arange(4)
    )
    context = MiningContext(0, 0, 1, [str(i) for i in range(4)])
    with pytest.raises(UserError, match="mining 4 images: Unable to allocate") as caught:
        list(mine(MiningSettings(), vectors, context))
    assert "mining.search" in str(caught.value)
