"""A user's own triplets, one entry each, whatever they were read from: checked, and grouped by
category.

`reference`, `text` (or `texts`, joined by " and "), `target`, and optionally `id`, `category`,
`subset` (images of a group to rank among as well) and `positives` (further right answers). Where no
object of a split has a target, the split is for prediction only.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass

from cirloop.data.names import NameMatcher
from cirloop.types import EvalProtocol, Gallery, ImageId, LabeledQueries, Query, QueryId, Relevance
from cirloop.validation import Entry, ValidationReport

PROTOCOL = EvalProtocol(
    "own data: the gallery given, reference removed, annotated target; subset: the images given",
    primary_metric="recall@1",
    reported=("recall@1", "recall@5", "recall@10", "recall@50", "recall_subset@1", "map@10"),
)
LISTS = {"subset", "positives"}
KNOWN = {"reference", "text", "texts", "target", "id", "category", *LISTS}
UNKNOWN = (
    "Rename fields that are not known or leave them out. cirloop import finds the usual names, and"
    " takes others by --text caption and the like (docs/own-data.md); so does --dataset_name"
    " huggingface, by --data.columns.text caption."
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
"""Characters of a text: about a thousand tokens, four times an image's at the usual budget, and
sixteen times the longest caption of CIRR's val. A longer one is a pasted document, and would slow
and swell every batch that holds it."""


@dataclass(frozen=True, slots=True)
class TripletSource:
    """The images that entries may name, and names for messages and ids.

    `files` are the images, where these are known; `copy_of` names the image that stands for a copy
    of it. `path` is for messages.
    """

    files: Mapping[ImageId, object]
    copy_of: Mapping[ImageId, ImageId]
    split: str
    path: object
    problems: ValidationReport

    def image(self, name: str) -> ImageId:
        """Return the image that a name stands for."""
        return self.copy_of.get(ImageId(name), ImageId(name))


def load_queries(
    entries: Iterable[tuple[str, Entry]],
    files: Mapping[ImageId, object],
    data_set: str,
    split: str,
    path: object,
    problems: ValidationReport,
    copy_of: Mapping[ImageId, ImageId] | None = None,
) -> list[LabeledQueries]:
    """Check the entries of `split` and return its queries, by category if its entries have one."""
    source = TripletSource(files, copy_of or {}, split, path, problems)
    rows: dict[str, list[tuple[Query, Entry]]] = {}
    ids: set[str] = set()
    matcher = NameMatcher(files)
    for number, (where, entry) in enumerate(entries):
        _check_fields(entry, problems)
        reference = entry.get("reference", str)
        text = _text(entry, problems)
        for role in sorted(LISTS & entry.fields.keys()):
            entry.list_of(role, str)
        for role, image in named_images(entry):
            if files and source.image(image) not in files:
                similar = matcher.suggest(image)
                hint = "" if similar is None else f"; did you mean {similar!r}?"
                problems.add(where, f"{role} {image!r} is not in the gallery{hint}")
        query = entry.get("id", str) if "id" in entry.fields else f"{split}/{number}"
        if query in ids:
            problems.add(where, f"the id {query!r} is there more than once")
        category = (entry.get("category", str) or "") if "category" in entry.fields else ""
        if reference is None or text is None or query is None:
            continue
        ids.add(query)
        row = Query(QueryId(query), source.image(reference), text, category or None)
        rows.setdefault(category, []).append((row, entry))
    if "" in rows and len(rows) > 1:
        problems.add(path, f"{len(rows['']):,} lines have no category and others have one")
    gallery = Gallery(f"{data_set}/{split}", tuple(sorted(files)))
    name = f"{data_set}_{split}"
    return [_labeled(name, category, rows[category], gallery, source) for category in sorted(rows)]


def _check_fields(entry: Entry, problems: ValidationReport) -> None:
    for name in sorted(entry.fields.keys() - KNOWN):
        field_names = ", ".join(sorted(KNOWN))
        problems.add(
            entry.where,
            f"has an unknown field {name!r:.100}; known: {field_names}{_suggest_field(name)}",
            UNKNOWN,
        )


def _suggest_field(field: str) -> str:
    """Name the known field that an unknown one most likely stands for."""
    close = difflib.get_close_matches(field.casefold(), KNOWN, 1, 0.75)
    similar = OTHER_NAMES.get(field.casefold(), close[0] if close else None)
    return "" if similar is None else f"; did you mean {similar!r}?"


def _text(entry: Entry, problems: ValidationReport) -> str | None:
    text = entry.get("text", str) if "texts" not in entry.fields else _joined_texts(entry)
    if text is not None and len(text) > MAX_TEXT:
        problem = f"the text has {len(text):,} characters, more than {MAX_TEXT:,}: {text[:60]!r}…"
        problems.add(entry.where, problem, "A text says what to change; give a shorter one.")
        return None
    return text


def _joined_texts(entry: Entry) -> str | None:
    texts = [text.strip() for text in entry.list_of("texts", str) or [] if text.strip()]
    return " and ".join(texts) or entry.get("text", str)


def named_images(entry: Entry) -> Iterator[tuple[str, str]]:
    """Yield role and name of each image of an entry; values that are no names are skipped."""
    for role in ("reference", "target", *sorted(LISTS)):
        value = entry.fields.get(role)
        for image in value if role in LISTS and isinstance(value, list) else [value]:
            if (
                isinstance(image, str)
                and image.strip()
                and (role in LISTS) == isinstance(value, list)
            ):
                yield role, image


def _list(entry: Entry, role: str, source: TripletSource) -> list[ImageId]:
    """Return the images of a list; values that are no names were reported before."""
    return [source.image(image) for of, image in named_images(entry) if of == role]


def _labeled(
    name: str,
    category: str,
    rows: Sequence[tuple[Query, Entry]],
    gallery: Gallery,
    source: TripletSource,
) -> LabeledQueries:
    """Collect the right answers and subsets of one category's queries."""
    targets: dict[QueryId, ImageId] = {}
    positives: dict[QueryId, frozenset[ImageId]] = {}
    groups: dict[QueryId, tuple[ImageId, ...]] = {}
    for query, entry in rows:
        target = entry.get("target", str, optional=source.split != "train")
        if target is not None:
            targets[query.id] = source.image(target)
            if targets[query.id] == query.reference:
                _report_same_image(entry, target, source.problems)
        other_positives = _list(entry, "positives", source)
        if isinstance(entry.fields.get("positives"), list) and target is not None:
            positives[query.id] = frozenset([targets[query.id], *other_positives])
        if isinstance(entry.fields.get("subset"), list):
            subset = dict.fromkeys(_list(entry, "subset", source))
            groups[query.id] = tuple(image for image in subset if image != query.reference)
            if target is not None and targets[query.id] not in groups[query.id]:
                source.problems.add(entry.where, "the target is not in its subset")
    _check_complete(len(rows), targets, positives, groups, source)
    queries = tuple(query for query, _ in rows)
    relevance = Relevance(targets, positives) if targets else None
    return LabeledQueries(name, queries, relevance, gallery, PROTOCOL, category, groups)


def _report_same_image(entry: Entry, target: str, problems: ValidationReport) -> None:
    reference = entry.fields["reference"]
    hint = "" if reference == target else f"; {reference!r} has the same bytes"
    problems.add(entry.where, f"reference and target are the same image, {target!r}{hint}")


def _check_complete(
    num_rows: int,
    targets: Sized,
    positives: Sized,
    groups: Sized,
    source: TripletSource,
) -> None:
    """Report a field that only some entries have; positives may be missing in training, which does
    not count them."""
    for field, values in (("targets", targets), ("positives", positives), ("subsets", groups)):
        optional = source.split == "train" and field == "positives"
        if values and len(values) < num_rows and not optional:
            missing = num_rows - len(values)
            source.problems.add(
                source.path, f"{missing} of {num_rows} lines have no {field}, and others have"
            )
