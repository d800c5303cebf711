"""The data sets. The union is the registry: a data set is one file with its settings, its protocol
and its reader."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from cirloop.config.base import default_type
from cirloop.data.circo import CircoSettings
from cirloop.data.cirr import CirrSettings
from cirloop.data.fashioniq import FashionIQSettings
from cirloop.data.grocery.load import GrocerySettings
from cirloop.data.hp_fashioniq import HpFashionIQSettings
from cirloop.data.huggingface import HuggingFaceSettings
from cirloop.data.jsonl import JsonlSettings
from cirloop.data.shapes.load import ShapesSettings

# ShapesSettings last: `--help` shows the last one's name and defaults.
DataConfig = Annotated[
    CirrSettings
    | FashionIQSettings
    | CircoSettings
    | GrocerySettings
    | HpFashionIQSettings
    | HuggingFaceSettings
    | JsonlSettings
    | ShapesSettings,
    Field(discriminator="type"),
    BeforeValidator(default_type("shapes")),
]
