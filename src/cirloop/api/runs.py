"""`cirloop.load_run`: a run's results, its embedders, and searching with them.

N images, Q queries, M vectors of an image, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cirloop.types import ImageId, UserError

if TYPE_CHECKING:
    from PIL import Image

    from cirloop.artifacts.store import Store
    from cirloop.config.run import RunConfig
    from cirloop.data.images import ImageFile
    from cirloop.retrieval.arrays import Floats
    from cirloop.tools.search.engine import Engine, Hit, Reference
    from cirloop.validation import ValidationReport


def load_run(directory: str | Path, gallery: str | Path | None = None) -> Run:
    """Open a run directory for reading; the run may still be going on. No model is loaded.

    `gallery` is a folder of images to search, by default the gallery that the run evaluates on.
    Raises UserError where it is no run directory, or is damaged.
    """
    from cirloop.config import notices
    from cirloop.config.run_dir import run_directory

    config, store = run_directory(Path(directory))
    notices.refuse_simulated(config, "to load")
    return Run(config, store, None if gallery is None else Path(gallery))


class Run:
    """A run directory, opened for reading by `cirloop.load_run`."""

    def __init__(self, config: RunConfig, store: Store, gallery: Path | None) -> None:
        self.config = config
        """The run's settings."""
        self.directory = store.directory
        self._gallery = gallery
        self._embedder: RunEmbedder | None = None

    @property
    def iterations(self) -> list[int]:
        """The iterations that are finished by now; 0 is the warm-up."""
        from cirloop.cli.iterations import done_iterations

        return done_iterations(self._store())

    @property
    def results(self) -> list[dict[str, Any]]:
        """The evaluations up to now, the base model's first: each a dict with `iteration`,
        `metrics` and `standard_errors`, fractions by the metric's name."""
        from cirloop.artifacts import schema
        from cirloop.loop import RESULTS

        path = self.directory / RESULTS
        if not path.is_file():
            return []
        results: list[dict[str, Any]] = schema.read(path)["results"]
        return results

    def embedder(self, iteration: int | str = "best") -> RunEmbedder:
        """Load the model of an iteration: a number, "best" by the run's evaluations, "last", or
        "base", the base model. Raises UserError for an iteration that there is not, and for the
        best where nothing is evaluated."""
        from cirloop.cli.iterations import select_iteration

        label = select_iteration(str(iteration), self._store(), "iteration")
        if self._embedder is None or self._embedder.iteration != label:
            self._embedder = RunEmbedder(self.config, label, self._gallery)
        return self._embedder

    def search(
        self,
        image: Image.Image | str | Path | None = None,
        text: str | None = None,
        k: int = 10,
        *,
        iteration: int | str = "best",
    ) -> list[Hit]:
        """Return the best images for a query, as `RunEmbedder.search` does."""
        return self.embedder(iteration).search(image, text, k)

    def _store(self) -> Store:
        """Return what the run has by now."""
        from cirloop.config.run_dir import run_directory

        return run_directory(self.directory)[1]


