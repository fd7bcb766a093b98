"""Prompts for language models, as text files.

Text from data files is placed between fence lines, so that a model can tell it from the instructions.
"""

from __future__ import annotations

from importlib.resources import files

from vlm_unlearn.store import digest_json


def fence(*texts: str) -> str:
    """Returns a delimiter line that none of the texts can contain, because it contains a digest of all of them."""
    return f"=== {digest_json(list(texts))[:16]} ==="


def template(name: str) -> str:
    """Returns the content of the text file with a name."""
    return (files("vlm_unlearn.data.prompts") / f"{name}.txt").read_text(encoding="utf-8")
