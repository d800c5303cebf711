"""The page: Gradio's own components, and which event answers to what."""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio.events import api as add_api

from cirloop.tools.demo.events import ENLARGES, NONE, SEARCHES, Events, as_text
from cirloop.tools.search.engine import MAX_TEXT, Engine

NUM_EXAMPLES = 6
CSS = """
.grid-wrap.grid-wrap { padding-top: 2rem; max-height: none; }
.grid-container.grid-container { grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); }
.thumbnail-lg.thumbnail-lg { aspect-ratio: auto; height: auto; }
.thumbnail-lg.thumbnail-lg > img { height: auto; aspect-ratio: 1; }
.caption-label.caption-label { position: static; max-width: none; border: none;
                               white-space: normal; overflow-wrap: anywhere; }
.enlarged.enlarged { position: fixed; inset: 1rem 1rem auto; width: auto; padding: 1rem;
                     max-height: calc(100vh - 2rem); overflow: auto; z-index: 100;
                     background: var(--body-background-fill); border: 1px solid; }
.enlarged .grid-container.grid-container { grid-template-columns: 1fr; }
.enlarged .thumbnail-lg.thumbnail-lg > img { aspect-ratio: auto; max-height: 70vh; }
"""
"""Captions stand whole below their images, and as many beside each other as there is room for. An
enlarged image lies over the page, so that it is seen wherever the page is scrolled to."""
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


class _Answer:
    """The components that show an answer, in the order in which events give them values."""

    def __init__(self, preview: gr.Gallery, results: list[gr.Gallery]) -> None:
        self.results = results
        self.query = gr.State(None)
        self.ids = [gr.State([]) for _ in results]
        self.outputs = [self.query, preview, *results, *self.ids]


def build_page(engine: Engine, label: str, k: int) -> gr.Blocks:
    """Return the page, with the iteration `label` chosen, and the API's `search`."""
    events = Events(engine, k)
    page: gr.Blocks
    with gr.Blocks(title="cirloop search", analytics_enabled=False) as page:
        gr.HTML(about(engine))
        with gr.Row():
            # First, so that a narrow screen has it above the reference.
            with gr.Column(scale=5, min_width=320):
                text = _textbox("What should be different")
                with gr.Row():
                    search = gr.Button("Search", variant="primary")
                    back = gr.Button("Back", interactive=False)
                labels = _add_labels(engine, label)
                does = gr.Radio([SEARCHES, ENLARGES], value=SEARCHES, label="A click on a result")
                results = [_gallery("Results"), _gallery("Results beside it", visible=False)]
                examples = gr.Column()
                with gr.Column(visible=False, elem_classes="enlarged") as large:
                    picture = _gallery("Enlarged")
                    close = gr.Button("Close")
            with gr.Column(scale=2, min_width=260):
                preview = _gallery("Reference", height=220)
                name = _textbox("Id of an image of the gallery")
                upload = gr.File(
                    label="Or upload an image", type="filepath", file_types=["image"], height=160
                )
                _add_browser(events, page, [name, preview, upload])
        with examples:
            example = _add_examples(engine, [name, text])
        answer = _Answer(preview, results)
        boxes = [name, upload, text]
        asking = [search.click, text.submit, name.submit, *(each.input for each in labels)]
        for ask in [*asking, example.then]:
            ask(
                events.show_results,
                [*boxes, *labels],
                [upload, *answer.outputs],
                api_visibility="private",
                show_progress_on=results,
            )
        _add_steps(events, (does, back, large, picture), boxes, labels, answer)
        gr.on(
            [close.click, picture.select], lambda: gr.Column(visible=False), None, large, **PRIVATE
        )
        gr.on([upload.upload, upload.clear], events.take, upload, [name, preview], **PRIVATE)
        if engine.has_iterations:
            page.load(events.labels, None, labels, **PRIVATE)
        add_api(events.api, api_name="search", queue=False)  # the engine has a lock
    return page


def about(engine: Engine) -> str:
    """Return as HTML what is searched with what, after what a reader must know of the models
    first."""
    notices = "".join(f"<p><strong>{as_text(notice)}</strong></p>" for notice in engine.notices)
    best = engine.best()
    scope = f"{len(engine.gallery.ids):,} images, with {engine.name}."
    scope += f" Of these {best.describe()}." if best else ""
    return (
        f"{notices}<h1>Search {as_text(engine.gallery.name)}</h1><p>{as_text(scope)} Choose or"
        " upload an image, say what should be different, and press Enter. A click on a result"
        " searches on with it; Back undoes the click.</p>"
    )


def _add_labels(engine: Engine, label: str) -> list[gr.Radio]:
    """Add the choice of one iteration or two, unseen where there is only a base model."""
    labels = engine.labels()
    with gr.Row(visible=engine.has_iterations):
        first = gr.Radio(labels, value=label, label="Iteration")
        second = gr.Radio([NONE, *labels], value=NONE, label="Beside it")
    return [first, second]


def _add_steps(
    events: Events,
    controls: tuple[gr.Radio, gr.Button, gr.Column, gr.Gallery],
    boxes: list[Any],
    labels: list[gr.Radio],
    answer: _Answer,
) -> None:
    """Let a click on a result search on or enlarge it, and Back undo the search."""
    does, back, large, picture = controls
    steps = gr.State([])
    outputs = [large, picture, steps, back, *boxes, *answer.outputs]
    for gallery, images in zip(answer.results, answer.ids, strict=True):
        inputs = [does, images, steps, answer.query, *boxes, *labels]
        gallery.select(events.click, inputs, outputs, **PRIVATE)
    back.click(events.back, [steps, *labels], outputs, **PRIVATE)


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
