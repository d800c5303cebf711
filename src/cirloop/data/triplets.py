"""Triplets of one's own, an object each, whatever they were read from: checked, and made into parts.

`reference`, `text` (or `texts`, joined by " and "), `target`, and optionally `id`, `category`, `subset` (images of a
group to rank among as well) and `positives` (further right answers). Where no object of a split has a target, the split
is for prediction only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from cirloop.problems import Entry, Problems
from cirloop.types import Gallery, ImageId, Judged, Query, QueryId, Relevance

LISTS = {"subset", "positives"}
KNOWN = {"reference", "text", "texts", "target", "id", "category", *LISTS}


def judged(
    entries: Iterable[tuple[str, Entry]],
    files: Mapping[ImageId, object],
    data_set: str,
    split: str,
    path: object,
    problems: Problems,
) -> list[Judged]:
    """The queries of `split`, a part per category if its objects have one. `path` is for messages."""
    rows: dict[str, list[tuple[Query, Entry]]] = {}
    seen: set[str] = set()
    for number, (where, entry) in enumerate(entries):
        for name in sorted(entry.fields.keys() - KNOWN):
            problems.add(where, f"has an unknown field {name!r}; known: {', '.join(sorted(KNOWN))}")
        reference, text = entry.get("reference", str), _text(entry)
        for role in sorted(LISTS & entry.fields.keys()):
            entry.list_of(role, str)
        for role, image in named(entry):
            if image not in files:
                problems.add(where, f"{role} {image!r} is not in the gallery")
        known_as = entry.get("id", str) if "id" in entry.fields else f"{split}/{number}"
        if known_as in seen:
            problems.add(where, f"the id {known_as!r} is there more than once")
        category = (entry.get("category", str) or "") if "category" in entry.fields else ""
        if reference is None or text is None or known_as is None:
            continue
        seen.add(known_as)
        rows.setdefault(category, []).append(
            (Query(QueryId(known_as), ImageId(reference), text, category or None), entry)
        )
    if "" in rows and len(rows) > 1:
        problems.add(path, f"{len(rows['']):,} lines have no category and others have one")
    gallery = Gallery(f"{data_set}/{split}", tuple(sorted(files)))
    name = f"{data_set}_{split}"
    return [_part(name, path, split, category, rows[category], gallery, problems) for category in sorted(rows)]


def _text(entry: Entry) -> str | None:
    if "texts" not in entry.fields:
        return entry.get("text", str)
    texts = [text.strip() for text in entry.list_of("texts", str) or [] if text.strip()]
    return " and ".join(texts) or entry.get("text", str)


def named(entry: Entry) -> Iterator[tuple[str, str]]:
    """Role and name of each image of an object; what is no name is passed over."""
    for role in ("reference", "target", *sorted(LISTS)):
        value = entry.fields.get(role)
        for image in value if role in LISTS and isinstance(value, list) else [value]:
            if isinstance(image, str) and image.strip() and (role in LISTS) == isinstance(value, list):
                yield role, image


def _part(
    name: str,
    path: object,
    split: str,
    category: str,
    rows: list[tuple[Query, Entry]],
    gallery: Gallery,
    problems: Problems,
) -> Judged:
    targets: dict[QueryId, ImageId] = {}
    positives: dict[QueryId, frozenset[ImageId]] = {}
    groups: dict[QueryId, tuple[ImageId, ...]] = {}
    for query, entry in rows:
        target = entry.get("target", str, optional=split != "train")
        if target is not None:
            targets[query.id] = ImageId(target)
            if target == query.reference:
                problems.add(entry.where, f"reference and target are the same image, {target!r}")
        if isinstance(entry.fields.get("positives"), list) and target is not None:
            positives[query.id] = frozenset(ImageId(i) for i in [target, *entry.fields["positives"]])
        if isinstance(entry.fields.get("subset"), list):
            members = [ImageId(i) for i in entry.fields["subset"] if i != query.reference]
            if target is not None and target not in members:
                problems.add(entry.where, "the target is not in its subset")
            groups[query.id] = tuple(members)
    for what, found in (("targets", targets), ("positives", positives), ("subsets", groups)):
        if found and len(found) < len(rows):
            problems.add(path, f"{len(rows) - len(found)} of {len(rows)} lines have no {what}, and others have")
    relevance = Relevance(targets, positives) if targets else None
    return Judged(name, tuple(query for query, _ in rows), relevance, gallery, category, groups)
