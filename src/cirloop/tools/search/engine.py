"""One query to the best images of a gallery: what the command and the page both answer with.

An image with a text is a composed query. An image alone is embedded as a gallery image is, so
what is found looks like it. A text alone is asked about a grey image, as `eval_iterative.py
--ablate image` does: the models are trained on pairs. N images, M vectors of one, D dimensions.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image

from cirloop.backbones import EmbedInput
from cirloop.backbones.base import Backbone
from cirloop.backbones.features import VisionCache
from cirloop.backbones.similarity import mean_pool, similarity
from cirloop.cli.iterations import BASE, BEST
from cirloop.data import triplets
from cirloop.data.images import BadImage, InlineImage, decode
from cirloop.evaluation.best import Best
from cirloop.retrieval.arrays import Floats, Vectors
from cirloop.retrieval.dense import best_positions
from cirloop.retrieval.embed import DecodedImages, embed_once
from cirloop.tools.search.config import MAX_K, SearchOptions
from cirloop.tools.search.gallery import SearchGallery, of_folder, of_run
from cirloop.tools.search.index import Index, gallery_vectors
from cirloop.tools.search.models import RunModels, source_of
from cirloop.types import ImageId, UserError

logger = logging.getLogger(__name__)
MAX_TEXT = triplets.MAX_TEXT
"""Characters of a text."""
MAX_FILE = 64 << 20
"""Bytes of an image given as a reference."""
MODELS = 2
"""Models in memory at once."""
GREY = 128


@dataclass(frozen=True, slots=True)
class UploadedImage:
    """An image that is not, or not known to be, one of the gallery; `digest` is of its file's
    bytes."""

    digest: str
    pixels: Image.Image


Reference = ImageId | UploadedImage


@dataclass(frozen=True, slots=True)
class Hit:
    """An image found: its cosine with the query, the largest one where it has several vectors, and
    place from 1."""

    image: ImageId
    score: float
    rank: int


@dataclass(frozen=True, slots=True)
class Answer:
    """The best images, best first, ties by id; `ms` from the query to them."""

    hits: tuple[Hit, ...]
    ms: float


def decode_upload(content: bytes, name: str) -> UploadedImage:
    """Return an image from a file's bytes. Raises UserError with what is wrong with it."""
    if len(content) > MAX_FILE:
        raise UserError(f"{name} has more than {MAX_FILE:,} bytes. Give a smaller image.")
    digest = hashlib.sha256(content).hexdigest()
    try:
        return UploadedImage(digest, decode(InlineImage(name, digest, lambda: content)))
    except BadImage as error:
        raise UserError(f"{name} {error}. Give another image.") from None


class Searcher:
    """One model over one gallery. Not for several threads at once."""

    def __init__(
        self, backbone: Backbone, features: VisionCache, gallery: SearchGallery, vectors: Vectors
    ) -> None:
        self._backbone = backbone
        self._features = features
        self._gallery = gallery
        self._vectors = vectors
        self._rows = {image: row for row, image in enumerate(gallery.ids)}

    def search(
        self, reference: Reference | None, text: str | None, k: int, keep: bool
    ) -> tuple[Hit, ...]:
        """Return the best `k`; without `keep`, images that are the reference are left out."""
        scores_N = similarity(self._query(reference, text), cast(Floats, self._vectors))[0]
        out = [] if keep else self._same(reference)
        scores_N[out] = -np.inf
        best = best_positions(scores_N, min(k, len(scores_N) - len(out)))
        ids = self._gallery.ids
        return tuple(Hit(ids[row], float(scores_N[row]), rank) for rank, row in enumerate(best, 1))

    def _query(self, reference: Reference | None, text: str | None) -> Floats:
        """Return the query's vector (1, D)."""
        if isinstance(reference, str):
            vectors = embed_once(self._backbone, self._features, [EmbedInput(reference, text)])
        else:
            pixels = self._grey() if reference is None else reference.pixels
            vectors = embed_once(
                self._backbone,
                DecodedImages(self._backbone, [pixels]),
                [EmbedInput(ImageId(""), text)],
            )
        return mean_pool(vectors) if text is None else vectors

    def _grey(self) -> Image.Image:
        """Of the size of the gallery's first image: models see sizes."""
        size = self._gallery.images.load(self._gallery.ids[0]).size
        return Image.new("RGB", size, (GREY, GREY, GREY))

    def _same(self, reference: Reference | None) -> list[int]:
        """Return the rows of a reference: a gallery's own, or those of the same file's bytes."""
        if isinstance(reference, UploadedImage):
            images = self._gallery.images
            return [
                row for image, row in self._rows.items() if images.digest(image) == reference.digest
            ]
        return [] if reference is None else [self._rows[reference]]


