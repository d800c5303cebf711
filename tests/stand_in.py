"""Benchmarks in their official layouts with drawn pictures: `shapes` scenes in the files of each."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from cirloop.data.shapes.language import read
from cirloop.data.shapes.scene import results
from cirloop.data.shapes.splits import FAMILY_SIZE, Scenes, held_out


def _save(scenes: Scenes, row: int, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scenes.pixels(row)).save(path)


def _write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_cirr(directory: Path, families: int = 6) -> Path:
    """Train, val and test1 of `families` families; a query's group is its reference, target and four of its family."""
    for split, ours, folder in (("train", "train", "train/0"), ("val", "val", "dev"), ("test1", "test", "test1")):
        scenes = held_out()[ours]
        num = families * FAMILY_SIZE
        name = {row: f"{folder.split('/')[0]}-{row}-img0" for row in range(num)}
        for row in range(num):
            _save(scenes, row, directory / folder / f"{name[row]}.png")
        _write(
            directory / "image_splits" / f"split.rc2.{split}.json",
            {name[row]: f"./{folder}/{name[row]}.png" for row in range(num)},
        )
        entries = []
        for number, ask in enumerate(a for a in scenes.asks if a.reference < num):
            start = ask.reference // FAMILY_SIZE * FAMILY_SIZE
            others = [r for r in range(start, start + FAMILY_SIZE) if r not in (ask.reference, ask.target)][:4]
            members = [name[row] for row in sorted([ask.reference, ask.target, *others])]
            entry = {"pairid": 100 + number, "reference": name[ask.reference], "caption": ask.text}
            entry |= {"img_set": {"id": start, "members": members}}
            entries.append(entry | ({} if split == "test1" else {"target_hard": name[ask.target]}))
        _write(directory / "captions" / f"cap.rc2.{split}.json", entries)
    return directory


def write_fashioniq(directory: Path, families: int = 3) -> Path:
    """Three categories of `families` families each; two captions per query, one of them sometimes empty."""
    for split in ("train", "val"):
        scenes = held_out()[split]
        for place, category in enumerate(("dress", "shirt", "toptee")):
            rows = range(place * families * FAMILY_SIZE, (place + 1) * families * FAMILY_SIZE)
            name = {row: f"B{split}{row:05d}" for row in rows}
            for row in rows:
                folder = directory / "images" if place else directory / "images" / category
                _save(scenes, row, folder / f"{name[row]}.{'png' if place else 'jpg'}")
            _write(directory / "image_splits" / f"split.{category}.{split}.json", list(name.values()))
            entries = [
                {
                    "candidate": name[a.reference],
                    "target": name[a.target],
                    "captions": [a.text, "" if n % 3 else a.text],
                }
                for n, a in enumerate(a for a in scenes.asks if a.reference in name)
            ]
            _write(directory / "captions" / f"cap.{category}.{split}.json", entries)
    return directory


def write_circo(directory: Path, families: int = 6) -> Path:
    """Val and test over one gallery of `families` families, with every right answer from the scenes."""
    scenes, num = held_out()["val"], families * FAMILY_SIZE
    coco = directory / "COCO2017_unlabeled"
    for row in range(num):
        _save(scenes, row, coco / "unlabeled2017" / f"{1000 + row:012d}.jpg")
    _write(coco / "annotations" / "image_info_unlabeled2017.json", {"images": [{"id": 1000 + n} for n in range(num)]})
    entries = []
    for ask in (a for a in scenes.asks if a.reference < num):
        changes = read(ask.text)
        assert changes is not None
        wanted = results(scenes.scenes[ask.reference], changes)
        right = [row for row in range(num) if scenes.scenes[row] in wanted and row != ask.target]
        entries.append(
            {
                "id": len(entries), "reference_img_id": 1000 + ask.reference, "relative_caption": ask.text,
                "shared_concept": "shapes", "target_img_id": 1000 + ask.target,
                "gt_img_ids": [1000 + row for row in (ask.target, *right)], "semantic_aspects": ["addition"],
            }
        )  # fmt: skip
    _write(directory / "annotations" / "val.json", entries)
    hidden = {"target_img_id", "gt_img_ids", "semantic_aspects"}
    unlabelled = [{k: v for k, v in entry.items() if k not in hidden} for entry in entries]
    _write(directory / "annotations" / "test.json", unlabelled)
    return directory


def write_jsonl(directory: Path, families: int = 6) -> Path:
    """Train and val as JSON lines over one folder of pictures."""
    for split in ("train", "val"):
        scenes, num = held_out()[split], families * FAMILY_SIZE
        for row in range(num):
            _save(scenes, row, directory / "images" / split / f"{row}.png")
        lines = [
            {"reference": f"{split}/{a.reference}.png", "text": a.text, "target": f"{split}/{a.target}.png"}
            for a in scenes.asks
            if a.reference < num
        ]
        (directory / f"{split}.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return directory
