"""How many known right answers each strategy mines: all 19 strategies by the kinds of known right
answers.

A small train split full of traps. Its queries come in pairs that ask for the same thing (the same
image under two names as reference, the same text in other case and spaces) and have two targets;
a line names two further right images; there are copies of target and reference, and second
spellings of their names; and the captioner wrote the text again for one more image. All of these
score next to the target, as do some that are wrong. Prints, per strategy and kind, the mined pairs
of a query and such an image, over the fallbacks `none`, `top_k` and `random`; in brackets those
that are mined where only target and reference are left out. In seconds on a CPU.

    python benchmarks/known_right_negatives.py
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cirloop.data.images import FileImages
from cirloop.data.known_positives import Confirmed, KnownPositives
from cirloop.monitoring.console import table
from cirloop.negatives import STRATEGIES as BY_TYPE
from cirloop.negatives import MiningSettings
from cirloop.negatives.base import MiningContext, Strategy
from cirloop.negatives.miner import MiningInputs, mine
from cirloop.reproducibility import prepare_process
from cirloop.stages.exclusions import barred_rows
from cirloop.types import Gallery, ImageId, Query, QueryId, TrainSplit, Triplet

PAIRS, NEAR, WRONG, DIMENSIONS, K = 12, 6, 60, 16, 5
KINDS = ("positives", "copies", "spellings", "same text", "confirmed")
FALLBACKS = ("none", "top_k", "random")
STRATEGIES = tuple(BY_TYPE.values())


@dataclass(frozen=True)
class World:
    """A train split, what the captioner confirmed, and per query the kind of each right image but
    the target."""

    train: TrainSplit
    confirmed: list[Confirmed]
    right: dict[QueryId, dict[ImageId, str]]
    queries_QD: Any
    gallery_GD: Any


class Images:
    """Files of the gallery, whose bytes nobody decodes, and a vector of each."""

    def __init__(self, folder: Path, random: np.random.Generator) -> None:
        self._folder, self._random = folder, random
        self.files: dict[ImageId, Path] = {}
        self.vectors: dict[ImageId, Any] = {}

    def put(self, name: str, content: str, near_D: Any) -> ImageId:
        """An image of that name and content whose vector is near to another."""
        image = ImageId(name)
        self.files[image] = self._folder / name
        self.files[image].write_text(content)
        self.vectors[image] = unit(near_D + 0.1 * self._random.standard_normal(DIMENSIONS))
        return image

    def spelled(self, image: ImageId) -> ImageId:
        """The same file under a second spelling of its name."""
        again = ImageId(f"./{image}")
        self.files[again], self.vectors[again] = self.files[image], self.vectors[image]
        return again


def unit(vector_D: Any) -> Any:
    return (vector_D / np.linalg.norm(vector_D)).astype(np.float32)


def make_world(folder: Path, seed: int = 0) -> World:
    """Write the images' files to `folder`, and say what is right."""
    random = np.random.default_rng(seed)
    pictures = Images(folder, random)
    triplets: list[Triplet] = []
    positives: dict[QueryId, frozenset[ImageId]] = {}
    confirmed: list[Confirmed] = []
    right: dict[QueryId, dict[ImageId, str]] = {}
    asked: list[Any] = []
    for pair in range(PAIRS):
        centre_D = random.standard_normal(DIMENSIONS)
        kinds: list[tuple[ImageId, str, QueryId | None]] = []
        pair_of = []
        for name, text in (("a", f"Make it  RED {pair}"), ("b", f" make it red {pair}")):
            reference = pictures.put(f"r{pair}{name}.png", f"reference {pair}", centre_D)
            target = pictures.put(f"t{pair}{name}.png", f"target {pair}{name}", centre_D)
            query = Query(QueryId(f"q{pair}{name}"), reference, text)
            line = [
                pictures.put(f"p{pair}{name}{i}.png", f"positive {pair}{name}{i}", centre_D)
                for i in range(2)
            ]
            again = pictures.put(f"c{pair}{name}.png", f"confirmed {pair}{name}", centre_D)
            copy = pictures.put(f"copy of {target}", f"target {pair}{name}", centre_D)
            positives[query.id] = frozenset(line)
            confirmed.append((query.reference, query.text, again))
            kinds += [(image, "positives", query.id) for image in line] + [
                (target, "target", query.id)
            ]
            kinds += [(image, "copies", None) for image in (reference, copy)] + [
                (again, "confirmed", None)
            ]
            kinds += [(pictures.spelled(image), "spellings", None) for image in (reference, target)]
            pair_of.append(Triplet(query, target))
            asked.append(unit(centre_D + 0.05 * random.standard_normal(DIMENSIONS)))
        for triplet in pair_of:
            own = (triplet.query.id, None)
            of_all = {image: kind if owner in own else "same text" for image, kind, owner in kinds}
            itself = (triplet.target, triplet.query.reference)
            right[triplet.query.id] = {
                image: kind for image, kind in of_all.items() if image not in itself
            }
        triplets += pair_of
        for number in range(NEAR):
            pictures.put(f"n{pair}{number}.png", f"near {pair}{number}", centre_D)
    for number in range(WRONG):
        pictures.put(f"w{number}.png", f"wrong {number}", random.standard_normal(DIMENSIONS))
    ids = tuple(sorted(pictures.files))
    train = TrainSplit(
        "traps/train",
        tuple(triplets),
        Gallery("traps/train", ids),
        FileImages(pictures.files),
        positives=positives,
    )
    gallery_GD = np.stack([pictures.vectors[image] for image in ids])
    return World(train, confirmed, right, np.stack(asked), gallery_GD)


