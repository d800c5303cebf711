"""Benchmarks in their official layouts with drawn images: `shapes` scenes in the files of
each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from cirloop.data.shapes.language import read
from cirloop.data.shapes.scene import results
from cirloop.data.shapes.splits import FAMILY_SIZE, Scenes, build_splits


def _save(scenes: Scenes, row: int, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scenes.pixels(row)).save(path)


def _write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_cirr(directory: Path, families: int = 6) -> Path:
    """Train, val and test1 of `families` families; a query's group is its reference, target and
    four of its family."""
    for split, ours, folder in (
        ("train", "train", "train/0"),
        ("val", "val", "dev"),
        ("test1", "test", "test1"),
    ):
        scenes = build_splits()[ours]
        num = families * FAMILY_SIZE
        name = {row: f"{folder.split('/')[0]}-{row}-img0" for row in range(num)}
        for row in range(num):
            _save(scenes, row, directory / folder / f"{name[row]}.png")
        _write(
            directory / "image_splits" / f"split.rc2.{split}.json",
            {name[row]: f"./{folder}/{name[row]}.png" for row in range(num)},
        )
        entries = []
        for number, ask in enumerate(a for a in scenes.queries if a.reference < num):
            start = ask.reference // FAMILY_SIZE * FAMILY_SIZE
            others = [
                r for r in range(start, start + FAMILY_SIZE) if r not in (ask.reference, ask.target)
            ][:4]
            members = [name[row] for row in sorted([ask.reference, ask.target, *others])]
            entry = {"pairid": 100 + number, "reference": name[ask.reference], "caption": ask.text}
            entry |= {"img_set": {"id": start, "members": members}}
            entries.append(entry | ({} if split == "test1" else {"target_hard": name[ask.target]}))
        _write(directory / "captions" / f"cap.rc2.{split}.json", entries)
    return directory


def write_fashioniq(directory: Path, families: int = 3) -> Path:
    """Three categories of `families` families each; two captions per query, one of them sometimes
    empty."""
    for split in ("train", "val"):
        scenes = build_splits()[split]
        for place, category in enumerate(("dress", "shirt", "toptee")):
            rows = range(place * families * FAMILY_SIZE, (place + 1) * families * FAMILY_SIZE)
            name = {row: f"B{split}{row:05d}" for row in rows}
            for row in rows:
                folder = directory / "images" if place else directory / "images" / category
                _save(scenes, row, folder / f"{name[row]}.{'png' if place else 'jpg'}")
            _write(
                directory / "image_splits" / f"split.{category}.{split}.json", list(name.values())
            )
            entries = [
                {
                    "candidate": name[a.reference],
                    "target": name[a.target],
                    "captions": [a.text, "" if n % 3 else a.text],
                }
                for n, a in enumerate(a for a in scenes.queries if a.reference in name)
            ]
            _write(directory / "captions" / f"cap.{category}.{split}.json", entries)
    return directory


def write_circo(directory: Path, families: int = 6) -> Path:
    """Val and test over one gallery of `families` families, with every right answer from the
    scenes."""
    scenes, num = build_splits()["val"], families * FAMILY_SIZE
    coco = directory / "COCO2017_unlabeled"
    for row in range(num):
        _save(scenes, row, coco / "unlabeled2017" / f"{1000 + row:012d}.jpg")
    _write(
        coco / "annotations" / "image_info_unlabeled2017.json",
        {"images": [{"id": 1000 + n} for n in range(num)]},
    )
    entries = []
    for ask in (a for a in scenes.queries if a.reference < num):
        changes = read(ask.text)
        assert changes is not None
        wanted = results(scenes.scenes[ask.reference], changes)
        right = [row for row in range(num) if scenes.scenes[row] in wanted and row != ask.target]
        entries.append(
            {
                "id": len(entries),
                "reference_img_id": 1000 + ask.reference,
                "relative_caption": ask.text,
                "shared_concept": "shapes",
                "target_img_id": 1000 + ask.target,
                "gt_img_ids": [1000 + row for row in (ask.target, *right)],
                "semantic_aspects": ["addition"],
            }
        )
    _write(directory / "annotations" / "val.json", entries)
    hidden = {"target_img_id", "gt_img_ids", "semantic_aspects"}
    unlabelled = [{k: v for k, v in entry.items() if k not in hidden} for entry in entries]
    _write(directory / "annotations" / "test.json", unlabelled)
    return directory


def write_jsonl(directory: Path, families: int = 6) -> Path:
    """Train and val as JSON lines over one folder of images."""
    for split in ("train", "val"):
        scenes, num = build_splits()[split], families * FAMILY_SIZE
        for row in range(num):
            _save(scenes, row, directory / "images" / split / f"{row}.png")
        lines = [
            {
                "reference": f"{split}/{a.reference}.png",
                "text": a.text,
                "target": f"{split}/{a.target}.png",
            }
            for a in scenes.queries
            if a.reference < num
        ]
        (directory / f"{split}.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return directory


def write_hp_fashioniq(directory: Path, families: int = 3) -> Path:
    """FashionIQ's stand-in, and for each query of two of its categories two sets of five: the right
    image is in one."""
    write_fashioniq(directory, families)
    sets: dict[str, list[object]] = {
        name: []
        for name in (
            "ref_img_paths",
            "targ_img_paths",
            "sentences",
            "retrieved_set1",
            "retrieved_set2",
        )
    }
    preferred = sets.setdefault("preferred set", [])
    for category in ("shirt", "toptee"):
        names = json.loads((directory / "image_splits" / f"split.{category}.val.json").read_text())
        entries = json.loads((directory / "captions" / f"cap.{category}.val.json").read_text())
        for number, entry in enumerate(entries):
            reference, target = entry["candidate"], entry["target"]
            others = [name for name in names if name not in (reference, target)][number % 7 :][:9]
            shown = [[target, *others[:4]], others[4:9]]
            chosen = 1 + number % 2
            preferred.append(str(chosen))
            for place, group in zip((1, 2), shown if chosen == 1 else shown[::-1], strict=True):
                paths = [f"/-/image_data/{category}/{name}.jpg" for name in group]
                sets[f"retrieved_set{place}"].append({"img_path": paths, "user_score": "3"})
            sets["ref_img_paths"].append(f"/-/image_data/{category}/{reference}.jpg")
            sets["targ_img_paths"].append(f"/-/image_data/{category}/{target}.jpg")
            sets["sentences"].append(
                entry["captions"][0].replace(".", "dotmark") + "dotmark  and is niceandmarkred"
            )
    _write(directory / "hpfiq.json", {"user_1": {"question_set_1": sets}})
    return directory


def write_huggingface(directory: Path, families: int = 6) -> Path:
    """Train and validation as a saved `DatasetDict` with the images in its rows."""
    import datasets

    features = datasets.Features(
        {
            "query_image": datasets.Image(),
            "modification": datasets.Value("string"),
            "target_image": datasets.Image(),
        }
    )
    splits = {}
    for split, ours in (("train", "train"), ("validation", "val")):
        scenes, num = build_splits()[ours], families * FAMILY_SIZE
        rows = [
            {
                "query_image": Image.fromarray(scenes.pixels(a.reference)),
                "modification": a.text,
                "target_image": Image.fromarray(scenes.pixels(a.target)),
            }
            for a in scenes.queries
            if a.reference < num
        ]
        splits[split] = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict(splits).save_to_disk(str(directory))
    return directory


GROCERIES = ("Golden-Delicious", "Granny-Smith", "Red-Delicious", "Lemon", "Lime", "Cantaloupe")
GROCERIES += ("Galia-Melon", "Watermelon", "Green-Bell-Pepper", "Red-Bell-Pepper")
GROCERIES += ("Yellow-Bell-Pepper", "Bravo-Apple-Juice", "Bravo-Orange-Juice")
GROCERIES += ("God-Morgon-Apple-Juice", "God-Morgon-Orange-Juice")


def write_grocery(directory: Path, photographs: int = 2) -> Path:
    """Train, val and test with some of the classes and so many photographs of each."""
    rows = 0
    for split in ("train", "val", "test"):
        lines = []
        for number, name in enumerate(GROCERIES):
            for copy in range(photographs):
                path = f"{split}/Food/{name}/{name}_{copy:03d}.png"
                _save(build_splits()["train"], rows, directory / "dataset" / path)
                lines.append(f"{path}, {number}, 0")
                rows += 1
        (directory / "dataset" / f"{split}.txt").write_text("\n".join(lines) + "\n")
    heads = "Class Name (str),Class ID (int),Coarse Class Name (str),Coarse Class ID (int)"
    classes = [f"{name},{number},Food,0" for number, name in enumerate(GROCERIES)]
    (directory / "dataset" / "classes.csv").write_text("\n".join([heads, *classes]) + "\n")
    return directory


@dataclass(frozen=True)
class Files:
    """A small copy of a data set, and the strategy that a run on it mines with."""

    write: Callable[[Path], Path] | None
    settings: dict[str, Any] = field(default_factory=dict)
    strategy: str = "top_k"


COLUMNS = {"reference": "query_image", "text": "modification", "target": "target_image"}
FEW_SHAPES = {"train_families": 4, "train_triplets": 24, "eval_families": 3}
DATA_SETS = {
    "jsonl": Files(write_jsonl),
    "cirr": Files(write_cirr, strategy="group"),
    "circo": Files(write_circo, {"train": {"type": "cirr"}}),
    "fashioniq": Files(write_fashioniq, strategy="category_mix"),
    "hp_fashioniq": Files(write_hp_fashioniq),
    "huggingface": Files(write_huggingface, {"columns": COLUMNS}),
    "grocery": Files(write_grocery, {"train_triplets": 24, "eval_queries": 30}),
    "shapes": Files(None, FEW_SHAPES),
}
"""Every data set by its type."""
