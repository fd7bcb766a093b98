"""Every colour that pages share can be read on every ground, in light and in dark (WCAG 2.2, 1.4.3 and 1.4.11)."""

from __future__ import annotations

import re

import pytest

from vlm_unlearn.reporting.page import template_text

GROUNDS = ("page", "raised")
TEXTS = ("text", "soft", "accent", "good", "mixed", "bad")
LABELS = ("complied", "refused", "degenerate", "off_topic", "failed")  # marks and edges that tell a label


def luminance(color: str) -> float:
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_texts_have_contrast(scheme: int) -> None:
    pairs = {
        name: (light, dark)
        for name, light, dark in re.findall(r"--(\w+): light-dark\((#\w+), (#\w+)\)", template_text("style.css"))
    }
    assert contrast("#000", "#fff") == pytest.approx(21)
    for text in TEXTS:
        for ground in GROUNDS:
            assert contrast(pairs[text][scheme], pairs[ground][scheme]) >= 4.5, (text, ground)
    for mark in ("good", "mixed", "bad", "soft"):  # the sign in a verdict's mark
        assert contrast(pairs["page"][scheme], pairs[mark][scheme]) >= 4.5, mark
    for label in LABELS:
        for ground in GROUNDS:
            assert contrast(pairs[label][scheme], pairs[ground][scheme]) >= 3, (label, ground)
