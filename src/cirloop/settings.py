"""The base of every configuration model: frozen, and strict about names."""

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A frozen group of settings; an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def default_type(name: str) -> Callable[[Any], Any]:
    """For a union on `type`: settings without one are of the type `name`."""
    return lambda value: {"type": name, **value} if isinstance(value, dict) else value
