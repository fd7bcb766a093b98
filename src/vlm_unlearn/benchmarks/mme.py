"""MME (Fu et al. 2023, arXiv 2306.13394): two yes-or-no questions about each image, one of them with the answer no."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_unlearn.benchmarks.base import (
    Benchmark,
    BenchmarkQuestion,
    Prediction,
    QuestionScore,
    RatioTerm,
    register,
    same_question,
)
from vlm_unlearn.benchmarks.official_files import SHORT, record
from vlm_unlearn.errors import UserError
from vlm_unlearn.metrics.answer_reading import read_yes_no
from vlm_unlearn.store import read_text

PERCEPTION = ["existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"]
COGNITION = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]
_SUFFIX = re.compile(r"\s*Please answer yes or no\.?\s*\Z", re.IGNORECASE)
_LAYOUT = "Pass MME_Benchmark_release_version, which contains existence/, count/ and 12 other folders."


@register(
    "mme",
    "the folder MME_Benchmark_release_version of the MME download, with a folder for each of the 14 categories",
    "the same folder",
)
class MME(Benchmark):
    """Accuracy and accuracy+ of each category. Accuracy+ is the share of images with both questions right.

    A category has up to 200 points, 100 for each of the two. Their sums over the 10 categories of perception and the 4
    of cognition are reported in points. The headline is the sum over all categories, divided by its maximum. A
    question's id is ``<category>/<image>/<1 or 2>``.
    """

    headline_name = "points of all categories"
    point_metrics = ("perception", "cognition")

    def read_questions(
        self, annotations: Path, questions: Path | None, limit: int | None = None
    ) -> list[BenchmarkQuestion]:
        """Reads the questions. `limit` is the number of images of each category."""
        benchmark_questions = []
        for category, folder in _category_folders(annotations).items():
            images = folder / "images" if (folder / "images").is_dir() else folder
            names = {file.stem: file.name for file in sorted(images.iterdir()) if file.suffix != ".txt"}
            for file in _question_files(folder)[:limit]:
                name = names.get(file.stem, f"{file.stem}.jpg")
                image = (images / name).relative_to(annotations).as_posix()
                for id, truth in _read_questions(file, category).items():
                    text = f"{truth['question']}\n{SHORT}"
                    benchmark_questions.append(
                        BenchmarkQuestion(id, text, image, truth["image"], truth["answer"].capitalize(), category)
                    )
        return benchmark_questions

    def read_truths(self, annotations: Path, questions: Path | None) -> Mapping[str, Any]:
        return {
            id: truth
            for category, folder in _category_folders(annotations).items()
            for file in _question_files(folder)
            for id, truth in _read_questions(file, category).items()
        }

    def prediction_id(self, prediction: Prediction, truths: Mapping[str, Any]) -> str:
        """Returns the question's id. LLaVA's answer files have ``<category>/<image file>`` for both questions."""
        id = super().prediction_id(prediction, truths)
        if id in truths:
            return id
        parts = id.split("/")
        image = f"{parts[0]}/{Path(parts[-1]).stem}"
        ids = [f"{image}/{number}" for number in (1, 2) if f"{image}/{number}" in truths]
        matching = [id for id in ids if prediction.question and same_question(prediction.question, truths[id])]
        # One of the two questions may begin with the other one.
        return max(matching, key=lambda id: len(truths[id]["question"]), default=id)

    def score_answer(self, id: str, truth: Any, text: str, official: bool) -> QuestionScore:
        answer = _answer(text, official)
        return QuestionScore(id, float(answer == truth["answer"]), truth["image"], (truth["category"],), answer is None)

    def extra_metrics(self, answers: Sequence[tuple[Any, str]], official: bool) -> dict[str, float]:
        metrics: dict[str, float] = {}
        points: dict[str, float] = {}
        for category, images in _right_answers(answers, official).items():
            right = [value for values in images.values() for value in values]
            metrics[f"{category} accuracy+"] = both = sum(map(_both, images.values())) / len(images)
            points[category] = 100 * (sum(right) / len(right) + both)
        for name, categories in (("perception", PERCEPTION), ("cognition", COGNITION)):
            if points.keys() >= set(categories):  # never the sum of fewer categories
                metrics[name] = sum(points[category] for category in categories)
        return metrics

    def ratio_terms(
        self, truths: Mapping[str, Any], answers: Sequence[tuple[Any, str]], official: bool
    ) -> dict[str, list[RatioTerm]]:
        """Returns the terms of each category's points: for an image, the mean of its accuracy and its accuracy+."""
        terms: dict[str, list[RatioTerm]] = {truth["category"]: [] for truth in truths.values()}
        for category, images in _right_answers(answers, official).items():
            for image, right in images.items():
                if len(right) == 2:
                    terms[category].append(RatioTerm(image, (sum(right) / 2 + _both(right)) / 2, 1.0))
        return terms


def _answer(text: str, official: bool) -> str | None:
    """Returns ``"yes"``, ``"no"`` or None. The official evaluator finds them within the first four characters."""
    if not official:
        return read_yes_no(text)
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


def _both(right: Sequence[bool]) -> bool:
    return len(right) == 2 and all(right)


def _right_answers(answers: Sequence[tuple[Any, str]], official: bool) -> dict[str, dict[str, list[bool]]]:
    """Returns whether the answers about each image are right, by category and image."""
    by_category: dict[str, dict[str, list[bool]]] = {}
    for truth, text in answers:
        images = by_category.setdefault(truth["category"], {})
        images.setdefault(truth["image"], []).append(_answer(text, official) == truth["answer"])
    return by_category


def _category_folders(annotations: Path) -> dict[str, Path]:
    root = annotations / "MME_Benchmark" if (annotations / "MME_Benchmark").is_dir() else annotations
    folders = {name: root / name for name in (*PERCEPTION, *COGNITION) if (root / name).is_dir()}
    if not folders:
        raise UserError(f"the folder has no category of MME. {_LAYOUT}", code="not-a-folder", file=annotations)
    return folders


def _question_files(folder: Path) -> list[Path]:
    texts = folder / "questions_answers_YN" if (folder / "questions_answers_YN").is_dir() else folder
    files = sorted(file for file in texts.glob("*.txt") if not file.name.startswith("."))  # macOS adds hidden files
    if not files:
        raise UserError(f"the folder has no question files. {_LAYOUT}", code="no-records", file=texts)
    return files


def _read_questions(file: Path, category: str) -> dict[str, dict[str, str]]:
    """Returns the two questions of a file by id. A line has the question, a tab, and Yes or No."""
    lines = [line for line in read_text(file).split("\n") if line.strip()]
    if len(lines) != 2:
        raise UserError(f"the file has {len(lines)} questions, but an image has 2", code="invalid-field", file=file)
    image = f"{category}/{file.stem}"
    truths = {}
    for number, line in enumerate(lines, start=1):
        question, _, answer = line.strip().rpartition("\t")
        text, label = _SUFFIX.sub("", question).strip(), answer.strip().lower()
        if label not in ("yes", "no"):
            raise UserError(
                "the line must have a question, a tab, and Yes or No", code="invalid-field", file=file, record=number
            )
        text = record(file, number, {"question": text}).text("question")
        truths[f"{image}/{number}"] = {"question": text, "answer": label, "image": image, "category": category}
    return truths
