"""What the page's events answer with: values of components, or one message. All searching is the
engine's."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import gradio as gr
from PIL import Image

from cirloop.cli.iterations import BASE
from cirloop.data.images import BadImage
from cirloop.io.redact import sanitize
from cirloop.tools.search.engine import Engine, Hit, Reference, UploadedImage, decode_upload
from cirloop.tools.search.queries import content
from cirloop.types import ImageId, UserError

Value: TypeAlias = Any
"""What a component holds."""
NONE = "none"
"""In the place of a second iteration."""
SIDE = 256
"""Longer side of an image on the page, in pixels; smaller ones stay as they are."""
LARGE_SIDE = 1600
"""Longer side of an enlarged image, in pixels."""
PAGE_SIZE = 24
"""Images of the gallery to choose from at once."""
SEARCHES, ENLARGES = "searches with it", "enlarges it"
"""What a click on a result does."""
MAX_STEPS = 100
"""Clicks that Back can undo."""


class PageQuery(NamedTuple):
    """A query as the page holds it: an id, or the file of an upload, or neither; and a text."""

    name: str
    upload: str | None
    text: str


class Step(NamedTuple):
    """What a click on a result replaced: what stood in the boxes, and the query whose results were
    there (None: there were none)."""

    boxes: PageQuery
    answered: PageQuery | None


@contextmanager
def _as_message() -> Iterator[None]:
    """Turn what is wrong with a request into Gradio's message, which is shown as HTML."""
    try:
        yield
    except UserError as error:
        raise gr.Error(as_text(str(error)), print_exception=False) from None


def as_text(value: str) -> str:
    """Return a text as text in HTML."""
    return html.escape(sanitize(value))


