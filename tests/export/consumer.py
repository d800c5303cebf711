"""Run as `python -I consumer.py`: what a stranger without cirloop gets from the code of a card.

Reads a JSON line: `cards` (name -> README.md), `inputs` ({"image": file, "text": ...}), `here` (the
directory that cards are run in), `out`. Writes OUT/NAME.npy, vectors (N, D), and prints which of
our modules were loaded.
"""

import importlib
import importlib.abc
import json
import os
import re
import sys
from pathlib import Path


class NotInstalled(importlib.abc.MetaPathFinder):
    """cirloop is not there, however this environment was made."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "cirloop":
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, NotInstalled())
asked = json.loads(sys.stdin.readline())
os.chdir(asked["here"])

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

for name, card in asked["cards"].items():
    loads, searches = re.findall(
        r"^```python\n(.*?)^```$", Path(card).read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    space = {}
    exec(compile(loads, card, "exec"), space)
    exec(compile(searches, card, "exec"), space)
    given = [
        {**each, "image": Image.open(each["image"])} if "image" in each else each
        for each in asked["inputs"]
    ]
    made = np.stack([space["embed"](each)[0].numpy() for each in given])
    images = [each for each in given if "image" in each]
    together = space["embed"](*images).numpy()
    np.save(Path(asked["out"]) / f"{name}.npy", made)
    np.save(Path(asked["out"]) / f"{name}_together.npy", together)
    np.save(Path(asked["out"]) / f"{name}_scores.npy", space["scores"].numpy())
try:
    importlib.import_module("cirloop")
except ModuleNotFoundError:
    print(json.dumps(sorted(name for name in sys.modules if name.startswith("cirloop"))))
