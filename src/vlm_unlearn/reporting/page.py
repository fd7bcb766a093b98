"""HTML pages that open from disk and ask nothing of any network.

Everything a model or a data file said is escaped, and a Content-Security-Policy lets only the page's own scripts run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from importlib.resources import files

from jinja2 import Environment
from markupsafe import Markup

from vlm_unlearn.errors import printable

UNRULY = re.compile(r"[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\x00]")


def render_page(template: str, scripts: Sequence[str] = (), data: object = None, **values: object) -> str:
    """Renders a template of the ``templates`` folder, with the style that all pages share.

    The template has, besides `values`: ``policy`` (the content of its Content-Security-Policy), ``style``, ``scripts`` (put each between
    script tags as it is: the policy holds its digest) and ``data`` (JSON to put into a ``<script type="application/json">``).

    Args:
        scripts: file names in the templates folder, or whole scripts where they hold a line break.
        data: what the scripts read, as a JSON value.
    """
    texts = [
        script.replace("</script", "<\\/script") if "\n" in script else template_text(script) for script in scripts
    ]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_in_order)
    environment.filters["plural"] = lambda count, word: f"{count:,} {word}{'' if count == 1 else 's'}"
    allowed = [
        "default-src 'none'",
        "img-src 'self' file: data: blob:",
        "style-src 'unsafe-inline'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    if texts:
        allowed.append(f"script-src {' '.join(map(_source, texts))}")
    return environment.from_string(template_text(template)).render(
        policy=Markup("; ".join(allowed)),
        style=Markup(template_text("style.css")),
        scripts=[Markup(text) for text in texts],
        data=Markup(_json_for_html(data)),
        **values,
    )


def template_text(name: str) -> str:
    """A file of the templates folder."""
    return (files("vlm_unlearn.reporting") / "templates" / name).read_text(encoding="utf-8")


def _in_order(value: object) -> object:
    """Text of others without what turns the words around it: marks of direction, and half of a letter; what we made stays."""
    return (
        UNRULY.sub(lambda found: printable(found[0]), value)
        if isinstance(value, str) and not isinstance(value, Markup)
        else value
    )


def _source(script: str) -> str:
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _json_for_html(value: object) -> str:
    """JSON in ASCII without a character that could end the element that holds it, and without NaN, which no browser reads."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
