"""HP-FashionIQ (QuRe, Kwak et al., ICML 2025): which of two sets of retrieved images people
preferred.

`hpfiq.json` beside FashionIQ's images: user -> question set -> lists of 25: `ref_img_paths`,
`sentences`, `retrieved_set1` and `retrieved_set2` (`img_path` of five images), `preferred set` ("1"
or "2"). Built from FashionIQ's val split, so that one may train on FashionIQ's train. Of a path
only the last two parts count, category and file name. The sentences are two of FashionIQ's captions
whose marks were written out (`dotmark`); they are turned back, and joined as in FashionIQ's
evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal

from cirloop.data import fashioniq
from cirloop.data.images import escapes_root
from cirloop.data.paths import DataPaths
from cirloop.data.splits import FileSettings, QueryFiles, ReadSplit, warn_blank_texts
from cirloop.data.trained_on import TrainedOn, train_split_of
from cirloop.types import (
    EvalProtocol,
    Gallery,
    ImageId,
    LabeledQueries,
    Preference,
    Query,
    QueryId,
    Relevance,
    TrainSplit,
)
from cirloop.validation import Entry, ValidationReport

OFFICIAL = (3050, 5473)
"""Questions, and images in them: references and shown sets."""
PROTOCOL = EvalProtocol(
    "HP-FashionIQ: mean similarity of a set's images against the set that a person preferred",
    primary_metric="symmetric accuracy",
    reported=("preference rate", "symmetric accuracy"),
)
MARKS = {"dotmark": ".", "questionmark": "?", "andmark": "&", "starmark": "*"}
LISTS = ("ref_img_paths", "sentences", "retrieved_set1", "retrieved_set2", "preferred set")


class HpFashionIQSettings(FileSettings):
    """HP-FashionIQ beside FashionIQ's images: evaluation, after training on FashionIQ."""

    type: Literal["hp_fashioniq"] = "hp_fashioniq"
    protocol: ClassVar[EvalProtocol] = PROTOCOL
    eval_names = ("val",)
    file: str = "hpfiq.json"
    """The annotations, under --data_dir."""
    train: TrainedOn | None = fashioniq.FashionIQSettings()
    """The data set to train on; its files are under --train_dir, by default --data_dir."""

    def read(self, directory: Path, split: str) -> tuple[QueryFiles, ValidationReport]:
        """Read the questions, with FashionIQ's images."""
        problems = ValidationReport(
            f"Put {self.file} and FashionIQ's images under --data_dir {directory}; see"
            " docs/datasets.md."
        )
        part, categories = load_queries(directory, self.file, problems)
        files: dict[ImageId, Path] = {}
        for category in sorted(set(categories.values())):
            images = [image for image, of in categories.items() if of == category]
            files |= fashioniq.image_paths(directory, images, category)
        return [(part, files)], problems

    def load_train(self, read: ReadSplit, data_paths: DataPaths) -> TrainSplit:
        return train_split_of(self.type, self.train, data_paths)


def restore_captions(sentence: str) -> str:
    """Write the sentence as FashionIQ's evaluation does: marks restored, captions joined.

    `andmark` also lies in "landmark", which stays.
    """
    marked = re.sub(
        r"\blandmarks?\b|" + "|".join(MARKS),
        lambda match: MARKS.get(match[0], match[0]),
        sentence,
        flags=re.IGNORECASE,
    )
    return fashioniq.join_captions(
        [" ".join(caption.split()) for caption in marked.split("  and ")]
    )


def load_queries(
    directory: Path, file: str, problems: ValidationReport
) -> tuple[LabeledQueries, dict[ImageId, str]]:
    """Read the questions and the category of each image; what is wrong is added to `problems`."""
    queries: list[Query] = []
    preferences: dict[QueryId, Preference] = {}
    categories: dict[ImageId, str] = {}
    blanks: list[str] = []
    for name, entry in _questions(directory / file, problems):
        reference = _images(
            entry, "ref_img_paths", [entry.get("ref_img_paths", str)], categories, problems
        )
        sentence = entry.get("sentences", str, blank=True)
        text = None if sentence is None else restore_captions(sentence)
        blanks += [name] if text == "" else []
        shown = []
        for role in ("retrieved_set1", "retrieved_set2"):
            group = entry.get(role, dict)
            where = f"{entry.where} {role}"
            paths = (
                None if group is None else Entry(group, where, problems).list_of("img_path", str)
            )
            if paths == []:
                problems.add(where, "'img_path' holds no images")
            shown.append(_images(entry, role, paths or [], categories, problems))
            if len(set(shown[-1])) < len(shown[-1]):
                problems.add(where, "holds an image more than once")
        preferred = entry.fields.get("preferred set")
        if preferred not in ("1", "2"):
            problems.add(entry.where, f"'preferred set' must be '1' or '2', found {preferred!r}")
        elif reference and text is not None and all(shown):
            queries.append(Query(QueryId(name), reference[0], text, categories[reference[0]]))
            preferences[QueryId(name)] = Preference(shown[0], shown[1], int(preferred))
    warn_blank_texts(directory / file, blanks)
    gallery = Gallery("hp_fashioniq/val", tuple(sorted(categories)))
    relevance = Relevance({}, preferences=preferences)
    return (
        LabeledQueries(
            "hp_fashioniq_val", tuple(queries), relevance, gallery, PROTOCOL, official=OFFICIAL
        ),
        categories,
    )


def _questions(path: Path, problems: ValidationReport) -> Iterator[tuple[str, Entry]]:
    """Yield each question as an entry with one value of every list."""
    users = problems.json(path)
    if users is not None and not (isinstance(users, dict) and users):
        problems.add(path, "holds no users")
    for user, sets in users.items() if isinstance(users, dict) else ():
        if not (isinstance(sets, dict) and sets):
            problems.add(f"{path} {user}", "must be an object of question sets")
            continue
        for name, content in sets.items():
            where = f"{path} {user} {name}"
            fields = Entry(content, where, problems) if isinstance(content, dict) else None
            if fields is None:
                problems.add(where, "must be an object of lists")
                continue
            lists: dict[str, list[Any] | None] = {key: fields.get(key, list) for key in LISTS}
            lengths = {key: len(values) for key, values in lists.items() if values is not None}
            if len(set(lengths.values())) > 1:
                problems.add(where, f"the lists differ in length: {lengths}")
            elif len(lengths) == len(LISTS):
                for number in range(lengths["sentences"]):
                    row = {
                        key: values[number] for key, values in lists.items() if values is not None
                    }
                    yield (
                        f"{user}/{name}/{number}",
                        Entry(row, f"{where} question {number}", problems),
                    )


def _images(
    entry: Entry,
    role: str,
    paths: list[str] | list[str | None],
    categories: dict[ImageId, str],
    problems: ValidationReport,
) -> tuple[ImageId, ...]:
    """Return the image ids of paths like `/-/image_data/shirt/B000LUIBH8.jpg`; add their
    categories to `categories`."""
    images = []
    for text in paths:
        if text is None:
            continue
        path = PurePosixPath(text)
        if path.parent.name not in fashioniq.CATEGORIES or not path.stem or escapes_root(path.name):
            problems.add(
                f"{entry.where} {role}", f"{text!r} does not end in <category>/<image>.jpg"
            )
            continue
        categories.setdefault(ImageId(path.stem), path.parent.name)
        images.append(ImageId(path.stem))
    return tuple(images)
