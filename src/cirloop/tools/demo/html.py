"""The page's own HTML. Everything that came from data, people or models goes through `text`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from cirloop.io.redact import sanitize
from cirloop.tools.search.engine import Answer, Reference, UploadedImage
from cirloop.types import ImageId, Query

CLICKS = """
element.addEventListener('click', event => {
    const button = event.target.closest('button[data-key]');
    if (button) { trigger('click', {key: button.dataset.key, text: button.dataset.text ?? null}); }
});
"""
"""A button names its picture, and an example its text."""
UPLOADS = """
const send = async file => {
    try {
        const head = {'Content-Type': 'application/octet-stream'};
        const sent = await fetch('/picture', {method: 'POST', headers: head, body: file});
        const said = await sent.json();
        trigger('click', said);
    } catch (error) {
        trigger('click', {problem: 'The upload did not arrive. Is the server still there?'});
    }
};
element.addEventListener('change', event => {
    if (event.target.files.length) { send(event.target.files[0]); }
    event.target.value = '';
});
element.addEventListener('dragover', event => event.preventDefault());
element.addEventListener('drop', event => {
    event.preventDefault();
    if (event.dataTransfer.files.length) { send(event.dataTransfer.files[0]); }
});
"""


def text(value: str) -> str:
    """Return a text as text, also in an attribute."""
    return escape(sanitize(value), quote=True)


def picture(key: str, alt: str = "") -> str:
    return f'<img src="/picture/{text(key)}" alt="{text(alt)}" loading="lazy" decoding="async">'


def head(directory: str, gallery: str, num: int, notices: Sequence[str] = ()) -> str:
    """`notices` are what a reader must know of the models first."""
    first = "".join(f'<p class="about"><strong>{text(notice)}</strong></p>' for notice in notices)
    return (
        first
        + f'<h1>Search {text(gallery)}</h1><p class="about">{num:,} pictures, with the models of'
        f" {text(directory)}. Choose or upload a picture, say what should be different, and press"
        " Enter.</p>"
    )


def chosen(key: str | None, reference: Reference | None) -> str:
    """Return the reference, and where another is uploaded."""
    name = (
        "an uploaded picture"
        if isinstance(reference, UploadedImage)
        else reference or "none: the text alone is searched"
    )
    shown = (
        picture(key, f"Reference: {name}") if key else '<div class="none" aria-hidden="true"></div>'
    )
    return (
        f'<section class="reference" aria-label="Reference"><h2>Reference</h2>{shown}'
        f'<p class="name">{text(name)}</p><label class="upload">Upload or drop a picture'
        '<input type="file" accept="image/*"></label></section>'
    )


def strip(images: Sequence[ImageId], keys: Mapping[ImageId, str], start: int, num: int) -> str:
    """Return some of the gallery's pictures to choose from."""
    if not images:
        return '<p role="status">No picture has such a name.</p>'
    buttons = "".join(
        f'<li><button type="button" data-key="{keys[image]}"'
        f' title="{text(image)}">{picture(keys[image], image)}</button></li>'
        for image in images
    )
    return (
        f'<ul class="strip">{buttons}</ul><p class="about">{start + 1:,} to {start + len(images):,}'
        f" of {num:,}</p>"
    )


def examples(queries: Sequence[Query], keys: Mapping[ImageId, str]) -> str:
    if not queries:
        return ""
    buttons = "".join(
        f'<li><button type="button" data-key="{keys[query.reference]}"'
        f' data-text="{text(query.text)}">'
        f"{picture(keys[query.reference])}<span>{text(query.text)}</span></button></li>"
        for query in queries
    )
    return (
        '<section aria-label="Examples"><h2>Examples</h2><ul'
        f' class="examples">{buttons}</ul></section>'
    )


def message(problem: str) -> str:
    return f'<p class="problem" role="alert">{text(problem)}</p>' if problem else ""


def results(
    label: str, answer: Answer, keys: Mapping[ImageId, str], right: frozenset[ImageId]
) -> str:
    """Return the best pictures, each a button that makes it the reference; those known to be right
    are marked."""
    cards = []
    for hit in answer.hits:
        mark = '<strong class="right">right</strong>' if hit.image in right else ""
        cards.append(
            f'<li{" class=hit" if mark else ""}><button type="button" data-key="{keys[hit.image]}" '
            f'data-image="{text(hit.image)}" title="Make {text(hit.image)} the reference">'
            f'{picture(keys[hit.image], hit.image)}<span class="line"><span>{hit.rank}</span>'
            f'<span class="score">{hit.score:.4f}</span>{mark}</span></button></li>'
        )
    found = {hit.image for hit in answer.hits}
    missed = (
        ""
        if found & right or not right
        else f" The right picture is not among these {len(answer.hits)}."
    )
    name = "Base model" if label == "base" else f"Iteration {label}"
    return (
        f'<section aria-label="Results of {text(name.lower())}"><h2>{text(name)}</h2>'
        f'<p class="about" role="status">{answer.ms:.0f} ms.{missed}</p>'
        f'<ol class="results">{"".join(cards)}</ol></section>'
    )
