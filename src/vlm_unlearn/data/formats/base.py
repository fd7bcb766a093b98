"""The interface of data formats. A format reads the records of a data file as training examples and as prompts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vlm_unlearn import plugins
from vlm_unlearn.data.formats.groups import AttackRecord, prompts_of_groups
from vlm_unlearn.errors import Problems
from vlm_unlearn.plugins import Registry
from vlm_unlearn.records import Example, Kind, Prompt

# The kind of question that each set of a data file contains.
KINDS_OF_SETS: dict[str, Kind] = {
    "forget": "unsafe",
    "retain": "safe",
    "decouple": "safe_image_unsafe_question",
    "safe_image_unsafe": "safe_image_unsafe_question",
}


@dataclass(frozen=True)
class Entry:
    """One question of a data file.

    Attributes:
        example: The question with its answer.
        set: The set of the question, such as forget, retain or decouple. Empty if the format has no sets.
        refused: Whether safety fine-tuning on this file trains the model to refuse the question. None if only the
            answer can tell.
    """

    example: Example
    set: str
    refused: bool | None


class Format(ABC):
    """Base class of data formats. A subclass implements `entries`.

    Attributes:
        identifying_keys: Keys that only records of this format have. They determine the format of a file if its user
            does not name it. Only the formats of this package are detected.
    """

    identifying_keys: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def entries(self, path: Path, images: Path | None, problems: Problems | None = None) -> Iterator[Entry]:
        """Yields the questions of a file, one at a time, in file order.

        Args:
            path: The file.
            images: The image root. None skips the check of the image files.
            problems: Collects broken records. Without it the first one raises.

        Raises:
            UserError: The file cannot be read, or `problems` is None and a record is broken.
        """

    def prompts(self, path: Path, images: Path, set_name: str, kind: Kind) -> Iterable[Prompt]:
        """Yields the prompts of one kind. Records with the same id are rewrites of one question and form a group.

        Args:
            path: The file.
            images: The image root.
            set_name: The name of the split that the prompts are for.
            kind: The kind of the prompts. `KINDS_OF_SETS` lists the kind of each set.

        Raises:
            UserError: A record is broken or its image is missing.
        """
        examples = (entry.example for entry in self.entries(path, images) if KINDS_OF_SETS.get(entry.set) == kind)
        return prompts_of_groups(map(AttackRecord.of_example, examples), set_name, kind)


FORMATS: Registry[type[Format]] = plugins.FORMATS
register = FORMATS.register


def get_format(name: str, field: str | None = None) -> Format:
    """Returns a format.

    Args:
        name: The name of the format, or ``FILE.py:CLASS``.
        field: The config key that contains the name, for error messages.

    Raises:
        UserError: There is no such format, or the object is not a format.
    """
    plugin: object = FORMATS.load(name, field)
    if not (isinstance(plugin, type) and issubclass(plugin, Format)):
        raise plugins.invalid_plugin("format", name, plugin, "a subclass of Format", field)
    return plugin()
