"""Data of one's own: JSON lines and a folder of pictures.

`train.jsonl`, `val.jsonl` and `test.jsonl` hold one object a line: `reference`, `text` (or `texts`, joined by " and "),
`target`, and optionally `id`, `category`, `subset` (images of a group to rank among as well) and `positives` (further
right answers). Images are paths relative to the picture folder. The gallery is every picture of the folder, or those a
list names, one a line. Where no line of a split has a target, the split is for prediction only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cirloop.data.dataset import Dataset
from cirloop.data.sources import Sources, eval_split, train_split
from cirloop.problems import Entry, Problems
from cirloop.types import EvalSplit, Gallery, ImageId, Judged, Query, QueryId, Relevance, TrainSplit

if TYPE_CHECKING:
    from cirloop.data.config import JsonlSettings

PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
KNOWN = {"reference", "text", "texts", "target", "id", "category", "subset", "positives"}


def pictures(directory: Path, settings: JsonlSettings, problems: Problems) -> dict[ImageId, Path]:
    """The gallery's images and where they are."""
    folder = directory / settings.images
    if not folder.is_dir():
        problems.add(folder, "is no directory of pictures (data.images)")
        return {}
    if settings.gallery is None:
        found = [path for path in folder.rglob("*") if path.suffix.lower() in PICTURES]
        if not found:
            problems.add(folder, f"holds no pictures ({', '.join(PICTURES)})")
        return {ImageId(path.relative_to(folder).as_posix()): path for path in sorted(found)}
    names = [name for name in problems.lines(directory / settings.gallery) if name]
    for name, count in sorted(Counter(names).items()):
        if count > 1:
            problems.add(directory / settings.gallery, f"{name!r} is there more than once")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            problems.add(directory / settings.gallery, f"{name!r} is not inside the picture folder")
    return {ImageId(name): folder / name for name in names}


def judged(
    directory: Path, settings: JsonlSettings, split: str, problems: Problems
) -> tuple[list[Judged], dict[ImageId, Path]]:
    """The queries of `split`, a part per category if its lines have one, and the pictures."""
    files = pictures(directory, settings, problems)
    path = directory / getattr(settings, split)
    rows: dict[str, list[tuple[Query, Entry]]] = {}
    seen: set[str] = set()
    for number, (where, entry) in enumerate(problems.json_lines(path)):
        for name in sorted(entry.fields.keys() - KNOWN):
            problems.add(where, f"has an unknown field {name!r}; known: {', '.join(sorted(KNOWN))}")
        reference, text = entry.get("reference", str), _text(entry)
        for role, image in _images(entry):
            if image not in files:
                problems.add(where, f"{role} {image!r} is not in the gallery")
        known_as = entry.get("id", str) if "id" in entry.fields else f"{split}/{number}"
        if known_as in seen:
            problems.add(where, f"the id {known_as!r} is there more than once")
        category = (entry.get("category", str) or "") if "category" in entry.fields else ""
        if reference is None or text is None or known_as is None:
            continue
        seen.add(known_as)
        rows.setdefault(category, []).append((Query(QueryId(known_as), ImageId(reference), text), entry))
    if "" in rows and len(rows) > 1:
        problems.add(path, f"{len(rows['']):,} lines have no category and others have one")
    gallery = Gallery(f"jsonl/{split}", tuple(sorted(files)))
    parts = [_part(path, split, category, rows[category], gallery, problems) for category in sorted(rows)]
    return parts, files


def _text(entry: Entry) -> str | None:
    if "texts" not in entry.fields:
        return entry.get("text", str)
    texts = [text.strip() for text in entry.list_of("texts", str) or [] if text.strip()]
    return " and ".join(texts) or entry.get("text", str)


def _images(entry: Entry) -> Iterator[tuple[str, str]]:
    for role in ("reference", "target"):
        if isinstance(entry.fields.get(role), str):
            yield role, entry.fields[role]
    for role in ("subset", "positives"):
        for image in (entry.list_of(role, str) or []) if role in entry.fields else ():
            yield role, image


def _part(
    path: Path, split: str, category: str, rows: list[tuple[Query, Entry]], gallery: Gallery, problems: Problems
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
        if "positives" in entry.fields and target is not None:
            positives[query.id] = frozenset(ImageId(i) for i in [target, *entry.fields["positives"]])
        if "subset" in entry.fields:
            members = [ImageId(i) for i in entry.fields["subset"] if i != query.reference]
            if target is not None and target not in members:
                problems.add(entry.where, "the target is not in its subset")
            groups[query.id] = tuple(members)
    for what, found in (("targets", targets), ("positives", positives), ("subsets", groups)):
        if found and len(found) < len(rows):
            problems.add(path, f"{len(rows) - len(found)} of {len(rows)} lines have no {what}, and others have")
    relevance = Relevance(targets, positives) if targets else None
    return Judged(f"jsonl_{split}", tuple(query for query, _ in rows), relevance, gallery, category, groups)


def load(settings: JsonlSettings, sources: Sources) -> Dataset:
    """Train, val and test from the files that `settings` names."""
    directory, allow = sources.root("jsonl"), settings.allow_missing_images

    def read(split: str) -> tuple[list[Judged], dict[ImageId, Path]]:
        problems = Problems()
        made = judged(directory, settings, split, problems)
        problems.stop(f"Put {split} right under --data_dir {directory}; docs/datasets.md has the form of a line.")
        return made

    def train() -> TrainSplit:
        return train_split(*read("train"), allow, sources)

    def evaluated(split: str) -> tuple[EvalSplit, ...]:
        parts, files = read(split)
        return tuple(eval_split(part, files, allow, sources) for part in parts)

    return Dataset("jsonl", train, {split: partial(evaluated, split) for split in ("val", "test")})
