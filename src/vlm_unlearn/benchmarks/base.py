"""The interface of a benchmark: it reads official files, returns the questions, and scores answers."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from vlm_unlearn import plugins
from vlm_unlearn.errors import UserError
from vlm_unlearn.plugins import Registry


class AnswersNotPublicError(UserError):
    """The official files contain questions without answers. An evaluation server scores predictions for them."""


class Prediction(BaseModel):
    """One line of a predictions file. Additional keys are ignored, so a run's responses and verdicts are valid too.

    So are the answers that LLaVA's script for Q-Bench writes, with ``img_path`` and ``response``, and the reviews of
    its script for LLaVA-Bench, with ``tuple``.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    question_id: str | int = Field(validation_alias=AliasChoices("question_id", "prompt_id", "img_path"))
    # None: the model returned no answer
    text: str | None = Field(default=None, validation_alias=AliasChoices("text", "response"))
    # The question as the model got it, if the file contains it: LLaVA's answer files have it as `prompt`.
    question: Any = Field(default=None, validation_alias=AliasChoices("question", "prompt"))
    score: Any = None  # the score of a judge, 0 to 1, for a benchmark that a judge scores
    # The numbers of a judge that scores the reference too: `Verdict.numbers`, or a list in LLaVA's review files.
    numbers: Any = Field(default=None, validation_alias=AliasChoices("numbers", "tuple"))


def same_question(asked_text: object, truth: Any) -> bool:
    """Returns whether a question that a model got contains the question of a right answer.

    A model gets the question with a format prompt and an image placeholder around it, so that white space, case and
    further words do not matter.

    Args:
        asked_text: The question as the model got it. Without a text, every question counts as the same.
        truth: A value of `Benchmark.read_truths`. Without a text under ``question`` or ``text``, every question counts
            as the same.
    """
    texts = [truth.get(key) for key in ("question", "text")] if isinstance(truth, Mapping) else []
    question = next((text for text in texts if isinstance(text, str) and text.strip()), None)
    return question is None or not isinstance(asked_text, str) or _words(question) in _words(asked_text)


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


@dataclass(frozen=True)
class BenchmarkQuestion:
    """One question of a benchmark.

    Attributes:
        id: The question's id in the official files.
        text: The question with LLaVA-1.5's format prompt, as the model gets it.
        image: Path of the image, relative to the benchmark's image folder. None for a question without an image.
        cluster: As in `QuestionScore`.
        reference: The right answer, if the official files contain it.
        category: A category for breakdowns, such as the answer type.
    """

    id: str
    text: str
    image: str | None
    cluster: str
    reference: str | None = None
    category: str | None = None


@dataclass(frozen=True)
class QuestionScore:
    """The score of one question.

    Attributes:
        id: The question's id.
        value: The score, from 0 to 1.
        cluster: Questions in one cluster, such as those about one image, may have correlated errors. Intervals are
            computed over clusters.
        subsets: The subsets of the benchmark that the question belongs to, such as an answer type.
        unparsed: Whether no answer was found in the text. Such an answer counts as wrong.
        judged_pair: The judge's scores of the reference and of the answer, for a benchmark that compares the two.
    """

    id: str
    value: float
    cluster: str
    subsets: tuple[str, ...] = ()
    unparsed: bool = False
    judged_pair: tuple[float, float] | None = None


@dataclass(frozen=True)
class RatioTerm:
    """What one answer adds to the numerator and the denominator of a ratio of sums, such as F1."""

    cluster: str
    numerator: float
    denominator: float


@dataclass(frozen=True)
class BenchmarkScores:
    """The scores of a benchmark.

    Attributes:
        questions: The score of each question.
        missing: The number of questions without a prediction, or with a prediction without text.
        extra_metrics: Further metrics of the official evaluator by name, such as precision.
        ratio_terms: The terms of a ratio by annotation file or category. If there are any, the headline is the mean of
            these ratios, otherwise it is the mean score.
    """

    questions: Sequence[QuestionScore]
    missing: int = 0
    extra_metrics: Mapping[str, float] = field(default_factory=dict)
    ratio_terms: Mapping[str, Sequence[RatioTerm]] = field(default_factory=dict)


