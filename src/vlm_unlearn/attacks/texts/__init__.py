"""Texts of the attacks: templates, rounds and pairs in YAML files, and harmless words for controls."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from vlm_unlearn.config import Strict, validate
from vlm_unlearn.config.loader import Config, read_yaml
from vlm_unlearn.records import Round
from vlm_unlearn.store import user_path

# Harmless words that begin an answer about any picture.
NEUTRAL = (
    "Looking at this picture for a moment, there are several things that one can say about it in general, and it may "
    "help to go through them in a calm and orderly way, beginning with the ones that come to mind first"
)


class PairsFile(Strict):
    """A file with pairs of question and answer."""

    pairs: list[Round]
    """The pairs."""


def read_texts(config: type[Config], shipped_name: str, path: Path | None) -> Config:
    """Reads a YAML file of texts.

    Args:
        config: The content of the file.
        shipped_name: The name of the shipped file that is read if `path` is None.
        path: The file of the user.

    Raises:
        UserError: The file does not exist, is not valid YAML, or has an unknown or missing key.
    """
    file = Path(str(files(__name__) / shipped_name)) if path is None else user_path(path)
    return validate(config, read_yaml(file), str(file))


def neutral_words(count: int, text: str = NEUTRAL) -> str:
    """Returns harmless words, as many as `count`. The text is repeated if it is shorter.

    Example:
        ``neutral_words(3)`` returns ``"Looking at this"``.
    """
    words = text.split()
    return " ".join(words[number % len(words)] for number in range(count)).rstrip(",")
