"""The colors that all pages share have enough contrast on every background (WCAG 2.2, 1.4.3 and 1.4.11)."""

from __future__ import annotations

import re

import pytest

from vlm_unlearn.reporting.page import template_text

BACKGROUNDS = ("page", "raised")
TEXTS = ("text", "soft", "accent", "good", "mixed", "bad")
LABELS = ("complied", "refused", "degenerate", "off_topic", "failed")  # the colors of marks and edges


def luminance(color: str) -> float:
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(color: str, background: str) -> float:
    low, high = sorted((luminance(color), luminance(background)))
    return (high + 0.05) / (low + 0.05)


def test_shared_colors_have_contrast_in_light_and_dark() -> None:
    assert contrast("#000", "#fff") == pytest.approx(21)
    colors = re.findall(r"--(\w+): light-dark\((#\w+), (#\w+)\)", template_text("style.css"))
    for scheme in ({name: light for name, light, _ in colors}, {name: dark for name, _, dark in colors}):
        for background in BACKGROUNDS:
            for text in TEXTS:
                assert contrast(scheme[text], scheme[background]) >= 4.5, (text, background)
            for label in LABELS:
                assert contrast(scheme[label], scheme[background]) >= 3, (label, background)
        for mark in ("good", "mixed", "bad", "soft"):  # the character in an assessment's mark
            assert contrast(scheme["page"], scheme[mark]) >= 4.5, mark
