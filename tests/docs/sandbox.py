"""A directory like the one that the documents speak of: the commands, and the files that their
examples name."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from cirloop.data.shapes.splits import build_splits
from tests.backbones.tiny_models import write_towers
from tests.commands import ROOT
from tests.docs.documented_commands import PYTHON, ROWS, RUN, Row
from tests.docs.shell import Shell
from tests.fake_datasets import write_circo, write_cirr, write_grocery

PHOTOS = ROOT.parent / "shared" / "data" / "photos"
KINDS = ("dress", "hat", "pants", "shirt")
COMMANDS = (
    "train_iterative.py",
    "eval_iterative.py",
    "add_hard_negatives.py",
    "configs",
    "benchmarks",
    "scripts",
)
LIMIT = 240
"""Seconds for a command; most take one."""


def swapped(text: str, swaps: Mapping[str, str]) -> str:
    """A text with words put for others, all of which it must have."""
    for old, new in swaps.items():
        found = re.compile(rf"(?<![\w./-]){re.escape(old)}(?![\w/-])")
        assert found.search(text), f"there is no {old} in: {text}"
        text = found.sub(lambda _, new=new: new, text)
    return text


class World:
    """Commands run here in the order of the table, each once."""

    def __init__(self, home: Path) -> None:
        self.home, self.shell = home, Shell(home / "log.txt")
        self._done: dict[str, str | None] = {}
        for name in COMMANDS:
            (home / name).symlink_to(ROOT / name)
        python = home / PYTHON
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        self._photographs()
        write_towers(home / "towers")
        write_cirr(home / "data" / "cirr", families=5)
        write_grocery(home / "data" / "grocery")
        write_circo(home / "data" / "circo", families=2)
        names = json.loads(
            (home / "data" / "cirr" / "image_splits" / "split.rc2.val.json").read_text()
        )
        asked = json.loads((home / "data" / "cirr" / "captions" / "cap.rc2.val.json").read_text())
        (home / "FILE.json").write_text(json.dumps({str(row["pairid"]): [*names] for row in asked}))
        rows = np.random.default_rng(0)
        (home / "vectors" / "gallery").mkdir(parents=True)
        for name, size in (
            ("Q", 20),
            ("G", 300),
            ("vectors/gallery/0", 200),
            ("vectors/gallery/1", 100),
        ):
            vectors = rows.normal(size=(size, 16)).astype(np.float32)
            np.save(home / f"{name}.npy", vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
        np.save(home / "T.npy", np.arange(20))
        np.save(home / "R.npy", np.arange(20) + 20)

    def _photographs(self) -> None:
        """Six images of four kinds: real ones where they are at hand, else drawn ones."""
        samples = []
        for number, kind in enumerate(KINDS):
            folder = self.home / "photos" / kind
            folder.mkdir(parents=True)
            for n, real in enumerate(sorted((PHOTOS / kind).glob("*.jpg"))[:6] or [None] * 6):
                if real is None:
                    Image.fromarray(build_splits()["train"].pixels(6 * number + n)).save(
                        folder / f"{n}.png"
                    )
                else:
                    (folder / f"{n}.jpg").write_bytes(real.read_bytes())
            samples += [
                {
                    "image": f"{kind}/{path.name}",
                    "text": f"{kind} number {path.stem} on a plain ground",
                    "split": "train",
                }
                for path in sorted(folder.iterdir())
            ]
        Image.open(next(folder.iterdir())).convert("RGB").save(self.home / "a.jpg")
        (self.home / "queries.jsonl").write_text(
            json.dumps({"reference": "a.jpg", "text": "the same in red"}) + "\n"
        )
        (self.home / "samples.json").write_text(json.dumps(samples))
        names = [sample["image"] for sample in samples]
        pairs = zip(names, [*names[1:], names[0]], strict=True)
        lines = [f"{reference},the next one,{target}" for reference, target in pairs]
        (self.home / "triplets.csv").write_text("\n".join(["reference,caption,target", *lines]))

    def close(self) -> None:
        self.shell.close()

    def words(self, row: Row) -> list[str]:
        """What Python is given for a row: `./run_iterative_training.sh` does the same after looking
        for packages."""
        if block := re.fullmatch(r"python (\d* ?)of (.*)", row.command):
            code = re.findall(
                r"^```python\n(.*?)^```",
                (ROOT / block[2]).read_text("utf-8"),
                re.DOTALL | re.MULTILINE,
            )
            return ["-c", swapped(code[int(block[1] or 1) - 1], row.swaps)]
        line = swapped(f"{row.command} {row.extra}", row.swaps)
        if re.search("[|<>;&]", line) or not line.startswith((RUN, PYTHON, "cirloop ")):
            return ["bash", "-euo", "pipefail", "-c", line]
        first, *words = shlex.split(line)
        if first == "cirloop":
            return ["-m", "cirloop", *words]
        if first == RUN:
            return ["train_iterative.py", *words]
        return words

    def wrong(self, row: Row) -> str | None:
        """What is wrong with a row's command; None where all is well. Those that it comes after are
        run before it."""
        if row.command not in self._done:
            first = [each for each in ROWS if each.command in row.after]
            assert len(first) == len(row.after), f"{row.command} comes after what is no row"
            told = [
                f"{each.command}, which comes before: {what}"
                for each in first
                if (what := self.wrong(each))
            ]
            self._done[row.command] = told[0] if told else self._run(row)
        return self._done[row.command]

    def _run(self, row: Row) -> str | None:
        words = self.words(row)
        code, said = self.shell.run(words, self.home, LIMIT, row.env, row.until)
        if code != 0:
            return f"exit code {code} of python {shlex.join(words)}\n{said[-4000:]}"
        if row.says not in said:
            return f"python {shlex.join(words)} did not say {row.says!r}\n{said[-4000:]}"
        lacking = [path for path in row.makes if not (self.home / path).exists()]
        return f"python {shlex.join(words)} did not make {', '.join(lacking)}" if lacking else None
