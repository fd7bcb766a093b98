"""Draws texts into pictures, for typographic attacks.

The font is DejaVu Sans, a file of matplotlib, so that the pixels do not depend on the fonts of the machine.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.records import TextLayout

if TYPE_CHECKING:
    from PIL import Image, ImageFont

PAGE_SIDE = 760  # pixels; the side of FigStep's pages (Gong et al. 2023, arXiv 2311.05608)
MIN_WIDTH = 512  # smaller pictures are enlarged, so that their text can be read
LARGEST_SHARE = 1 / 16  # of the font size in the width of the picture
SMALLEST_FONT = 8  # pixels
LINE_HEIGHT = 1.25  # of the font size


def with_text(image: Image.Image, text: str, layout: TextLayout) -> Image.Image:
    """Returns a picture with a text in black on white.

    Args:
        image: The picture, RGB.
        text: The text. It is wrapped at the width of the picture, and its line breaks are kept.
        layout: ``page``: a white page of 760 x 760 pixels with the text alone. ``below``: the picture, with the text on
            a white strip below it. ``on``: the picture, with the text on a white box at its lower edge.

    Raises:
        UserError: The font lacks a character of the text, or the text does not fit.
    """
    from PIL import Image, ImageDraw

    check_drawable(text)
    if layout == "page":
        image = Image.new("RGB", (PAGE_SIDE, PAGE_SIDE), "white")
    elif image.width < MIN_WIDTH:
        image = image.resize((MIN_WIDTH, max(1, round(image.height * MIN_WIDTH / image.width))))
    margin = image.width // 32
    max_height = image.height if layout != "below" else 2 * image.width
    size, lines = _fit(text, image.width - 2 * margin, max_height - 2 * margin)
    height = round(len(lines) * LINE_HEIGHT * size)
    if layout == "page":
        canvas, top = image, margin
    else:
        box = height + 2 * margin
        canvas = Image.new("RGB", (image.width, image.height + (box if layout == "below" else 0)), "white")
        canvas.paste(image, (0, 0))
        top = canvas.height - box
        canvas.paste((255, 255, 255), (0, top, canvas.width, canvas.height))
        top += margin
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        draw.text((margin, top + round(number * LINE_HEIGHT * size)), line, fill=(0, 0, 0), font=_font(size))
    return canvas


def check_drawable(text: str) -> None:
    """Checks that every character of a text can be drawn, from left to right.

    Raises:
        UserError: The font lacks a character, or the script is written from right to left.
    """
    characters = _font_characters()
    for character in text:
        if character == "\n":
            continue
        if ord(character) not in characters or unicodedata.bidirectional(character) in ("R", "AL", "AN"):
            raise UserError(
                f"the character {quoted(character)} cannot be drawn into an image. Texts in Latin, Greek and Cyrillic "
                "letters can.",
                code="unsupported-text",
            )


def _fit(text: str, width: int, height: int) -> tuple[int, list[str]]:
    """Returns the largest font size with which a text fits, and its lines."""
    size = max(SMALLEST_FONT, round(width * LARGEST_SHARE))
    while size >= SMALLEST_FONT:
        lines = _wrap(text, _font(size), width)
        if lines is not None and len(lines) * LINE_HEIGHT * size <= height:
            return size, lines
        size = size - 1 if size < 2 * SMALLEST_FONT else round(size * 0.9)
    raise UserError(
        f"the text {quoted(text, 80)} does not fit on the image. Shorten it.",
        code="unsupported-text",
    )


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str] | None:
    """Returns the lines of a text, or None if a word is wider than a line."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}" if line else word
            if font.getlength(longer) <= width:
                line = longer
            elif font.getlength(word) > width:
                return None
            else:
                lines.append(line)
                line = word
        lines.append(line)
    return lines


def _font_file() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont:
    from PIL import ImageFont

    # The basic layout does not depend on libraries of the machine, unlike Raqm.
    return ImageFont.truetype(_font_file(), size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=1)
def _font_characters() -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(_font_file())).get_charmap())