class Engine:
    """A run's models, or a named one, over one gallery; at most MODELS of them in memory. Threads
    may share it."""

    def __init__(self, options: SearchOptions) -> None:
        self._models = source_of(options)
        self.name = self._models.name
        self.has_iterations = isinstance(self._models, RunModels)
        self.cache = options.cache_dir or self._models.cache
        self.notices = self._models.notices
        for notice in self.notices:
            logger.warning("%s", notice)
        if options.gallery is not None:
            allow = options.allow_missing_images, options.allow_symlinks
            self.gallery = of_folder(options.gallery, self.cache, *allow)
        else:
            assert isinstance(self._models, RunModels)
            self.gallery = of_run(self._models.config)
        self._ids = frozenset(self.gallery.ids)
        self._searchers: OrderedDict[str, Searcher] = OrderedDict()
        self._lock = threading.Lock()

    def labels(self) -> list[str]:
        """Return the models there are by now: `base`, and a run's finished iterations."""
        return self._models.labels()

    def label(self, iteration: str | None) -> str:
        """Return the model asked for, the best by now where that is None. Raises UserError for one
        that there is not."""
        return self._models.label(iteration or BEST)

    def best(self) -> Best | None:
        """Return what the best iteration is by now; None where none is evaluated, or there is no
        run."""
        return self._models.best()

    def load(self, label: str, backbone: Backbone | None = None) -> Searcher:
        """Return the model, `backbone` where it is loaded already, and its index, loaded and
        brought up to date if they are not there yet."""
        if label in self._searchers:
            self._searchers.move_to_end(label)
            return self._searchers[label]
        while len(self._searchers) >= MODELS:
            self._searchers.popitem(last=False)
        backbone = backbone or self._models.build(label)
        runtime = self._models.runtime
        features = VisionCache(backbone, self.gallery.images, self.cache / "vision", runtime)
        index = Index(self.cache / "search", backbone.fingerprint, self.gallery.key)
        vectors = gallery_vectors(index, backbone, features, self.gallery, runtime)
        self._searchers[label] = Searcher(backbone, features, self.gallery, vectors)
        return self._searchers[label]

    def warm_up(self, label: str) -> None:
        """Load a model and ask it something, so that the first query is as fast as the others."""
        began = time.monotonic()
        self.search(label, self.gallery.ids[0], "the same", 1)
        logger.info(
            "%s of %s answers; made ready in %.1f s",
            "the base" if label == BASE else f"iteration {label}",
            self.name,
            time.monotonic() - began,
        )

    def reference(self, name: str) -> Reference:
        """Return the image that an id of the gallery or, where it is none, a path stands for."""
        if name in self._ids:
            return ImageId(name)
        path = Path(name)
        way = f"Give the id of an image of {self.gallery.name}, or a path."
        try:
            if not path.is_file():  # nor a pipe or a device, which are not waited for
                raise UserError(
                    f"reference {name!r:.300} is no image of the gallery, and no file. {way}"
                )
            if path.stat().st_size > MAX_FILE:
                raise UserError(
                    f"reference {name!r:.300} has more than {MAX_FILE:,} bytes. Give a smaller"
                    " image."
                )
            content = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"reference {name!r:.300} cannot be read ({error.strerror}). {way}"
            ) from None
        return decode_upload(content, name)

    def known(self, name: str) -> ImageId:
        """Return the id `name`, which is one of the gallery. Raises UserError: a path is none."""
        if name not in self._ids:
            raise UserError(f"reference {name!r:.200} is no image of {self.gallery.name}.")
        return ImageId(name)

    def search(
        self, label: str, reference: Reference | None, text: str | None, k: int, keep: bool = False
    ) -> Answer:
        """Answer a query. Raises UserError where nothing is asked for, or not in the way it can
        be."""
        if text is not None:
            check_text(text)
        if reference is None and text is None:
            raise UserError("nothing to search for: give a reference image, a text, or both.")
        if not 1 <= k <= MAX_K:
            raise UserError(f"k is {k}; it must be from 1 to {MAX_K}.")
        with self._lock:
            searcher = self.load(label)
            began = time.perf_counter()
            hits = searcher.search(reference, text, k, keep)
            return Answer(hits, 1000 * (time.perf_counter() - began))


def check_text(text: object) -> None:
    """Raise UserError for a text that no query can have."""
    if not isinstance(text, str):
        raise UserError(f"the text is a {type(text).__name__}. Give a string.")
    if not text.strip():
        raise UserError("the text is empty. Say what should be different, or leave it out.")
    if len(text) > MAX_TEXT:
        raise UserError(
            f"the text has {len(text):,} characters, more than {MAX_TEXT:,}. Give a shorter one."
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"the text {text!r:.100} is not Unicode text.") from None
