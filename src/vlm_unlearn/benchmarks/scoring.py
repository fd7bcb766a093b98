"""Scores answers against a benchmark's official files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vlm_unlearn.benchmarks.base import Benchmark, BenchmarkScores, Prediction, same_question
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.store import DuplicateKeyError, first_problem, read_text, unique_keys


def files_by_prefix(benchmark: Benchmark, annotations: Sequence[Path]) -> dict[str, Path]:
    """Returns the annotation files by the prefix of their question ids.

    The prefix is empty for a single file. Otherwise it is the file's name without its extension, followed by a slash.

    Raises:
        UserError: The benchmark accepts one file only, or two files have the same name.
    """
    if len(annotations) == 1:
        return {"": annotations[0]}
    if not benchmark.multiple_files:
        raise UserError(
            f"{benchmark.name} has a single annotation file, but {len(annotations)} were passed",
            code="conflicting-settings",
            field="annotations",
        )
    files = {f"{file.stem}/": file for file in annotations}
    if len(files) < len(annotations):
        raise UserError(
            f"two annotation files of {benchmark.name} have the same name. Rename one: question ids start with it.",
            code="duplicate-key",
            field="annotations",
        )
    return files


def load_truths(benchmark: Benchmark, annotations: Sequence[Path], questions: Path | None) -> dict[str, Any]:
    """Reads the right answers of all annotation files.

    Returns:
        For each question id, the value that `Benchmark.score_answer` gets as `truth`.

    Raises:
        AnswersNotPublicError: A file contains questions only.
        UserError: A file is broken.
    """
    return {
        f"{prefix}{id}": truth
        for prefix, file in files_by_prefix(benchmark, annotations).items()
        for id, truth in benchmark.read_truths(file, questions).items()
    }


def read_predictions(
    file: Path, name: str, question_id: Callable[[Prediction], str] | None = None
) -> dict[str, Prediction]:
    """Reads predictions by question id, from JSON lines ``{"question_id": ..., "text": ...}``.

    A run's responses and a judge's verdicts are valid too. They have a ``prompt_id``, which is the question id with the
    benchmark's name as a prefix.

    Args:
        file: The file with the predictions.
        name: The benchmark's name.
        question_id: Returns the id of the question that a prediction answers. None uses its ``question_id``.

    Raises:
        UserError: A line is not a prediction, or a question has two.
    """
    predictions: dict[str, Prediction] = {}
    for prediction in _parse_predictions(file):
        id = str(prediction.question_id).removeprefix(f"{name}/") if question_id is None else question_id(prediction)
        if id in predictions:
            raise UserError(f"the question {quoted(id)} has two predictions", code="duplicate-id", file=file)
        predictions[id] = prediction
    return predictions


def _parse_predictions(file: Path) -> Iterator[Prediction]:
    """Yields the predictions of a file. LLaVA's script for Q-Bench writes them without line breaks between them."""
    decoder = json.JSONDecoder(object_pairs_hook=unique_keys)
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        start, text = 0, line.strip()
        while start < len(text):
            prediction, start = _parse_prediction(text, start, decoder, file, number)
            yield prediction


def _parse_prediction(
    text: str, start: int, decoder: json.JSONDecoder, file: Path, number: int
) -> tuple[Prediction, int]:
    """Returns the prediction that starts at a character of a line, and the start of the next one."""
    try:
        value, end = decoder.raw_decode(text, start)
        if not isinstance(value, dict) and end < len(text):
            raise ValueError(f"Extra data after column {end}")
        while end < len(text) and text[end].isspace():
            end += 1
        return Prediction.model_validate(value), end
    except ValidationError as error:
        field, message = first_problem(error)
        raise UserError(message, code="invalid-field", file=file, record=number, field=field) from None
    except DuplicateKeyError as error:
        raise UserError(str(error), code="duplicate-key", file=file, record=number) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON: {error}", code="invalid-json", file=file, record=number) from None


def score_predictions(
    benchmark: Benchmark, truths: Mapping[str, Any], predictions: Mapping[str, Prediction], official: bool
) -> BenchmarkScores:
    """Scores the predictions for the questions of `truths`.

    A question without a prediction counts as missing and has no score.

    Args:
        benchmark: The benchmark.
        truths: The right answers by question id, as `load_truths` returns them.
        predictions: Predictions by question id.
        official: Count exactly as the published evaluator.
    """
    scores = {}
    answers = []
    for id, truth in truths.items():
        if id in predictions:
            score = benchmark.score_prediction(id, truth, predictions[id], official)
            if score is not None:
                scores[id] = score
                answers.append((truth, predictions[id].text or ""))
    question_scores = list(scores.values())
    return BenchmarkScores(
        benchmark.merge_scores(question_scores, truths),
        len(truths) - len(scores),
        benchmark.extra_metrics(answers, official) | benchmark.judged_metrics(question_scores, official),
        benchmark.ratio_terms(truths, answers, official) | benchmark.judged_terms(question_scores),
    )


def score_file(
    benchmark: Benchmark,
    predictions: Path,
    annotations: Path | Sequence[Path],
    questions: Path | None = None,
    official: bool = False,
) -> BenchmarkScores:
    """Scores a file of predictions against the official annotations.

    Args:
        benchmark: The benchmark.
        predictions: The file with the predictions.
        annotations: The official annotation file, or several.
        questions: The second official file, for a benchmark that has one.
        official: Count exactly as the published evaluator.

    Raises:
        AnswersNotPublicError: The official answers are not public.
        UserError: A file is broken, or a prediction is for a question that is not in the annotations.
    """
    files = [annotations] if isinstance(annotations, Path) else annotations
    truths = load_truths(benchmark, files, questions)
    predictions_by_id = read_predictions(
        predictions, benchmark.name, lambda prediction: benchmark.prediction_id(prediction, truths)
    )
    for id, prediction in predictions_by_id.items():
        if id in truths and not same_question(prediction.question, truths[id]):
            raise UserError(
                f"the prediction answers another question than {quoted(id)} of {', '.join(map(str, files))}: "
                f"{quoted(prediction.question)}. Pass the annotations of the same split.",
                code="run-mismatch",
                file=predictions,
                record=quoted(id),
            )
    unknown_ids = [id for id in predictions_by_id if id not in truths]
    if unknown_ids:
        raise UserError(
            f"the question {quoted(unknown_ids[0])} is not in {', '.join(map(str, files))} "
            f"({len(unknown_ids)} such predictions). Pass the annotations of the same split.",
            code="unknown-name",
            file=predictions,
        )
    is_judged = [benchmark.is_judged(prediction) for prediction in predictions_by_id.values()]
    if benchmark.needs_judge and is_judged and not any(is_judged):
        raise UserError(
            f"the file has no scores, and a language model scores {benchmark.name}. "
            "Pass its verdicts as --predictions.",
            code="missing-field",
            file=predictions,
            field="score",
        )
    return score_predictions(benchmark, truths, predictions_by_id, official)
