"""The base of every configuration model: frozen, and strict about names."""

from collections.abc import Callable
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource


class Settings(BaseModel):
    """A frozen group of settings; an unknown name is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class FlagSettings(BaseSettings):
    """Settings that are read from flags, over those of files.

    The environment is not read: a variable named SPLIT or OUTPUT is somebody else's.
    """

    file_content: ClassVar[dict[str, Any]] = {}
    """What files say."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *_: object,
        **__: object,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings, InitSettingsSource(settings_cls, cls.file_content))


def default_type(name: str) -> Callable[[Any], Any]:
    """Return a validator that gives settings without a type the type `name`."""
    return lambda value: {"type": name, **value} if isinstance(value, dict) else value


def _by_position(value: object) -> object:
    """Turn a list of groups of settings into a group by position."""
    if not isinstance(value, list) or not value:
        return value
    if not all(isinstance(group, dict) for group in value):
        return value
    return {str(position): group for position, group in enumerate(value)}


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Return lines `setting: old -> new`."""
    lines = []
    for key in sorted({*old, *new}):
        a = _by_position(old.get(key))
        b = _by_position(new.get(key))
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines
