"""The page: Gradio's own components and what each event answers with. All searching is the
engine's."""

from __future__ import annotations

import html
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
import gradio as gr
from gradio.events import api as add_api
from PIL import Image
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from cirloop.data.images import BadImage
from cirloop.io.redact import sanitize
from cirloop.tools.search.engine import (
    BASE,
    MAX_FILE,
    MAX_TEXT,
    Engine,
    Hit,
    Reference,
    UploadedImage,
    decode_upload,
)
from cirloop.tools.search.queries import content
from cirloop.types import ImageId, UserError

HOST = "127.0.0.1"
NONE = "none"
"""In the place of a second iteration."""
SIDE = 256
"""Longer side of an image on the page, in pixels; smaller ones stay as they are."""
PAGE_SIZE = 24
"""Images of the gallery to choose from at once."""
NUM_EXAMPLES = 6
CSS = """
.grid-wrap.grid-wrap { padding-top: 2rem; max-height: none; }
.grid-container.grid-container { grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); }
.thumbnail-lg.thumbnail-lg { aspect-ratio: auto; height: auto; }
.thumbnail-lg.thumbnail-lg > img { height: auto; aspect-ratio: 1; }
.caption-label.caption-label { position: static; max-width: none; border: none;
                               white-space: normal; overflow-wrap: anywhere; }
"""
"""Captions stand whole below their images, and as many beside each other as there is room for."""
CONTRAST = {
    "button_primary_background_fill": "*primary_700",
    "button_primary_background_fill_dark": "*primary_700",
    "button_primary_background_fill_hover": "*primary_800",
    "button_primary_background_fill_hover_dark": "*primary_800",
    "body_text_color_subdued": "*neutral_600",
}
"""Of the theme, what is too pale to read."""
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Of an event that is not in the API, and whose progress and errors cover no component."""


@contextmanager
def _as_message() -> Iterator[None]:
    """Turn what is wrong with a request into Gradio's message, which is shown as HTML."""
    try:
        yield
    except UserError as error:
        raise gr.Error(_text(str(error)), print_exception=False) from None