class RunEmbedder:
    """One model of a run, which embeds as the run does. Not for several threads at once."""

    def __init__(self, config: RunConfig, iteration: str, gallery: Path | None) -> None:
        self.iteration = iteration
        """`base`, or the iteration's number."""
        self._config = config
        self._gallery = gallery
        from cirloop.tools.search.models import RunModels

        self._backbone = RunModels(config.directory).build(iteration)

    @property
    def fingerprint(self) -> str:
        """The digest of all that decides a vector: vectors of two are never to be compared."""
        return self._backbone.fingerprint

    def embed_images(self, images: Sequence[Image.Image | str | Path]) -> Floats:
        """Return vectors (N, D) of gallery images, of unit norm; (N, M, D) where the model gives an
        image M vectors.

        An image is one of Pillow's, or the path of a file. Raises UserError with every image that
        cannot be used.
        """
        return self._embed(images, None)

    def embed_queries(
        self, images: Sequence[Image.Image | str | Path], texts: Sequence[str]
    ) -> Floats:
        """Return vectors (Q, D) of composed queries, of unit norm: each image with its text.

        Raises UserError with every image that cannot be used, and for a text that is empty.
        """
        return self._embed(images, texts)

    def search(
        self,
        image: Image.Image | str | Path | None = None,
        text: str | None = None,
        k: int = 10,
        *,
        keep_reference: bool = False,
    ) -> list[Hit]:
        """Return the best `k` images of the gallery, best first, each with `image`, `score` and
        `rank`.

        `image` is an image of the gallery by its id, the path of a file, or one of Pillow's; alone,
        it finds images that look like it. `text` says what should be different; alone, what to
        find. The first call embeds the gallery, or reads the index of the run's cache directory.
        `keep_reference` lets the image itself be among the results. Raises UserError.
        """
        from cirloop.reproducibility import prepared_process

        with prepared_process():
            reference = None if image is None else self._reference(image)
            engine = self._engine
            return list(engine.search(self.iteration, reference, text, k, keep_reference).hits)

    @cached_property
    def _engine(self) -> Engine:
        """What searches the gallery with this model, which is in memory once."""
        from cirloop.tools.search.config import SearchOptions
        from cirloop.tools.search.engine import Engine

        options = SearchOptions(experiment_dir=self._config.directory, gallery=self._gallery)
        engine = Engine(options)
        engine.load(self.iteration, self._backbone)
        return engine

    def _reference(self, image: Image.Image | str | Path) -> Reference:
        from cirloop.data.images import in_memory
        from cirloop.tools.search.engine import decode_upload

        if isinstance(image, str | Path):
            return self._engine.reference(str(image))
        return decode_upload(in_memory(image, "the image").read(), "the image")

    def _embed(
        self, images: Sequence[Image.Image | str | Path], texts: Sequence[str] | None
    ) -> Floats:
        from cirloop.backbones import EmbedInput
        from cirloop.backbones.features import VisionCache
        from cirloop.data.images import FileImages
        from cirloop.monitoring.console import progress
        from cirloop.reproducibility import prepared_process
        from cirloop.retrieval.embed import embed

        files = _checked(images, texts)
        words = [None] * len(files) if texts is None else texts
        items = [EmbedInput(image, text) for image, text in zip(files, words, strict=True)]
        runtime = self._config.runtime
        features = VisionCache(
            self._backbone, FileImages(files), self._config.cache / "vision", runtime
        )
        size = runtime.embed_batch_size
        tokens = runtime.max_tokens_per_batch
        with prepared_process():
            return embed(self._backbone, features, items, size, progress, "embed", tokens)


def _checked(
    images: Sequence[Image.Image | str | Path], texts: Sequence[str] | None
) -> dict[ImageId, ImageFile]:
    """Return images by their numbers. Raises UserError with all that is wrong with images and
    texts."""
    from cirloop.data.image_check import WORKERS, unreadable_images
    from cirloop.tools.search.engine import check_text
    from cirloop.validation import ValidationReport

    problems = ValidationReport()
    if texts is not None and len(texts) != len(images):
        problems.add("texts", f"are {len(texts)}, and images {len(images)}")
    files = _files(images, problems)
    for image, error in unreadable_images(files, WORKERS).items():
        problems.add(f"image {image} ({files[image]})", error)
    for number, text in enumerate(texts or ()):
        try:
            check_text(text)
        except UserError as error:
            problems.add(f"text {number}", str(error))
    problems.raise_if_any()
    return files


def _files(
    images: Sequence[Image.Image | str | Path], problems: ValidationReport
) -> dict[ImageId, ImageFile]:
    """Return images as files, by their numbers."""
    from cirloop.data.images import BadImage, in_memory

    files: dict[ImageId, ImageFile] = {}
    for number, image in enumerate(images):
        name = ImageId(str(number))
        try:
            files[name] = (
                Path(image) if isinstance(image, str | Path) else in_memory(image, "in memory")
            )
        except BadImage as error:
            problems.add(f"image {number}", str(error))
    return files