def mining_context(world: World) -> MiningContext:
    """Something of everything that a strategy may need."""
    size, count = len(world.gallery_GD), len(world.queries_QD)
    colours = ("red", "blue", "green")
    return MiningContext(
        0,
        rounds=1,
        query_ids=[t.query.id for t in world.train.triplets],
        groups=[frozenset(range(size))] * count,
        categories=["ab"[row % 2] for row in range(size)],
        attributes=[
            {"colour": colours[row % 3], "size": ("big", "small")[row % 2]} for row in range(size)
        ],
        requested_attributes=[{"colour": "red"}] * count,
        vectors_GD=world.gallery_GD,
        text_scores=lambda numbers: (
            np.random.default_rng(5).uniform(-1, 1, (count, size)).astype(np.float32)[numbers]
        ),
    )


def of(
    kind: type[Strategy],
    k: int,
    fallback: Any = "none",
    search: Any = "exact",
    rank_reference: bool = False,
    **own: Any,
) -> MiningSettings:  # fmt: skip
    """Mining `k` images for every query by a strategy, those that hold others with two."""
    held: dict[str, Any] = {}
    if kind.__name__ == "Mixture":
        held = {
            "parts": [
                {"weight": 2, "strategy": {"type": "random"}},
                {"strategy": {"type": "top_k"}},
            ]
        }
    if kind.__name__ == "Curriculum":
        held = {"stages": [{"type": "random"}, {"type": "online_hardest"}]}
    return MiningSettings(
        strategy=kind(**held, negatives_per_query=k, **own),  # type: ignore[arg-type]
        fallback=fallback, search=search, rank_reference=rank_reference, only_failed_queries=False,
    )  # fmt: skip


def mined(
    world: World, settings: MiningSettings, known: bool = True
) -> list[tuple[QueryId, ImageId]]:
    """Queries and the images mined for them; without `known` only target and reference are left
    out."""
    train, rows = world.train, world.train.gallery.rows()
    barred, _ = barred_rows(train, KnownPositives.of(train, confirmed=world.confirmed))
    vectors = MiningInputs(
        world.queries_QD, world.gallery_GD, np.array([rows[t.target] for t in train.triplets]),
        np.array([rows[t.query.reference] for t in train.triplets]), barred if known else None,
    )  # fmt: skip
    return [
        (train.triplets[each.query_index].query.id, train.gallery.ids[column])
        for each in mine(settings, vectors, mining_context(world))
        for column in each.gallery_indices
    ]


def right_ones(world: World, pairs: Sequence[tuple[QueryId, ImageId]]) -> Counter[str]:
    """The known right answers among mined pairs, by kind."""
    return Counter(
        world.right[query][image] for query, image in pairs if image in world.right[query]
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        world, rows = make_world(Path(folder)), []
        for kind in STRATEGIES:
            fallbacks = ("none",) if kind.model_fields["type"].default == "none" else FALLBACKS
            settings = [of(kind, K, fallback) for fallback in fallbacks]
            pairs = [pair for each in settings for pair in mined(world, each)]
            careless = [pair for each in settings for pair in mined(world, each, known=False)]
            now, before = right_ones(world, pairs), right_ones(world, careless)
            counts = [f"{now[name]} ({before[name]})" for name in KINDS]
            rows.append((kind.model_fields["type"].default, *counts, len(pairs)))
    table(
        "known right answers mined; in brackets without what is known",
        ("strategy", *KINDS, "images"),
        rows,
    )


if __name__ == "__main__":
    prepare_process()
    main()
