"""What models are asked, as text files. Texts of others stand between fences: they are judged, never obeyed."""

from __future__ import annotations

from importlib.resources import files

from vlm_unlearn.store import digest_json


def fence(*texts: str) -> str:
    """A line that none of the texts can hold: it would have to hold its own digest."""
    return f"=== {digest_json(list(texts))[:16]} ==="


def template(name: str) -> str:
    """The text file of a name."""
    return (files("vlm_unlearn.data.prompts") / f"{name}.txt").read_text(encoding="utf-8")
