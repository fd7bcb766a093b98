"""Converts matplotlib's SVG to an element of a page, in the page's colors and with texts that appear under the mouse.

The text is parsed and written again, so that names from data files stay text in HTML as well.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

from markupsafe import Markup

from vlm_unlearn.errors import printable
from vlm_unlearn.reporting.charts.chart import Chart, hover_texts
from vlm_unlearn.reporting.charts.matplotlib_charts import TITLE_HEIGHT

OMITTED = {"metadata", "style", "patch_1", "title"}  # tags, and the ids of the background and the title
PAGE_COLORS = {"#000000": "var(--text)", "#555555": "var(--soft)"}
MIN_SCALE = 0.7  # of the letters on a phone, where a wider chart scrolls


def inline_svg(svg: str, name: str, chart: Chart) -> Markup:
    """Returns a chart as an ``<svg>`` element that fits the width of its container.

    Args:
        svg: The chart as `write_plots` drew it.
        name: The chart's name, which makes its ids unique in the page.
        chart: The description of the chart.
    """
    root = ElementTree.fromstring(svg)
    width, height = map(float, root.get("viewBox", "0 0 100 100").split()[2:])
    _convert(root, name, hover_texts(chart))
    top = 72 * TITLE_HEIGHT  # points
    pixels = width * 4 / 3
    root.attrib.clear()
    root.attrib |= {
        "viewBox": f"0 {top:.1f} {width:.1f} {height - top:.1f}",
        "style": f"max-width: {pixels:.0f}px; min-width: {MIN_SCALE * pixels:.0f}px",
        "role": "img",
        "aria-label": f"Chart: {chart.title}",
    }
    description = ElementTree.Element("desc")
    description.text = printable(chart.description) or "The tables of this report contain its numbers."
    root.insert(0, description)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _convert(node: ElementTree.Element, name: str, texts: Sequence[str]) -> None:
    """Replaces colors and ids below a node, and removes namespaces, which HTML does not have."""
    node.tag = _local(node.tag)
    if node.tag not in ("text", "tspan"):
        node.text = None
    attributes = {_local(key): value for key, value in node.attrib.items()}
    mark = re.fullmatch(r"mark-(\d+)", attributes.get("id", ""))
    node.attrib.clear()
    for key, value in attributes.items():
        if key == "d":
            node.set(key, re.sub(r"(\.\d\d)\d+", r"\1", value))
        elif key == "href":
            node.set(key, value.replace("#", f"#{name}-", 1) if value.startswith("#") else value)
        elif key != "id":
            value = value.replace("url(#", f"url(#{name}-")
            node.set(key, re.sub("#000000|#555555", lambda color: PAGE_COLORS[color[0]], value))
        elif node.tag != "g":
            node.set(key, f"{name}-{value}")
    for child in list(node):
        child.tail = None
        if _local(child.tag) in OMITTED or child.get("id") in OMITTED:
            node.remove(child)
        else:
            _convert(child, name, texts)
    if mark:
        title = ElementTree.Element("title")
        title.text = texts[int(mark[1])]
        node.insert(0, title)


def _local(name: str) -> str:
    return name.rpartition("}")[2]