class Events:
    """What the page's events answer with: values of components, or one message."""

    def __init__(self, engine: Engine, k: int) -> None:
        self._engine = engine
        self._k = k

    @_as_message()
    def show_results(self, name: str, upload: bytes | None, text: str, *labels: str) -> list[Any]:
        """Return the reference as a gallery, its upload, the results of one iteration or two as
        galleries, then the ids of each."""
        reference = self._reference(name, upload)
        hit_lists = [self._hits(label, reference, text) for label in labels]
        right = (self._engine.gallery.right or {}).get((ImageId(name), text), frozenset())
        galleries = [
            self._results(label, hits, right) for label, hits in zip(labels, hit_lists, strict=True)
        ]
        ids = [[hit.image for hit in hits] for hits in hit_lists]
        return [self._shown(reference), None if name else gr.skip(), *galleries, *ids]

    @_as_message()
    def choose(self, images: list[ImageId], event: gr.SelectData) -> list[Any]:
        """Make an image that was clicked the reference: its id, a gallery, and no upload."""
        chosen = images[int(event.index)]
        return [chosen, self._shown(chosen), None]

    @_as_message()
    def take(self, upload: bytes | None) -> list[Any]:
        """Make an upload, or its removal, the reference: no id, and a gallery."""
        return ["", self._shown(self._reference("", upload))]

    @_as_message()
    def browse(self, part: str, number: int | None) -> list[Any]:
        """Return a page of the images whose names hold `part`, their ids, and its number, which
        is the nearest that there is."""
        matches = [image for image in self._engine.gallery.ids if part.lower() in image.lower()]
        last = max(1, -(-len(matches) // PAGE_SIZE))
        page = min(max(number or 1, 1), last)
        images = matches[PAGE_SIZE * (page - 1) : PAGE_SIZE * page]
        value = [(self._thumbnail(image), sanitize(image)) for image in images]
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
        reference_image = self._reference(reference, None)
        return content(self._engine.search(label, reference_image, text or None, k))

    def _reference(self, name: str, upload: bytes | None) -> Reference | None:
        if name:
            return self._engine.known(name)
        return None if upload is None else decode_upload(upload, "the upload")

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
            value.append((self._thumbnail(hit.image), caption))
        title = "Base model" if label == BASE else f"Iteration {label}"
        if right and not right & {hit.image for hit in hits}:
            title += f"; the right image is not among these {len(hits)}"
        return gr.Gallery(value, label=title, visible=label != NONE)

    def _shown(self, reference: Reference | None) -> list[Any]:
        if isinstance(reference, UploadedImage):
            return [(_shrink(reference.pixels), "the upload")]
        return [] if reference is None else [(self._thumbnail(reference), sanitize(reference))]

    def _thumbnail(self, image: ImageId) -> Image.Image:
        try:
            return _shrink(self._engine.gallery.images.load(image))
        except BadImage as error:
            raise UserError(f"image {image!r:.200} {error}.") from None


def build_page(engine: Engine, label: str, k: int) -> gr.Blocks:
    """Return the page, with the iteration `label` chosen, and the API's `search`."""
    events = Events(engine, k)
    labels = engine.labels()
    page: gr.Blocks
    with gr.Blocks(title="cirloop search", analytics_enabled=False) as page:
        gr.HTML(about(engine))
        with gr.Row():
            with gr.Column(scale=2, min_width=260):
                preview = _gallery("Reference", height=220)
                name = _textbox("Id of an image of the gallery")
                upload = gr.File(
                    label="Or upload an image", type="binary", file_types=["image"], height=160
                )
                reference = [name, preview, upload]
                _add_browser(events, page, reference)
            with gr.Column(scale=5, min_width=320):
                text = _textbox("What should be different")
                with gr.Row():
                    first = gr.Radio(labels, value=label, label="Iteration")
                    second = gr.Radio([NONE, *labels], value=NONE, label="Beside it")
                button = gr.Button("Search", variant="primary")
                results = [_gallery("Results"), _gallery("Results beside it", visible=False)]
                example = _add_examples(engine, [name, text])
        ids = [gr.State([]), gr.State([])]
        asking = [button.click, text.submit, name.submit, first.input, second.input, example.then]
        for ask in asking:
            ask(
                events.show_results,
                [name, upload, text, first, second],
                [preview, upload, *results, *ids],
                api_visibility="private",
                show_progress_on=results,
            )
        gr.on([upload.upload, upload.clear], events.take, upload, [name, preview], **PRIVATE)
        for gallery, images in zip(results, ids, strict=True):
            gallery.select(events.choose, images, reference, **PRIVATE)
        page.load(events.labels, None, [first, second], **PRIVATE)
        add_api(events.api, api_name="search", queue=False)  # the engine has a lock
    return page


def launch(page: gr.Blocks, port: int | None = None) -> str:
    """Serve the page to this machine, under its own names only: a page of another site cannot ask
    through a name that it points here. Returns the address."""
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    # By default the fonts are fetched.
    theme = gr.themes.Default(
        font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")
    ).set(**CONTRAST)
    try:
        url: str = page.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            max_file_size=MAX_FILE,
            app_kwargs={"middleware": [hosts]},
            theme=theme,
            css=CSS,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
        )[1]
    except OSError as error:
        raise UserError(f"--port {port}: {error}") from None
    return url.rstrip("/")


def about(engine: Engine) -> str:
    """Return as HTML what is searched with what, after what a reader must know of the models
    first."""
    notices = "".join(f"<p><strong>{_text(notice)}</strong></p>" for notice in engine.notices)
    best = engine.best()
    scope = f"{len(engine.gallery.ids):,} images, with the models of {engine.directory}."
    scope += f" Of these {best.describe()}." if best else ""
    return (
        f"{notices}<h1>Search {_text(engine.gallery.name)}</h1><p>{_text(scope)} Choose or upload"
        " an image, say what should be different, and press Enter.</p>"
    )


def _add_browser(events: Events, page: gr.Blocks, reference: list[Any]) -> None:
    """Add the gallery's images to choose from, closed at first."""
    with gr.Accordion("Images of the gallery", open=False):
        part = _textbox("Images whose name contains")
        shown_images = _gallery("Images", height=420)
        number = gr.Number(1, label="Page", precision=0, minimum=1)
    images = gr.State([])
    showing = [page.load, part.change, number.change]
    gr.on(showing, events.browse, [part, number], [shown_images, images, number], **PRIVATE)
    shown_images.select(events.choose, images, reference, **PRIVATE)


def _textbox(label: str) -> gr.Textbox:
    return gr.Textbox("", label=label, max_length=MAX_TEXT)


def _gallery(label: str, *, height: int | None = None, visible: bool = True) -> gr.Gallery:
    return gr.Gallery(
        label=label,
        height=height,
        visible=visible,
        object_fit="contain",
        allow_preview=False,
        buttons=[],
        interactive=False,
    )


def _add_examples(engine: Engine, inputs: list[Any]) -> gr.events.Dependency:
    """Add some of the run's own queries, at even distances. Returns the event of a click on one."""
    ids = {*engine.gallery.ids}
    queries = [query for query in engine.gallery.queries if query.reference in ids]
    chosen = queries[:: max(1, len(queries) // NUM_EXAMPLES)][:NUM_EXAMPLES]
    values = [[query.reference, query.text] for query in chosen] or [["", "the same in red"]]
    labels = [text for _, text in values]
    examples = gr.Examples(values, inputs, example_labels=labels, api_visibility="private")
    return examples.load_input_event


def _shrink(pixels: Image.Image) -> Image.Image:
    small = pixels.copy()
    small.thumbnail((SIDE, SIDE))
    return small


def _text(value: str) -> str:
    """Return a text as text in HTML."""
    return html.escape(sanitize(value))