class Events:
    """What the page's events answer with: values of components, or one message."""

    def __init__(self, engine: Engine, k: int) -> None:
        self._engine = engine
        self._k = k

    @_as_message()
    def show_results(self, name: str, upload: str | None, text: str, *labels: str) -> list[Any]:
        """Return what shows the answer to the boxes (`_shown`), and the upload: none beside an
        id."""
        query = PageQuery(name, None if name else upload, text)
        return [gr.skip() if query.upload == upload else None, *self._shown(query, labels)]

    @_as_message()
    def click(
        self,
        event: gr.SelectData,
        does: str,
        images: list[ImageId],
        steps: list[Step],
        *values: Value,
    ) -> list[Any]:
        """Make a result the reference and search at once, or enlarge it: whether the enlarged image
        is seen, the image, the steps, Back, the boxes, and what shows the answer. `values` are the
        query whose results are there, the boxes, and the iterations."""
        answered, name, upload, text, *labels = values
        image = images[int(event.index)]
        if does == ENLARGES:
            large = [(self._load(image, LARGE_SIDE), sanitize(image))]
            return [gr.Column(visible=True), large, *[gr.skip()] * (5 + 2 + 2 * len(labels))]
        steps = [*steps, Step(PageQuery(name, upload, text), answered)][-MAX_STEPS:]
        query = PageQuery(image, None, text)
        return [*self._with_steps(steps), *query, *self._shown(query, labels)]

    @_as_message()
    def back(self, steps: list[Step], *labels: str) -> list[Any]:
        """Undo the last click on a result: what stood in the boxes, and the results that were
        there."""
        *kept, last = steps
        return [*self._with_steps(kept), *last.boxes, *self._shown(last.answered, labels)]

    @_as_message()
    def choose(self, event: gr.SelectData, images: list[ImageId]) -> list[Any]:
        """Make an image of the gallery the reference: its id, a gallery, and no upload."""
        chosen = images[int(event.index)]
        return [chosen, self._preview(chosen), None]

    @_as_message()
    def take(self, upload: str | None) -> list[Any]:
        """Make an upload, or its removal, the reference: no id, and a gallery."""
        return ["", self._preview(self._reference(PageQuery("", upload, "")), upload)]

    @_as_message()
    def browse(self, part: str, number: int | None) -> list[Any]:
        """Return a page of the images whose names hold `part`, their ids, and its number, which
        is the nearest that there is."""
        matches = [image for image in self._engine.gallery.ids if part.lower() in image.lower()]
        last = max(1, -(-len(matches) // PAGE_SIZE))
        page = min(max(number or 1, 1), last)
        images = matches[PAGE_SIZE * (page - 1) : PAGE_SIZE * page]
        value = [(self._load(image), sanitize(image)) for image in images]
        label = f"Page {page} of {last}: {len(images)} of {len(matches):,} images"
        return [gr.Gallery(value, label=label), images, page]

    def labels(self) -> list[Any]:
        """Return the iterations there are by now: the run may go on."""
        labels = self._engine.labels()
        return [gr.Radio(labels), gr.Radio([NONE, *labels])]

    @_as_message()
    def api(self, reference: str, text: str, iteration: str, k: int) -> dict[str, Any]:
        """Search with the id of an image of the gallery, a text, or both; empty ones are left out,
        and an empty iteration is the best. `results` holds image, score and rank; `ms` is the time
        it took."""
        label = self._engine.label(iteration or None)
        image = self._reference(PageQuery(reference, None, text))
        return content(self._engine.search(label, image, text or None, k))

    def _with_steps(self, steps: list[Step]) -> list[Any]:
        """Return no enlarged image, the steps, and Back, for which there may be nothing to undo."""
        return [gr.Column(visible=False), [], steps, gr.Button(interactive=bool(steps))]

    def _shown(self, query: PageQuery | None, labels: Sequence[str]) -> list[Any]:
        """Return the query, its reference as a gallery, the results of one iteration or two as
        galleries, then the ids of each. Without a query nothing is shown."""
        if query is None:
            empty = [gr.Gallery([], label="Results", visible=label != NONE) for label in labels]
            return [None, [], *empty, *([] for _ in labels)]
        reference = self._reference(query)
        hit_lists = [self._hits(label, reference, query.text) for label in labels]
        right = (self._engine.gallery.right or {}).get(
            (ImageId(query.name), query.text), frozenset()
        )
        galleries = [
            self._results(label, hits, right) for label, hits in zip(labels, hit_lists, strict=True)
        ]
        ids = [[hit.image for hit in hits] for hits in hit_lists]
        return [query, self._preview(reference, query.upload), *galleries, *ids]

    def _reference(self, query: PageQuery) -> Reference | None:
        if query.name:
            return self._engine.known(query.name)
        if query.upload is None:
            return None
        path = Path(query.upload)  # Gradio's own copy, under the name that it was given
        return decode_upload(path.read_bytes(), path.name)

    def _hits(self, label: str, reference: Reference | None, text: str) -> tuple[Hit, ...]:
        if label == NONE:
            return ()
        result = self._engine.search(self._engine.label(label), reference, text or None, self._k)
        return result.hits

    def _results(self, label: str, hits: tuple[Hit, ...], right: frozenset[ImageId]) -> gr.Gallery:
        value = []
        for hit in hits:
            mark = ", right" if hit.image in right else ""
            caption = sanitize(f"{hit.rank}: {hit.score:.4f}, {hit.image}{mark}")
            value.append((self._load(hit.image), caption))
        title = "Base model" if label == BASE else f"Iteration {label}"
        if right and not right & {hit.image for hit in hits}:
            title += f"; the right image is not among these {len(hits)}"
        return gr.Gallery(value, label=title, visible=label != NONE)

    def _preview(self, reference: Reference | None, upload: str | None = None) -> list[Any]:
        if isinstance(reference, UploadedImage):
            name = "the upload" if upload is None else Path(upload).name
            return [(_shrink(reference.pixels, SIDE), sanitize(name))]
        return [] if reference is None else [(self._load(reference), sanitize(reference))]

    def _load(self, image: ImageId, side: int = SIDE) -> Image.Image:
        try:
            return _shrink(self._engine.gallery.images.load(image), side)
        except BadImage as error:
            raise UserError(f"image {image!r:.200} {error}.") from None


def _shrink(pixels: Image.Image, side: int) -> Image.Image:
    small = pixels.copy()
    small.thumbnail((side, side))
    return small
