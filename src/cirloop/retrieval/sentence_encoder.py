"""A sentence encoder for texts, in place of the embedder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from cirloop.backbones.weights import weights_digest
from cirloop.retrieval.arrays import Floats
from cirloop.retrieval.embed import check_finite


class SentenceEncoder:
    """A transformers encoder: the mean of its last hidden states over a text's tokens, of unit
    norm. `cut` counts texts too long for it, of which the end is not read."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        self._model: Any = AutoModel.from_pretrained(
            directory, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        ).eval()
        self._model.to("cuda" if torch.cuda.is_available() else "cpu")
        longest = getattr(self._model.config, "max_position_embeddings", None) or 1 << 20
        self._longest = min(longest, self._tokenizer.model_max_length)
        self.fingerprint = weights_digest(directory)
        self.cut = 0

    @torch.inference_mode()
    def vectors(self, texts: Sequence[str]) -> Floats:
        """Return the vectors (B, E) of a batch."""
        uncut_ids = self._tokenizer(list(texts))["input_ids"]
        self.cut += sum(len(ids) > self._longest for ids in uncut_ids)
        cut_at = {"truncation": True, "max_length": self._longest}
        batch = self._tokenizer(list(texts), padding=True, return_tensors="pt", **cut_at)
        batch = batch.to(self._model.device)
        hidden = self._model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"][:, :, None].float()
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        vectors: Floats = F.normalize(mean, dim=-1).cpu().numpy()
        check_finite(texts, vectors)
        return vectors
