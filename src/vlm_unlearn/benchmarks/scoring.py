"""Scoring answers against a benchmark's official files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_unlearn.benchmarks.base import Benchmark, BenchmarkScores, Prediction
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.store import read_records


def files_by_key(benchmark: Benchmark, annotations: Sequence[Path]) -> dict[str, Path]:
    """Annotation files by what their question ids begin with: nothing for one file, else the file's name without its ending.

    Raises:
        UserError: the benchmark takes one file, or two have the same name.
    """
    if len(annotations) == 1:
        return {"": annotations[0]}
    if not benchmark.multiple_files:
        raise UserError(f"{benchmark.name}: takes one annotation file, {len(annotations)} were given")
    found = {f"{file.stem}/": file for file in annotations}
    if len(found) < len(annotations):
        raise UserError(
            f"{benchmark.name}: two annotation files have the same name; rename one, question ids begin with it"
        )
    return found


def load_truths(benchmark: Benchmark, annotations: Sequence[Path], questions: Path | None) -> dict[str, Any]:
    """Question id -> what `Benchmark.score_answer` needs, over all files.

    Raises:
        AnswersNotPublicError: a file has questions only.
        UserError: a file is broken.
    """
    files = files_by_key(benchmark, annotations)
    return {
        f"{key}{id}": truth
        for key, file in files.items()
        for id, truth in benchmark.read_truths(file, questions).items()
    }


def read_predictions(file: Path, name: str) -> dict[str, Prediction]:
    """Question id -> prediction, from JSON lines ``{"question_id": ..., "text": ...}``.

    A run's ``responses.jsonl`` and a judge's verdicts have ``prompt_id`` instead, with the benchmark's name before the question's id.

    Raises:
        UserError: a line is something else, or answers a question twice.
    """
    found: dict[str, Prediction] = {}
    for prediction in read_records(file, Prediction):
        id = str(prediction.question_id).removeprefix(f"{name}/")
        if id in found:
            raise UserError(f"{file}: question {quoted(id)} is answered twice")
        found[id] = prediction
    return found


def score_predictions(
    benchmark: Benchmark, truths: Mapping[str, Any], answers: Mapping[str, Prediction], official: bool
) -> BenchmarkScores:
    """Scores the answers to the questions of `truths`; a question without one is counted as missing and is in no score."""
    scored = {
        id: benchmark.score_prediction(id, truth, answers[id], official)
        for id, truth in truths.items()
        if id in answers
    }
    graded = [one for one in scored.values() if one is not None]
    told = [(truths[id], answers[id].text or "") for id, one in scored.items() if one is not None]
    return BenchmarkScores(
        benchmark.merge_scores(graded, truths),
        len(truths) - len(graded),
        benchmark.extra_metrics(told, official),
        benchmark.ratio_terms(truths, told, official),
    )


def score_file(
    benchmark: Benchmark,
    predictions: Path,
    annotations: Path | Sequence[Path],
    questions: Path | None = None,
    official: bool = False,
) -> BenchmarkScores:
    """Scores a file of answers against the official annotations.

    Raises:
        AnswersNotPublicError: the official answers are not public.
        UserError: a file is broken, or an answer's question is not in the annotations.
    """
    files = [annotations] if isinstance(annotations, Path) else annotations
    truths = load_truths(benchmark, files, questions)
    answers = read_predictions(predictions, benchmark.name)
    unknown = [id for id in answers if id not in truths]
    if unknown:
        raise UserError(
            f"{predictions}: question {quoted(unknown[0])} is not in {', '.join(map(str, files))} ({len(unknown)} such)"
        )
    if benchmark.needs_judge and answers and all(prediction.score is None for prediction in answers.values()):
        raise UserError(
            f'{predictions}: has no "score"; a language model scores {benchmark.name}: pass its verdicts as --predictions'
        )
    return score_predictions(benchmark, truths, answers, official)
