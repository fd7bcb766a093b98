"""What a model under test is asked, and what answers: a backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from vlm_unlearn.data.images import resolve_image
from vlm_unlearn.records import Prompt, Response
from vlm_unlearn.store import digest_json

Item = TypeVar("Item")
ResponseKey = tuple[str, int]
OnResponses = Callable[[Sequence[Response]], None]


@dataclass(frozen=True)
class GenerationRequest:
    """One answer to be given: to a prompt, the how-manieth of its samples, and the file of its image."""

    prompt: Prompt
    sample: int = 0
    image: Path | None = None

    @property
    def key(self) -> ResponseKey:
        """That of its answer."""
        return self.prompt.id, self.sample


class Backend(Protocol):
    """Answers questions by one model."""

    def identity(self) -> Mapping[str, object]:
        """Everything that decides an answer, besides the question: `model` and `generation`."""

    def make_batches(self, questions: Sequence[GenerationRequest]) -> list[list[GenerationRequest]]:
        """What is asked, and written, together: a function of the questions alone."""

    def check_available(self) -> None:
        """Looks whether it could answer, before anything is given up for it.

        Raises:
            UserError, RunError: it couldn't.
        """

    def run(self, batches: Iterable[Sequence[GenerationRequest]], on_answers: OnResponses) -> None:
        """Calls `on_answers` until each question has its answer."""

    def run_one_by_one(self, questions: Sequence[GenerationRequest]) -> Iterator[Response]:
        """The answers to the questions with nothing beside them."""


def build_requests(
    prompts: Sequence[Prompt], images: Mapping[str, Path], samples: Mapping[str, int]
) -> list[GenerationRequest]:
    """The questions of all prompts, sample after sample.

    Args:
        images: image root of each prompt set, by `Prompt.set`.
        samples: answers to each prompt of a set; 1 where it isn't named.

    Raises:
        UserError: an image is missing.
    """
    questions = []
    for prompt in prompts:
        image = None if prompt.image is None else resolve_image(images[prompt.set], prompt.image, record=prompt.id)
        questions += [GenerationRequest(prompt, sample, image) for sample in range(samples.get(prompt.set, 1))]
    return questions


def sampling_seed(seed: int, question: GenerationRequest) -> int:
    """The seed of one answer's random stream: nothing else that is asked, nor its order, changes what is drawn.

    It has 31 bits, as many as every server takes.
    """
    return int(digest_json([seed, *question.key])[:8], 16) >> 1


def split_into_batches(questions: Sequence[GenerationRequest], size: int) -> list[list[GenerationRequest]]:
    """Batches of `size` in the order given."""
    return [list(questions[start : start + size]) for start in range(0, len(questions), size)]


def evenly_spaced(items: Sequence[Item], count: int) -> list[Item]:
    """So many of the items at equal distances, all where there are fewer."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]
