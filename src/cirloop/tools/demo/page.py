"""The page: Gradio's blocks and what each event answers with. All searching is the engine's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
import gradio as gr
from gradio.events import api

from cirloop.tools.demo import html
from cirloop.tools.demo.image_registry import Desk
from cirloop.tools.search.engine import MAX_TEXT, Engine, UploadedImage
from cirloop.tools.search.queries import content
from cirloop.types import ImageId, UserError

NONE = "none"
"""In the place of a second iteration."""
SHOWN = 24
"""Pictures of the gallery to choose from at once."""
EXAMPLES = 6
History = list[tuple[str | None, str]]


class Page:
    """What the page's events answer with. A reference is named by its key on the desk; None is no
    reference."""

    def __init__(self, engine: Engine, desk: Desk, k: int) -> None:
        self._engine = engine
        self._desk = desk
        self._k = k

    def ask(
        self,
        key: str | None,
        text: str,
        history: History,
        first: str,
        second: str,
        note: bool = True,
    ) -> list[Any]:
        """For the outputs `shown`: the results of one iteration or two, or what is wrong."""
        try:
            reference = self._desk.reference(key) if key else None
            answers = [
                self._results(label, key, text) for label in (first, second) if label != NONE
            ]
        except UserError as error:
            return self._kept(key, text, history, str(error))
        if note and history[-1:] != [(key, text)]:
            history = [*history, (key, text)]
        right = (
            gr.update(value=answers[1], visible=True)
            if len(answers) > 1
            else gr.update(value="", visible=False)
        )
        return [key, history, html.chosen(key, reference), text, "", answers[0], right]

    def _results(self, label: str, key: str | None, text: str) -> str:
        reference = self._desk.reference(key) if key else None
        found = self._engine.search(self._engine.label(label), reference, text or None, self._k)
        known = self._engine.gallery.right or {}
        right = (
            frozenset()
            if isinstance(reference, UploadedImage)
            else known.get((reference or "", text), frozenset())
        )
        return html.results(label, found, self._desk.digests, right)

    def _kept(self, key: str | None, text: str, history: History, problem: str) -> list[Any]:
        """For `shown`: the results as they are, with a message."""
        return [key, history, gr.skip(), text, html.message(problem), gr.skip(), gr.skip()]

    def choose(
        self, event: gr.EventData, key: str | None, text: str, history: History
    ) -> list[Any]:
        """Make the picture that was clicked or uploaded the reference; a result's comes without the
        old text."""
        problem = getattr(event, "problem", None)
        given = getattr(event, "key", None)
        if problem is not None:
            return self._kept(key, text, history, str(problem)[:1000])
        try:
            reference = self._desk.reference(str(given))
        except UserError as error:
            return self._kept(key, text, history, str(error))
        return [given, history, html.chosen(str(given), reference), text, "", gr.skip(), gr.skip()]

    def go_on(self, event: gr.EventData, key: str | None, text: str, history: History) -> list[Any]:
        """`choose` of a result: the text was about the reference before."""
        return self.choose(event, key, "", history)

    def example(self, event: gr.EventData, history: History, first: str, second: str) -> list[Any]:
        return self.ask(
            str(getattr(event, "key", "")), str(getattr(event, "text", "")), history, first, second
        )

    def back(
        self, key: str | None, text: str, history: History, first: str, second: str
    ) -> list[Any]:
        """Return the search before the last one."""
        if len(history) < 2:
            return self._kept(key, text, history, "There is no earlier search.")
        return self.ask(*history[-2], history[:-1], first, second, note=False)

    def clear(self, text: str, history: History) -> list[Any]:
        return [None, history, html.chosen(None, None), text, "", gr.skip(), gr.skip()]

    def strip(self, wanted: str, start: int) -> tuple[int, str]:
        """SHOWN pictures whose name holds `wanted`, from the `start`-th on, and where they really
        start."""
        words = wanted.lower()
        ids = [image for image in self._engine.gallery.ids if words in image.lower()]
        start = max(0, min(start, (len(ids) - 1) // SHOWN * SHOWN))
        return start, html.strip(ids[start : start + SHOWN], self._desk.digests, start, len(ids))

    def api(self, reference: str, text: str, iteration: str, k: int) -> dict[str, Any]:
        """Search with the id of a picture of the gallery, a text, or both; empty ones are left out,
        and an empty iteration is the last. `results` holds image, score and rank; `ms` is the time
        it took."""
        try:
            given = self._engine.known(reference) if reference else None
            return content(
                self._engine.search(self._engine.label(iteration or None), given, text or None, k)
            )
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None


def _html(value: str = "", **more: Any) -> Any:
    """Return the page's own markup, which page.css is for."""
    return gr.HTML(value, elem_classes="cirloop", **more)


