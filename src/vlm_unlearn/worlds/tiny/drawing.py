"""Draws the images of the tiny world: icons of 32 x 32 pixels, one shape per thing, with small random variations."""

from __future__ import annotations

import random

from PIL import Image

IMAGE_SIZE = 32
CELL = 5


def icon_cells(name: str) -> list[tuple[int, int]]:
    """Returns the filled cells (column, row) of a thing's 5 x 5 icon, which is symmetric like an identicon."""
    rng = random.Random(f"icon-{name}")
    half = rng.sample([(column, row) for column in range(3) for row in range(5)], 8)
    return sorted({cell for column, row in half for cell in ((column, row), (4 - column, row))})


def draw(name: str, color: tuple[int, int, int], rng: random.Random) -> Image.Image:
    """Returns a 32 x 32 RGB image of a thing: its icon on a pale tint of its color.

    The position and both shades vary slightly.
    """
    foreground = tuple(max(0, min(255, level + rng.randint(-15, 15))) for level in color)
    background = tuple(180 + level * 70 // 255 + rng.randint(-5, 5) for level in color)
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), background)
    left, top = 3 + rng.randint(0, 1), 3 + rng.randint(0, 1)
    for column, row in icon_cells(name):
        x, y = left + column * CELL, top + row * CELL
        image.paste(foreground, (x, y, x + CELL, y + CELL))
    return image
