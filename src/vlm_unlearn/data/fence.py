"""Separates text of data files from the instructions in the prompt of a language model."""

from __future__ import annotations

from vlm_unlearn.store import digest_json


def fence(*texts: str) -> str:
    """Returns a delimiter line that none of the texts can contain, because it contains a digest of all of them.

    A prompt places each text between two of these lines, so that a model can tell it from the instructions.
    """
    return f"=== {digest_json(list(texts))[:16]} ==="
