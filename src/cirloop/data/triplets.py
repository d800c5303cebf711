"""Triplets of one's own, an object each, whatever they were read from: checked, and made into
parts.

`reference`, `text` (or `texts`, joined by " and "), `target`, and optionally `id`, `category`,
`subset` (images of a group to rank among as well) and `positives` (further right answers). Where no
object of a split has a target, the split is for prediction only.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping

from cirloop.data.names import NameMatcher
from cirloop.types import EvalProtocol, Gallery, ImageId, LabeledQueries, Query, QueryId, Relevance
from cirloop.validation import Entry, Problems

PROTOCOL = EvalProtocol(
    "own data: the gallery given, reference removed, annotated target; subset: the images given",
    primary_metric="recall@1",
    reported=("recall@1", "recall@5", "recall@10", "recall@50", "recall_subset@1", "map@10"),
)
LISTS = {"subset", "positives"}
KNOWN = {"reference", "text", "texts", "target", "id", "category", *LISTS}
UNKNOWN = (
    "Rename fields that are not known or leave them out. --dataset_name huggingface reads other"
    " names, by --data.columns.text caption and the like."
)
OTHER_NAMES = {
    "caption": "text",
    "captions": "texts",
    "instruction": "text",
    "modification": "text",
    "modification_text": "text",
    "relative_caption": "text",
    "query": "text",
    "candidate": "reference",
    "query_image": "reference",
    "reference_image": "reference",
    "source": "reference",
    "source_image": "reference",
    "target_hard": "target",
    "target_image": "target",
}
"""What other data sets call the fields."""
MAX_TEXT = 4096
"""Characters of a text: about a thousand tokens, four times a picture's at the usual budget, and
sixteen times the longest caption of CIRR's val. A longer one is a pasted document, and would slow
and swell every batch that holds it."""


def load_queries(
    entries: Iterable[tuple[str, Entry]],
    files: Mapping[ImageId, object],
    data_set: str,
    split: str,
    path: object,
    problems: Problems,
    same: Mapping[ImageId, ImageId] | None = None,
) -> list[LabeledQueries]:
    """The queries of `split`, a part per category if its objects have one. `path` is for messages.

    `files` are the images, where that is known; `same` names the image that stands for a copy of
    it.
    """
    same = same or {}
    rows: dict[str, list[tuple[Query, Entry]]] = {}
    seen: set[str] = set()
    alike = NameMatcher(files)
    for number, (where, entry) in enumerate(entries):
        for name in sorted(entry.fields.keys() - KNOWN):
            problems.add(
                where,
                f"has an unknown field {name!r:.100}; known:"
                f" {', '.join(sorted(KNOWN))}{_meant(name)}",
                UNKNOWN,
            )
        reference = entry.get("reference", str)
        text = _text(entry, problems)
        for role in sorted(LISTS & entry.fields.keys()):
            entry.list_of(role, str)
        for role, image in named(entry):
            if files and same.get(ImageId(image), image) not in files:
                meant = alike.suggest(image)
                hint = "" if meant is None else f"; did you mean {meant!r}?"
                problems.add(where, f"{role} {image!r} is not in the gallery{hint}")
        known_as = entry.get("id", str) if "id" in entry.fields else f"{split}/{number}"
        if known_as in seen:
            problems.add(where, f"the id {known_as!r} is there more than once")
        category = (entry.get("category", str) or "") if "category" in entry.fields else ""
        if reference is None or text is None or known_as is None:
            continue
        seen.add(known_as)
        shown = same.get(ImageId(reference), ImageId(reference))
        rows.setdefault(category, []).append(
            (Query(QueryId(known_as), shown, text, category or None), entry)
        )
    if "" in rows and len(rows) > 1:
        problems.add(path, f"{len(rows['']):,} lines have no category and others have one")
    gallery = Gallery(f"{data_set}/{split}", tuple(sorted(files)))
    name = f"{data_set}_{split}"
    return [
        _part(name, path, split, category, rows[category], gallery, problems, same)
        for category in sorted(rows)
    ]


def _meant(field: str) -> str:
    """The known field that an unknown one most likely is."""
    close = difflib.get_close_matches(field.casefold(), KNOWN, 1, 0.75)
    meant = OTHER_NAMES.get(field.casefold(), close[0] if close else None)
    return "" if meant is None else f"; did you mean {meant!r}?"


def _text(entry: Entry, problems: Problems) -> str | None:
    text = entry.get("text", str) if "texts" not in entry.fields else _joined_texts(entry)
    if text is not None and len(text) > MAX_TEXT:
        what = f"the text has {len(text):,} characters, more than {MAX_TEXT:,}: {text[:60]!r}…"
        problems.add(entry.where, what, "A text says what to change; give a shorter one.")
        return None
    return text


def _joined_texts(entry: Entry) -> str | None:
    texts = [text.strip() for text in entry.list_of("texts", str) or [] if text.strip()]
    return " and ".join(texts) or entry.get("text", str)


def named(entry: Entry) -> Iterator[tuple[str, str]]:
    """Role and name of each image of an object; what is no name is passed over."""
    for role in ("reference", "target", *sorted(LISTS)):
        value = entry.fields.get(role)
        for image in value if role in LISTS and isinstance(value, list) else [value]:
            if (
                isinstance(image, str)
                and image.strip()
                and (role in LISTS) == isinstance(value, list)
            ):
                yield role, image


def _names(entry: Entry, role: str) -> list[str]:
    """The names of a list; what is none is passed over, and was noted."""
    return [image for of, image in named(entry) if of == role]


def _part(
    name: str,
    path: object,
    split: str,
    category: str,
    rows: list[tuple[Query, Entry]],
    gallery: Gallery,
    problems: Problems,
    same: Mapping[ImageId, ImageId],
) -> LabeledQueries:
    targets: dict[QueryId, ImageId] = {}
    positives: dict[QueryId, frozenset[ImageId]] = {}
    groups: dict[QueryId, tuple[ImageId, ...]] = {}
    for query, entry in rows:
        target = entry.get("target", str, optional=split != "train")
        if target is not None:
            targets[query.id] = same.get(ImageId(target), ImageId(target))
            if targets[query.id] == query.reference:
                other = entry.fields["reference"]
                copied = "" if other == target else f"; {other!r} has the same bytes"
                problems.add(
                    entry.where, f"reference and target are the same image, {target!r}{copied}"
                )
        further = [same.get(ImageId(i), ImageId(i)) for i in _names(entry, "positives")]
        if isinstance(entry.fields.get("positives"), list) and target is not None:
            positives[query.id] = frozenset([targets[query.id], *further])
        if isinstance(entry.fields.get("subset"), list):
            shown = [same.get(ImageId(i), ImageId(i)) for i in _names(entry, "subset")]
            members = [image for image in dict.fromkeys(shown) if image != query.reference]
            if target is not None and targets[query.id] not in members:
                problems.add(entry.where, "the target is not in its subset")
            groups[query.id] = tuple(members)
    for what, found in (("targets", targets), ("positives", positives), ("subsets", groups)):
        optional = split == "train" and what == "positives"  # which only an evaluation counts
        if found and len(found) < len(rows) and not optional:
            problems.add(
                path,
                f"{len(rows) - len(found)} of {len(rows)} lines have no {what}, and others have",
            )
    relevance = Relevance(targets, positives) if targets else None
    return LabeledQueries(
        name, tuple(query for query, _ in rows), relevance, gallery, PROTOCOL, category, groups
    )
