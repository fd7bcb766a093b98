"""What a benchmark is: its official files in, questions and a score of each answer out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from vlm_unlearn.errors import UserError, nearest


class AnswersNotPublicError(UserError):
    """The official files hold questions whose answers are kept by an evaluation server: a model can be asked, not scored."""


class Prediction(BaseModel):
    """A line of a predictions file; other keys, such as the prompt, are passed over. A run's responses and verdicts read as such lines."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    question_id: str | int = Field(validation_alias=AliasChoices("question_id", "prompt_id"))
    text: str | None = None  # None: the model gave no answer
    score: Any = None  # a judge's, 0 to 1, where a judge scores the benchmark


@dataclass(frozen=True)
class BenchmarkQuestion:
    """One question as a model is asked it."""

    id: str
    text: str
    image: str | None  # path below the benchmark's image folder
    cluster: str  # as in `QuestionScore`
    reference: str | None = None
    category: str | None = None


@dataclass(frozen=True)
class QuestionScore:
    """One question's score."""

    id: str
    value: float  # 0 to 1
    cluster: str  # what its errors may have in common with others', such as the image
    subsets: tuple[str, ...] = ()  # the parts of the benchmark it belongs to, such as an answer type
    unparsed: bool = False  # no answer could be found in the text; it counts as wrong


@dataclass(frozen=True)
class RatioTerm:
    """What one answer adds above and below the line of a ratio of sums, such as F1."""

    cluster: str
    numerator: float
    denominator: float


@dataclass(frozen=True)
class BenchmarkScores:
    """Every question's score, and what couldn't be scored."""

    questions: Sequence[QuestionScore]
    missing: int = 0  # questions without a prediction, or with none that is text
    extra_metrics: Mapping[str, float] = field(
        default_factory=dict
    )  # what the official evaluator reports beside the score
    # By annotation file: the headline is the mean of these ratios where a benchmark has them, else the mean score.
    ratio_terms: Mapping[str, Sequence[RatioTerm]] = field(default_factory=dict)


class Benchmark(ABC):
    """Base of all benchmarks. Subclasses read their official files, put the questions and score one answer."""

    name: ClassVar[str]
    annotation_file: ClassVar[str]  # its annotation file
    question_file: ClassVar[str]  # the file for `questions`, where it has one
    image_folder: ClassVar[str]  # where its images are
    multiple_files: ClassVar[bool] = False  # whether its headline is made of several annotation files
    needs_judge: ClassVar[bool] = (
        False  # whether a judge scores its answers: `Prediction.score` counts, and not the text
    )

    @abstractmethod
    def read_questions(
        self, annotations: Path, questions: Path | None, limit: int | None = None
    ) -> list[BenchmarkQuestion]:
        """The questions, with the prompts of LLaVA-1.5's evaluation (arXiv 2310.03744, its table of response formats).

        Args:
            limit: only the first so many.

        Raises:
            UserError: a file is missing or is something else, or a question lacks its text or image; the record is named.
        """

    @abstractmethod
    def read_truths(self, annotations: Path, questions: Path | None) -> Mapping[str, Any]:
        """Question id -> what `score_answer` needs.

        Args:
            questions: a second official file, of a benchmark that has one.

        Raises:
            AnswersNotPublicError: the file has questions only.
            UserError: a file is missing or is something else.
        """

    @abstractmethod
    def score_answer(self, id: str, truth: Any, text: str, official: bool) -> QuestionScore:
        """One answer's score.

        Args:
            official: count exactly as the published evaluator, its quirks included.
        """

    def score_prediction(self, id: str, truth: Any, prediction: Prediction, official: bool) -> QuestionScore | None:
        """One prediction's score; None where there is nothing to score."""
        return None if prediction.text is None else self.score_answer(id, truth, prediction.text, official)

    def merge_scores(self, graded: Sequence[QuestionScore], truths: Mapping[str, Any]) -> list[QuestionScore]:
        """The scores that count, where several answers make one."""
        return list(graded)

    def extra_metrics(self, graded: Sequence[tuple[Any, str]], official: bool) -> dict[str, float]:
        """What the official evaluator reports beside the mean, from ``(truth, text)`` pairs."""
        return {}

    def ratio_terms(
        self, truths: Mapping[str, Any], graded: Sequence[tuple[Any, str]], official: bool
    ) -> dict[str, list[RatioTerm]]:
        """What the headline is made of, by annotation file, where it is another than the mean score."""
        return {}

    def submission(self, answers: Mapping[str, str | None]) -> object | None:
        """The answers as the official evaluation server takes them, as a JSON value; None where that is not what people do."""
        return None

    def image_root(self, images: Path) -> Path:
        """What the questions' image paths are relative to.

        Args:
            images: the folder that the user names.
        """
        return images


BENCHMARKS: dict[str, Benchmark] = {}


def register(
    name: str, annotation_file: str, image_folder: str, question_file: str = ""
) -> Callable[[type[Benchmark]], type[Benchmark]]:
    """Class decorator that makes a benchmark known under `name`.

    Args:
        source: its annotation file, and where that is from.
        images: its image folder, in words.
        second: its second official file.
    """

    def add(kind: type[Benchmark]) -> type[Benchmark]:
        kind.name, kind.annotation_file, kind.image_folder, kind.question_file = (
            name,
            annotation_file,
            image_folder,
            question_file,
        )
        BENCHMARKS[name] = kind()
        return kind

    return add


def get_benchmark(name: str) -> Benchmark:
    """The benchmark of a name.

    Raises:
        UserError: there is none.
    """
    if name not in BENCHMARKS:
        raise UserError(
            f'unknown benchmark "{name[:80]}"{nearest(name, BENCHMARKS)}; known: {", ".join(sorted(BENCHMARKS))}'
        )
    return BENCHMARKS[name]
