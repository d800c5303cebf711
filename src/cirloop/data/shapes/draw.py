"""Scenes to pixels: integer geometry on 84x84, no fonts, the same bytes on any machine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cirloop.data.shapes.scene import COLORS, Scene, SeededRandom

CELL = 28
SIDE = 3 * CELL
Rgb = tuple[int, int, int]

_DEEP: dict[str, Rgb] = {
    "red": (205, 30, 30),
    "green": (30, 140, 40),
    "blue": (30, 60, 200),
    "yellow": (225, 200, 20),
    "purple": (120, 30, 150),
    "orange": (235, 120, 10),
    "teal": (10, 150, 160),
}
_LIGHT: dict[str, Rgb] = {
    "red": (240, 105, 95),
    "green": (120, 210, 110),
    "blue": (110, 150, 245),
    "yellow": (245, 235, 130),
    "purple": (190, 120, 225),
    "orange": (250, 175, 90),
    "teal": (110, 220, 220),
}


@dataclass(frozen=True, slots=True)
class RenderStyle:
    """Properties of a drawing that no text mentions.

    `tint` is the palette's position from deep (0) to light (100), in percent, as a range; `noise`
    the largest change of each colour channel; `background` the range of its shade; `gradient` the
    largest change of shade from top to bottom.
    """

    tint: tuple[int, int]
    noise: int
    background: tuple[int, int]
    gradient: int


PRETRAIN = RenderStyle(tint=(0, 10), noise=6, background=(205, 250), gradient=10)
TARGET = RenderStyle(tint=(85, 100), noise=10, background=(25, 95), gradient=30)
MIDDLE = RenderStyle(tint=(40, 60), noise=14, background=(110, 170), gradient=40)
WIDE = RenderStyle(tint=(-10, 110), noise=16, background=(15, 252), gradient=40)

_ys, _xs = np.mgrid[0:SIDE, 0:SIDE].astype(np.int32)


def _mask(shape: str, x: int, y: int, r: int) -> npt.NDArray[np.bool_]:
    dx = np.abs(_xs - x)
    dy = _ys - y
    ady = np.abs(dy)
    inside: npt.NDArray[np.bool_]
    match shape:
        case "circle":
            inside = dx * dx + dy * dy <= r * r
        case "square":
            inside = np.maximum(dx, ady) * 8 <= r * 7
        case "triangle":
            inside = (dx * 2 <= dy + r) & (dy <= r)
        case "diamond":
            inside = (dx + ady) * 4 <= r * 5
        case _:
            inside = ((dx * 3 <= r) & (ady <= r)) | ((ady * 3 <= r) & (dx <= r))
    return inside


def _shade(color: str, tint: int, noise: int, rng: SeededRandom) -> list[int]:
    channels = []
    for deep, light in zip(_DEEP[color], _LIGHT[color], strict=True):
        value = (deep * (100 - tint) + light * tint) // 100 + rng.between(-noise, noise)
        channels.append(min(255, max(0, value)))
    return channels


def draw(scene: Scene, style: RenderStyle, *seed: object) -> npt.NDArray[np.uint8]:
    """Draw `scene` as RGB pixels (84, 84, 3); everything but the scene is drawn from `seed`."""
    rng = SeededRandom("draw", *seed)
    shade = rng.between(*style.background)
    cast = [rng.between(-8, 8) for _ in range(3)]
    slope = rng.between(-style.gradient, style.gradient)
    ramp = shade + (_ys * slope) // SIDE
    pixels = np.stack([np.clip(ramp + c, 0, 255) for c in cast], axis=-1)
    tint = rng.between(*style.tint)
    palette = {color: _shade(color, tint, style.noise, rng) for color in COLORS}
    outline = rng.choice(("none", "dark", "bright"))
    for cell, thing in enumerate(scene):
        if thing is None:
            continue
        x = CELL * (cell % 3) + CELL // 2 + rng.between(-1, 1)
        y = CELL * (cell // 3) + CELL // 2 + rng.between(-1, 1)
        r = (8 if thing.size == "small" else 12) + rng.between(-1, 1)
        if outline != "none":
            pixels[_mask(thing.shape, x, y, r + 1)] = 20 if outline == "dark" else 235
        pixels[_mask(thing.shape, x, y, r)] = palette[thing.color]
    return pixels.astype(np.uint8)