class Benchmark(ABC):
    """Base class of all benchmarks. A subclass reads the official files and scores one answer.

    Attributes:
        name: The name in suites and on the command line, set by `register`.
        annotation_file: A description of the official annotation file, set by `register`.
        question_file: A description of the second official file, set by `register`. Empty if there is none.
        image_folder: A description of the image folder, set by `register`.
        multiple_files: Whether the benchmark accepts several annotation files.
        needs_judge: Whether a judge scores the answers. Then `Prediction.score` or `Prediction.numbers` is used
            instead of the text.
        rubric: The shipped rubric of that judge. Empty for other benchmarks.
        headline_name: The name of the headline, for a benchmark whose headline is not the mean score.
        mean_name: The name of the mean score next to such a headline.
        point_metrics: The names of `extra_metrics` that are sums of points and not shares.
    """

    name: ClassVar[str] = ""
    annotation_file: ClassVar[str] = ""
    question_file: ClassVar[str] = ""
    image_folder: ClassVar[str] = ""
    multiple_files: ClassVar[bool] = False
    needs_judge: ClassVar[bool] = False
    rubric: ClassVar[str] = ""
    headline_name: ClassVar[str] = ""
    mean_name: ClassVar[str] = "accuracy"
    point_metrics: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def read_questions(
        self, annotations: Path, questions: Path | None, limit: int | None = None
    ) -> list[BenchmarkQuestion]:
        """Reads the questions, with the format prompts of LLaVA-1.5's evaluation (arXiv 2310.03744).

        Args:
            annotations: The official annotation file.
            questions: The second official file, for a benchmark that has one.
            limit: The number of questions to return. None: all.

        Raises:
            UserError: A file is missing or broken, or a question lacks its text or image.
        """

    @abstractmethod
    def read_truths(self, annotations: Path, questions: Path | None) -> Mapping[str, Any]:
        """Reads the right answers.

        Args:
            annotations: The official annotation file.
            questions: The second official file, for a benchmark that has one.

        Returns:
            For each question id, the value that `score_answer` gets as `truth`.

        Raises:
            AnswersNotPublicError: The file contains questions only.
            UserError: A file is missing or broken.
        """

    @abstractmethod
    def score_answer(self, id: str, truth: Any, text: str, official: bool) -> QuestionScore:
        """Scores one answer.

        Args:
            id: The question's id.
            truth: The question's value from `read_truths`.
            text: The answer.
            official: Count exactly as the published evaluator, including its quirks.
        """

    def score_prediction(self, id: str, truth: Any, prediction: Prediction, official: bool) -> QuestionScore | None:
        """Scores one prediction. Returns None if the prediction has no text."""
        return None if prediction.text is None else self.score_answer(id, truth, prediction.text, official)

    def prediction_id(self, prediction: Prediction, truths: Mapping[str, Any]) -> str:
        """Returns the id of the question that a prediction answers.

        Args:
            prediction: The prediction.
            truths: The right answers by question id, for a benchmark whose official answer files use an id twice.
        """
        return str(prediction.question_id).removeprefix(f"{self.name}/")

    def is_judged(self, prediction: Prediction) -> bool:
        """Returns whether a prediction contains a judge's score, for a benchmark with `needs_judge`."""
        return prediction.score is not None

    def merge_scores(self, scores: Sequence[QuestionScore], truths: Mapping[str, Any]) -> list[QuestionScore]:
        """Combines scores into one per question, for a benchmark that asks a question several times."""
        return list(scores)

    def extra_metrics(self, answers: Sequence[tuple[Any, str]], official: bool) -> dict[str, float]:
        """Returns further metrics of the official evaluator, from ``(truth, text)`` pairs."""
        return {}

    def ratio_terms(
        self, truths: Mapping[str, Any], answers: Sequence[tuple[Any, str]], official: bool
    ) -> dict[str, list[RatioTerm]]:
        """Returns the terms of the headline by annotation file, for a benchmark whose headline is a ratio.

        Args:
            truths: All right answers by question id.
            answers: ``(truth, text)`` pairs of the scored answers.
            official: As in `score_answer`.
        """
        return {}

    def judged_metrics(self, scores: Sequence[QuestionScore], official: bool) -> dict[str, float]:
        """Returns further metrics from `QuestionScore.judged_pair`."""
        return {}

    def judged_terms(self, scores: Sequence[QuestionScore]) -> dict[str, list[RatioTerm]]:
        """Returns the terms of a headline that is computed from `QuestionScore.judged_pair`."""
        return {}

    def submission(self, answers: Mapping[str, str | None]) -> object | None:
        """Returns the answers in the JSON format of the official evaluation server, or None if there is no server.

        Args:
            answers: Texts by question id. None for a failed answer.
        """
        return None

    def image_root(self, images: Path) -> Path:
        """Returns the folder that the questions' image paths are relative to.

        Args:
            images: The image folder that the user has passed.
        """
        return images


BENCHMARKS: Registry[Benchmark] = plugins.BENCHMARKS


def register(
    name: str, annotation_file: str, image_folder: str, question_file: str = ""
) -> Callable[[type[Benchmark]], type[Benchmark]]:
    """Returns a class decorator that registers a benchmark in `BENCHMARKS`.

    Args:
        name: The benchmark's name.
        annotation_file: A description of the official annotation file, and where it is from.
        image_folder: A description of the image folder.
        question_file: A description of the second official file, if there is one.

    Raises:
        UserError: Another module has registered a benchmark of that name.
    """

    def add(benchmark: type[Benchmark]) -> type[Benchmark]:
        benchmark.name = name
        benchmark.annotation_file = annotation_file
        benchmark.image_folder = image_folder
        benchmark.question_file = question_file
        BENCHMARKS.register(name)(benchmark())
        return benchmark

    return add


def get_benchmark(name: str) -> Benchmark:
    """Returns a benchmark.

    Args:
        name: The benchmark's name, or ``FILE.py:CLASS``.

    Raises:
        UserError: There is no such benchmark, or the object is not a benchmark.
    """
    plugin: object = BENCHMARKS.load(name)
    benchmark = plugin() if isinstance(plugin, type) and issubclass(plugin, Benchmark) else plugin
    if not isinstance(benchmark, Benchmark):
        raise plugins.invalid_plugin("benchmark", name, plugin, "a subclass of Benchmark", "benchmark")
    if not benchmark.name:
        type(benchmark).name = plugins.short_name(name)
    return benchmark
