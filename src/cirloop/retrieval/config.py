"""Settings of FAISS indexes. They change what is found, so they are part of what is
fingerprinted."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cirloop.config.base import Settings

Search = Literal["exact", "flat", "ivf", "ivf_pq", "hnsw"]
SETTINGS_BY_INDEX: dict[Search, set[str]] = {
    "ivf": {"nlist", "nprobe", "training_size"},
    "ivf_pq": {"nlist", "nprobe", "training_size", "m", "nbits", "candidates"},
}
"""The settings that each kind of index reads; the others read none."""


class IndexSettings(Settings):
    """How an approximate index is built and searched; 0 = by the gallery's size G and the vectors'
    width D."""

    nlist: int = Field(0, ge=0)
    """ivf, ivf_pq: lists the gallery is split into; 0 = 4 sqrt(G), at most one per 39 images."""
    nprobe: int = Field(0, ge=0)
    """ivf, ivf_pq: lists searched per query; 0 = a sixteenth of them."""
    training_size: int = Field(0, ge=0)
    """ivf, ivf_pq: images, drawn at random, that lists and codes are learnt from; 0 = 64 a list, 39
    a code at least."""
    m: int = Field(0, ge=0)
    """ivf_pq: parts a vector is cut into, each kept as one code; divides D. 0 = D / 4, or D where 4
    is no divisor."""
    nbits: int = Field(8, ge=1, le=16)
    """ivf_pq: bits of a code."""
    candidates: int = Field(4, ge=1)
    """ivf_pq: images looked up by their codes per image wanted; they are then scored exactly."""

    def ignored_settings(self, search: Search) -> list[str]:
        """List the changed settings that an index of this kind does not read."""
        fields = type(self).model_fields
        changed = [name for name in fields if getattr(self, name) != fields[name].default]
        return [name for name in changed if name not in SETTINGS_BY_INDEX.get(search, set())]
