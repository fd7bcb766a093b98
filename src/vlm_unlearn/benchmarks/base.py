"""What a benchmark is, and scoring a file of answers with one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from vlm_unlearn.errors import RequestError, nearest, shown
from vlm_unlearn.store import read_json, read_records


class Prediction(BaseModel):
    """A line of a predictions file; other keys, such as the prompt, are passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    question_id: str | int
    text: str | None = None  # None: the model gave no answer


@dataclass(frozen=True)
class Scored:
    """One question's score."""

    id: str
    value: float  # 0 to 1
    cluster: str  # what its errors may have in common with others', such as the image
    part: str = ""  # the part of the benchmark it belongs to, such as an answer type
    unparsed: bool = False  # no answer could be found in the text; it counts as wrong


@dataclass(frozen=True)
class Scores:
    """Every question's score, and what couldn't be scored."""

    questions: Sequence[Scored]
    missing: int = 0  # questions without a prediction, or with none that is text
    numbers: Mapping[str, float] = field(default_factory=dict)  # what the official evaluator reports beside the score


class Benchmark(ABC):
    """Base of all benchmarks. Subclasses read their official files and score one answer."""

    name: ClassVar[str]
    source: ClassVar[str]

    @abstractmethod
    def load(self, annotations: Path, questions: Path | None) -> Mapping[str, Any]:
        """Question id -> what `grade` needs.

        Args:
            questions: a second official file, of a benchmark that has one.

        Raises:
            RequestError: a file is missing or is something else.
        """

    @abstractmethod
    def grade(self, id: str, truth: Any, text: str, official: bool) -> Scored:
        """One answer's score.

        Args:
            official: count exactly as the published evaluator, its quirks included.
        """

    def merged(self, graded: Sequence[Scored], truths: Mapping[str, Any]) -> list[Scored]:
        """The scores that count, where several answers make one."""
        return list(graded)

    def numbers(self, graded: Sequence[tuple[Any, str]], official: bool) -> dict[str, float]:
        """What the official evaluator reports beside the mean, from ``(truth, text)`` pairs."""
        return {}


BENCHMARKS: dict[str, Benchmark] = {}


def register(name: str, source: str) -> Callable[[type[Benchmark]], type[Benchmark]]:
    """Class decorator that makes a benchmark known under `name`."""

    def add(kind: type[Benchmark]) -> type[Benchmark]:
        kind.name, kind.source = name, source
        BENCHMARKS[name] = kind()
        return kind

    return add


def find(name: str) -> Benchmark:
    """The benchmark of a name.

    Raises:
        RequestError: there is none.
    """
    if name not in BENCHMARKS:
        raise RequestError(f'unknown benchmark "{name[:80]}"{nearest(name, BENCHMARKS)} known: {", ".join(sorted(BENCHMARKS))}')
    return BENCHMARKS[name]


def read_predictions(file: Path) -> dict[str, str | None]:
    """Question id -> answer, from JSON lines ``{"question_id": ..., "text": ...}``.

    Raises:
        RequestError: a line is something else, or answers a question twice.
    """
    found: dict[str, str | None] = {}
    for prediction in read_records(file, Prediction):
        id = str(prediction.question_id)
        if id in found:
            raise RequestError(f"{file}: question {shown(id)} is answered twice")
        found[id] = prediction.text
    return found


def score(benchmark: Benchmark, predictions: Path, annotations: Path, questions: Path | None = None, official: bool = False) -> Scores:
    """Scores a file of answers against the official annotations.

    A question without an answer is counted as missing and is in no score.

    Raises:
        RequestError: a file is broken, or an answer's question is not in the annotations.
    """
    truths = benchmark.load(annotations, questions)
    answers = read_predictions(predictions)
    unknown = [id for id in answers if id not in truths]
    if unknown:
        raise RequestError(f"{predictions}: question {shown(unknown[0])} is not in {annotations} ({len(unknown)} such)")
    told = [(id, truth, text) for id, truth in truths.items() if (text := answers.get(id)) is not None]
    graded = [benchmark.grade(id, truth, text, official) for id, truth, text in told]
    return Scores(
        benchmark.merged(graded, truths), len(truths) - len(graded), benchmark.numbers([(truth, text) for _, truth, text in told], official)
    )


def entries(value: Any, where: str, *keys: str) -> list[Mapping[str, Any]]:
    """A list of objects that all have `keys`.

    Raises:
        RequestError: it is something else; the entry and the key are named.
    """
    if not isinstance(value, list) or not value:
        raise RequestError(f"{where}: expected a list of objects")
    for number, entry in enumerate(value):
        missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise RequestError(f'{where}: entry {number} has no "{missing[0]}"')
    return value


def ten_answers(entry: Mapping[str, Any], where: str) -> list[str]:
    """The annotators' answers, given as texts or as objects with ``answer``.

    Raises:
        RequestError: there are none, or they are something else.
    """
    answers: Iterable[Any] = entry["answers"] if isinstance(entry["answers"], list) else ()
    found = [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]
    if not found or not all(isinstance(answer, str) for answer in found):
        raise RequestError(f'{where}: "answers" must be a list of texts')
    return [str(answer) for answer in found]


def annotated_questions(annotations: Path, key: str) -> dict[str, Any]:
    """Question id -> ``answers``, ``image`` and ``type``, from a file ``{key: [{"question_id", "image_id", "answers", ...}]}``.

    Raises:
        RequestError: the file is missing or is something else.
    """
    value = read_json(annotations)
    if not isinstance(value, dict) or key not in value:
        raise RequestError(f'{annotations}: expected {{"{key}": [...]}}, the official annotation file')
    return {
        str(entry["question_id"]): {
            "answers": ten_answers(entry, f"{annotations}: question {entry['question_id']}"),
            "image": str(entry.get("image_id", entry["question_id"])),
            "type": str(entry.get("answer_type", "")),
        }
        for entry in entries(value[key], str(annotations), "question_id", "answers")
    }
