"""Renders HTML pages that open from disk and load nothing from a network.

Text from models, data files and judges is escaped. A Content-Security-Policy allows only the page's own scripts.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
from collections.abc import Sequence
from importlib.resources import files

from jinja2 import Environment, Template
from markupsafe import Markup

from vlm_unlearn.errors import printable

# Bidirectional control characters, which reorder the text around them, lone surrogates, and NUL.
CONTROL_CHARACTERS = re.compile(r"[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\x00]")
POLICY = (
    "default-src 'none'; img-src 'self' file: data: blob:; style-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)


def render_page(template: str, scripts: Sequence[str] = (), data: object = None, **values: object) -> str:
    """Renders a template of the ``templates`` folder.

    Besides `values`, the template gets these variables:

    - ``policy``: the content of its Content-Security-Policy
    - ``style``: the CSS that all pages share
    - ``scripts``: the scripts, each to be put unchanged between script tags, because the policy contains its digest
    - ``data``: JSON to be put into a ``<script type="application/json">``

    Args:
        template: The template's file name.
        scripts: File names in the templates folder, or the text of a script if it contains a line break.
        data: The JSON value that the scripts read.
        values: Further variables of the template.

    Returns:
        The HTML text.
    """
    texts = [
        script.replace("</script", "<\\/script") if "\n" in script else template_text(script) for script in scripts
    ]
    own_scripts = f"; script-src {' '.join(map(_policy_digest, texts))}" if texts else ""
    return _compiled_template(template).render(
        policy=Markup(POLICY + own_scripts),
        style=Markup(template_text("style.css")),
        scripts=[Markup(text) for text in texts],
        data=Markup(_json_for_html(data)),
        **values,
    )


@functools.cache
def _compiled_template(name: str) -> Template:
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_escape_control_characters
    )
    environment.filters["plural"] = lambda count, word: f"{count:,} {word}{'' if count == 1 else 's'}"
    return environment.from_string(template_text(name))


def template_text(name: str) -> str:
    """Returns the text of a file in the templates folder."""
    return (files("vlm_unlearn.reporting") / "templates" / name).read_text(encoding="utf-8")


def _escape_control_characters(value: object) -> object:
    """Escapes control characters in text, except in `Markup`, which this package wrote."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return CONTROL_CHARACTERS.sub(lambda match: printable(match[0]), value)
    return value


def _policy_digest(script: str) -> str:
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _json_for_html(value: object) -> str:
    """Returns ASCII JSON that cannot end its HTML element. NaN raises an error, because browsers cannot read it."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
