"""Prompts for language models, as text files."""

from __future__ import annotations

from importlib.resources import files


def template(name: str) -> str:
    """Returns the content of the text file with a name."""
    return (files("vlm_unlearn.data_tools.prompts") / f"{name}.txt").read_text(encoding="utf-8")