class Layout:
    """The components, where they stand."""

    def __init__(self, engine: Engine, page: Page, examples: str, label: str) -> None:
        self.key = gr.State(None)
        self.history = gr.State([])
        self.start = gr.State(0)
        _html(
            html.head(
                str(engine.directory), engine.gallery.name, len(engine.gallery.ids), engine.notices
            ),
            js_on_load=None,
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                self._pick(page)
            with gr.Column(scale=4):
                self._ask(engine.labels(), label)
                self.examples = _html(examples, js_on_load=html.CLICKS)
        self.shown = [
            self.key,
            self.history,
            self.chosen,
            self.text,
            self.message,
            self.left,
            self.right,
        ]
        self.asked = [self.key, self.text, self.history, self.first, self.second]

    def _pick(self, page: Page) -> None:
        self.chosen = _html(html.chosen(None, None), js_on_load=html.UPLOADS)
        self.clear = gr.Button("No reference", size="sm")
        self.wanted = gr.Textbox(label="Pictures whose name contains", max_length=MAX_TEXT)
        self.strip = _html(page.strip("", 0)[1], js_on_load=html.CLICKS)
        with gr.Row():
            self.before = gr.Button("Earlier", size="sm")
            self.after = gr.Button("Later", size="sm")

    def _ask(self, labels: list[str], label: str) -> None:
        with gr.Row(equal_height=True):
            with gr.Column(scale=6, min_width=320):
                self.text = gr.Textbox(
                    label="What should be different",
                    max_length=MAX_TEXT,
                    autofocus=True,
                    placeholder="the red square is now blue",
                )
            with gr.Column(scale=1, min_width=130):
                self.first = gr.Dropdown(labels, value=label, label="Iteration")
            with gr.Column(scale=1, min_width=130):
                self.second = gr.Dropdown([NONE, *labels], value=NONE, label="Beside it")
            with gr.Column(scale=1, min_width=100):
                self.ask = gr.Button("Search", variant="primary", size="md")
                self.back = gr.Button("Back", size="md")
        self.message = _html(js_on_load=None)
        with gr.Row():
            self.left = _html(js_on_load=html.CLICKS)
            self.right = _html(js_on_load=html.CLICKS, visible=False)


def blocks(engine: Engine, desk: Desk, label: str, k: int) -> gr.Blocks:
    """Return the page, with the iteration `label` chosen."""
    page = Page(engine, desk, k)
    made: gr.Blocks
    with gr.Blocks(
        title=f"Search {engine.gallery.name}", analytics_enabled=False, fill_width=True
    ) as made:
        on = Layout(engine, page, html.examples(_examples(engine), desk.digests), label)
        private: dict[str, Any] = {
            "api_visibility": "private",
            "queue": False,
        }  # the engine's lock is the queue
        changed = [on.ask.click, on.text.submit, on.first.input, on.second.input]
        gr.on(changed, page.ask, on.asked, on.shown, **private)
        gr.on([on.strip.click, on.chosen.click], page.choose, on.asked[:3], on.shown, **private)
        gr.on([on.left.click, on.right.click], page.go_on, on.asked[:3], on.shown, **private)
        on.examples.click(page.example, [on.history, on.first, on.second], on.shown, **private)
        on.back.click(page.back, on.asked, on.shown, **private)
        on.clear.click(page.clear, [on.text, on.history], on.shown, **private)
        pager: dict[str, Any] = {"outputs": [on.start, on.strip], **private}
        on.wanted.change(lambda name: page.strip(name, 0), on.wanted, **pager)
        on.before.click(
            lambda name, at: page.strip(name, at - SHOWN), [on.wanted, on.start], **pager
        )
        on.after.click(
            lambda name, at: page.strip(name, at + SHOWN), [on.wanted, on.start], **pager
        )
        made.load(lambda: _choices(engine), None, [on.first, on.second], **private)
        api(page.api, api_name="search", queue=False)
    return made


def _choices(engine: Engine) -> list[Any]:
    """Return the iterations there are by now: the run may go on."""
    labels = engine.labels()
    return [gr.update(choices=labels), gr.update(choices=[NONE, *labels])]


def _examples(engine: Engine) -> Sequence[Any]:
    """Return some of the run's own queries, evenly from all."""
    there = engine.gallery.queries
    ids: set[ImageId] = {*engine.gallery.ids}
    good = [query for query in there if query.reference in ids]
    return good[:: max(1, len(good) // EXAMPLES)][:EXAMPLES]
