"""The interface of answer formats. An answer format reads the answers that another program has written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

from vlm_unlearn import plugins
from vlm_unlearn.config import SplitConfig
from vlm_unlearn.data.formats.fields import RawRecord
from vlm_unlearn.errors import UserError
from vlm_unlearn.plugins import Registry
from vlm_unlearn.records import Kind, Prompt


class ForeignAnswer(NamedTuple):
    """An answer in a file of another program, with everything that the file says about its prompt.

    Attributes:
        position: Returns the position of the answer in its file, for error messages.
        text: The answer. None if the other program reports a failure.
        error: The reason of the failure.
        finish_reason: ``stop`` or ``length``, if the file contains it.
        key: The unique id of the prompt, one of those that `AnswerFormat.keys` returns.
        group: The id of the record that the question is from. A suite calls it `Prompt.group_id`.
        question: The question that the model was asked.
        image: The path or the name of the image.
        kind: The kind of the question.
        split: The split of the suite.
        sample: The number of the answer among the answers to the same prompt, from 0.
        number: The position of the prompt in its data file, from 0. It decides only if the user allows it.
        may_be_reference: The program may have left the reference answer of the data file in the place of an answer.
    """

    position: Callable[[], str]
    text: str | None
    error: str | None = None
    finish_reason: str | None = None
    key: str | None = None
    group: str | None = None
    question: str | None = None
    image: str | None = None
    kind: Kind | None = None
    split: str | None = None
    sample: int | None = None
    number: int | None = None
    may_be_reference: bool = False


class AnswerFormat(ABC):
    """Base class of answer formats. A subclass implements `answers`.

    Attributes:
        needs_split: Whether the answers name neither their question nor their split, so that the user names the split
            of each file.
    """

    needs_split: ClassVar[bool] = False

    @abstractmethod
    def answers(self, path: Path) -> Iterator[ForeignAnswer]:
        """Yields the answers of a file, one at a time, in file order.

        Args:
            path: The file.

        Raises:
            UserError: The file cannot be read, or a record is broken.
        """

    def keys(self, prompts: Sequence[Prompt]) -> Mapping[str, Prompt]:
        """Returns the prompts of one split by the ids that the other program gives them. The default: `Prompt.id`.

        Args:
            prompts: The prompts in the order in which the other program asks them.
        """
        return {prompt.id: prompt for prompt in prompts}

    def rewrite_of(self, key: str) -> str | None:
        """Returns the key of a question of which `key` is a further rewrite, or None if it is not the key of one.

        Args:
            key: A key that `keys` does not contain. If the suite has the question, the file is from other questions.
        """
        return None

    def validate_split(self, path: Path, split: SplitConfig) -> None:  # noqa: B027  most formats have no rule
        """Checks that a file can contain the answers to a split, before it is read.

        Args:
            path: The file.
            split: The split that the user has named for the file.

        Raises:
            UserError: The file contains answers to other questions.
        """


ANSWER_FORMATS: Registry[type[AnswerFormat]] = plugins.ANSWER_FORMATS
register = ANSWER_FORMATS.register


def get_answer_format(name: str, field: str | None = None) -> AnswerFormat:
    """Returns an answer format.

    Args:
        name: The name of the format, or ``FILE.py:CLASS``.
        field: The option that contains the name, for error messages.

    Raises:
        UserError: There is no such format, or the object is not an answer format.
    """
    plugin: object = ANSWER_FORMATS.load(name, field)
    if not (isinstance(plugin, type) and issubclass(plugin, AnswerFormat)):
        raise plugins.invalid_plugin("answer format", name, plugin, "a subclass of AnswerFormat", field)
    return plugin()


def optional_number(record: RawRecord, field: str) -> int | None:
    """Returns a number of a record, counted from 0, or None if the field is missing or null.

    Raises:
        UserError: The field contains anything else.
    """
    value = record.value.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
        raise record.error("must be a whole number from 0", "invalid-field", field)
    return value


def no_answers(path: Path, reason: str) -> UserError:
    """Returns the error of a file without answers.

    Args:
        path: The file.
        reason: What the file is instead, and the fix.
    """
    return UserError(f"contains no answers. {reason}", code="no-records", file=path)
