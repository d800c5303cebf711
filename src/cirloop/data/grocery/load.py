"""GroceryStoreDataset (Klasson et al., WACV 2019, github.com/marcusklasson/GroceryStoreDataset) in
its official layout, with human triplets drawn from what each product is.

train.txt, val.txt and test.txt list the photographs (`train/Fruit/Apple/Pink-Lady/x.jpg, 2, 0`),
classes.csv the classes; the folder that a photograph lies in is its fine class. The photographs of
a split are its gallery; splits are never mixed. Texts are drawn (`edits.py`): training texts and
those of evaluation have some phrases in common. Every product that fits is right, so false
negatives are counted exactly.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path, PurePosixPath
from random import Random
from typing import ClassVar, Literal

from pydantic import Field

from cirloop.data.catalogue import (
    AttributeCatalogue,
    Items,
    Phrasebook,
    changes,
    learn_phrases,
    read_items,
    read_phrases,
)
from cirloop.data.grocery.edits import DrawnQuery, draw_queries, kind_of, usable_edits
from cirloop.data.images import escapes_root
from cirloop.data.paths import DataPaths
from cirloop.data.splits import FileSettings, QueryFiles, ReadSplit
from cirloop.types import (
    EvalProtocol,
    Gallery,
    ImageId,
    LabeledQueries,
    Query,
    QueryId,
    Relevance,
    TrainSplit,
    UserError,
)
from cirloop.validation import ValidationReport

PROTOCOL = EvalProtocol(
    "grocery: gallery of the split's photographs, reference removed, any photograph of a product"
    " that fits; queries of one reference product are one cluster",
    primary_metric="any correct recall@1",
    reported=(
        *("any correct recall@1", "any correct recall@5", "any correct recall@10", "map@10"),
        *("any correct recall@1, text alone", "any correct recall@1, image alone"),
    ),
    cutoffs=(1, 5, 10),
    any_correct_cutoffs=(1, 5, 10),
)
ATTRIBUTES = "attributes.yaml"
SLOT = re.compile(r"\{([^{}]+)\}")
PHRASES = "phrases.yaml"


class GrocerySettings(FileSettings):
    """GroceryStoreDataset in its official layout, with drawn texts."""

    type: Literal["grocery"] = "grocery"
    protocol: ClassVar[EvalProtocol] = PROTOCOL
    train_triplets: int = Field(600, ge=1)
    """Human triplets, drawn by `subset_seed`."""
    subset_seed: int = 0
    """Draws the triplets of training."""
    eval_queries: int = Field(1000, ge=1)
    """Queries of val and of test, always the same ones."""
    attributes: Path | None = None
    """What each class is, {class: {attribute: value}}, in YAML or JSON; None: the packaged file."""
    phrases: Path | None = None
    """Words for the changes, under `both`, `train` and `evaluation`; None: the packaged file."""

    def read(self, directory: Path, split: str) -> tuple[QueryFiles, ValidationReport]:
        """Read the photographs of a split, and draw its queries. train.txt is in `dataset` in a
        clone of the repository, or in the directory itself."""
        below = directory / "dataset"
        root = below if below.is_dir() else directory
        problems = ValidationReport(
            f"Put GroceryStoreDataset under --data_dir {root}; docs/photographs.md has the layout."
        )
        products = self.products()
        images = _images(root, split, products, problems)
        if problems.rows:
            return [], problems
        drawn = self._draw(split, products, images)
        ids = [QueryId(f"{split}-{number:05d}") for number in range(len(drawn))]
        every = tuple(sorted(image for of in images.values() for image in of))
        positives = {}
        if split != "train":
            positives = {
                query: frozenset(image for name in row.right for image in images[name])
                for query, row in zip(ids, drawn, strict=True)
            }
        part = LabeledQueries(
            f"grocery_{split}",
            tuple(Query(q, row.reference, row.text) for q, row in zip(ids, drawn, strict=True)),
            Relevance(
                {q: row.target for q, row in zip(ids, drawn, strict=True)},
                positives,
                {q: (kind_of(row.edit),) for q, row in zip(ids, drawn, strict=True)},
            ),
            Gallery(f"grocery/{split}", every),
            PROTOCOL,
            clusters={query: row.product for query, row in zip(ids, drawn, strict=True)},
        )
        return [(part, {image: root / image for image in every})], problems

    def load_train(self, read: ReadSplit, data_paths: DataPaths) -> TrainSplit:
        split = super().load_train(read, data_paths)
        products = self.products()
        folders = {PurePosixPath(image).parent for image in split.gallery.ids}
        items = Items({str(folder): products[folder.name] for folder in folders})
        everything = AttributeCatalogue(items, self.phrasebook("train", "evaluation"))
        learned = AttributeCatalogue(items, learn_phrases(split.triplets, items))
        oracle = GroceryOracle(everything, split.gallery.ids)
        return replace(split, oracle=oracle, catalogue=learned)

    def products(self) -> dict[str, dict[str, str]]:
        """Read what each class is."""
        return read_items(self.attributes or _packaged(ATTRIBUTES))

    def phrasebook(self, *styles: str) -> Phrasebook:
        """Read the phrases of some styles. Raises UserError for one that says what stays."""
        path = self.phrases or _packaged(PHRASES)
        phrasebook = read_phrases(path, ("both", *styles))
        for phrase in phrasebook.phrases:
            if set(SLOT.findall(phrase.text)) - dict(phrase.changes).keys():
                raise UserError(
                    f"{path}: {phrase.text!r} has a slot of what stays or was there. A text alone"
                    " must leave the product open: name new values of the key's attributes only."
                )
        return phrasebook

    def _draw(
        self,
        split: str,
        products: Mapping[str, Mapping[str, str]],
        images: Mapping[str, tuple[ImageId, ...]],
    ) -> list[DrawnQuery]:
        """Draw the queries of a split between its products."""
        is_train = split == "train"
        num = self.train_triplets if is_train else self.eval_queries
        seed = self.subset_seed if is_train else 0
        phrasebook = self.phrasebook("train" if is_train else "evaluation")
        edits = usable_edits(products, sorted(images), phrasebook)
        return draw_queries(edits, images, phrasebook, num, Random(f"grocery {split} {seed}"))


@dataclass(frozen=True)
class GroceryOracle:
    """Exact knowledge of right answers, from the products' attributes."""

    catalogue: AttributeCatalogue
    images: Sequence[ImageId]

    def positives(self, query: Query) -> frozenset[ImageId]:
        return frozenset(self.catalogue.right(query.reference, query.text, self.images))

    def text_is_true(self, reference: ImageId, text: str, image: ImageId) -> bool:
        return self.catalogue.is_true(reference, text, image)

    def distance(self, reference: ImageId, image: ImageId) -> int:
        items = self.catalogue.items
        return len(changes(items.attributes(reference) or {}, items.attributes(image) or {}))


def _images(
    directory: Path, split: str, products: Container[str], problems: ValidationReport
) -> dict[str, tuple[ImageId, ...]]:
    """Read the photographs of a split, by class."""
    rows = csv.reader(problems.lines(directory / "classes.csv")[1:])
    classes = {row[1]: row[0] for row in rows if len(row) > 1}
    path = directory / f"{split}.txt"
    images: dict[str, list[ImageId]] = {}
    for number, line in enumerate(problems.lines(path), 1):
        if not line:
            continue
        where = f"{path} line {number}"
        fields = [field.strip() for field in line.split(",")]
        name = PurePosixPath(fields[0]).parent.name
        if len(fields) != 3 or escapes_root(fields[0]):
            problems.add(where, f"must be `path, fine class, coarse class`, found {line!r:.90}")
        elif classes and classes.get(fields[1]) != name:
            problems.add(where, f"class {fields[1]!r} of classes.csv is not {name!r}")
        elif name not in products:
            problems.add(where, f"the class {name!r} has no attributes")
        else:
            images.setdefault(name, []).append(ImageId(fields[0]))
    if not images and not problems.rows:
        problems.add(path, "names no photographs")
    return {name: tuple(sorted(set(of))) for name, of in images.items()}


def _packaged(name: str) -> Path:
    return Path(str(files("cirloop.data.grocery").joinpath(name)))
