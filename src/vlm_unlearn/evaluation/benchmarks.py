"""Scores of a suite's utility benchmarks, computed from the answers of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from vlm_unlearn.benchmarks import (
    AnswersNotPublicError,
    Benchmark,
    BenchmarkScores,
    Prediction,
    get_benchmark,
    load_truths,
    same_question,
    score_predictions,
)
from vlm_unlearn.config import BenchmarkConfig, Suite
from vlm_unlearn.data.json_stream import write_lines
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.evaluation.generate import OnDone, generate_run
from vlm_unlearn.metrics.rates import Outcomes, mean_of_rates, mean_ratio, rate
from vlm_unlearn.records import Prompt, Rate, Response, Row, Summary, Verdict
from vlm_unlearn.store import EvaluationRun, write_json

# The benchmarks whose mean is SafeEraser's specificity (arXiv 2502.12520).
SPECIFICITY_BENCHMARKS = ("gqa", "vizwiz", "scienceqa", "vqav2", "pope", "mmvet", "mmbench")


def benchmark_rates(
    suite: Suite, prompts: Mapping[str, Prompt], responses: Iterable[Response], verdicts: Mapping[str, Verdict]
) -> dict[str, Rate]:
    """Returns the rate of each benchmark of a suite by its name.

    If the suite has all seven `SPECIFICITY_BENCHMARKS`, their mean is added as ``specificity``. The interval of the
    mean treats the benchmarks as independent. A benchmark whose official answers are not public has a rate without a
    value, and then the mean has none either.

    Args:
        suite: The suite.
        prompts: The run's prompts by id.
        responses: The run's responses. Those to other prompts are ignored.
        verdicts: Verdicts by prompt id, for benchmarks that a judge scores (MM-Vet, LLaVA-Bench). A missing score
            counts as a failure.

    Raises:
        UserError: A benchmark's files have changed since the answers were generated.
    """
    responses = list(responses)
    rates: dict[str, Rate] = {}
    for config in suite.benchmarks:
        predictions = collect_predictions(config.name, prompts, responses, verdicts)
        try:
            rates[config.name] = headline_rate(benchmark_scores(config, predictions))
        except AnswersNotPublicError:
            rates[config.name] = rate([], [])
    if set(SPECIFICITY_BENCHMARKS) <= set(rates):
        rates["specificity"] = mean_of_rates([rates[name] for name in SPECIFICITY_BENCHMARKS])
    return rates


def benchmark_outcomes(
    config: BenchmarkConfig,
    prompts: Mapping[str, Prompt],
    responses: Iterable[Response],
    verdicts: Mapping[str, Verdict],
) -> Outcomes:
    """Returns the score of each question of one benchmark. The arguments are those of `benchmark_rates`.

    Raises:
        AnswersNotPublicError: The official answers are not public.
        UserError: The benchmark's files have changed since the answers were generated.
    """
    scores = benchmark_scores(config, collect_predictions(config.name, prompts, responses, verdicts))
    return Outcomes(
        {question.id: question.value for question in scores.questions},
        {question.id: question.cluster for question in scores.questions},
        scores.missing,
    )


def collect_predictions(
    name: str, prompts: Mapping[str, Prompt], responses: Iterable[Response], verdicts: Mapping[str, Verdict]
) -> dict[str, Prediction]:
    """Returns a benchmark's predictions from a run's responses, by question id, in the order of the prompts."""
    texts = {response.prompt_id: response.text for response in responses}
    predictions = {}
    for prompt in prompts.values():
        if prompt.set == name:
            id = prompt.id.removeprefix(f"{name}/")
            verdict = verdicts.get(prompt.id)
            predictions[id] = Prediction(
                question_id=id,
                text=texts.get(prompt.id),
                score=verdict.score if verdict else None,
                numbers=verdict.numbers if verdict else None,
                question=prompt.question,
            )
    return predictions


def benchmark_scores(config: BenchmarkConfig, predictions: Mapping[str, Prediction]) -> BenchmarkScores:
    """Scores the questions that have a prediction. With a `limit` these are not all questions of the benchmark.

    Raises:
        AnswersNotPublicError: The official answers are not public.
        UserError: A question with a prediction is no longer in the official files.
    """
    benchmark = get_benchmark(config.name)
    truths = load_truths(benchmark, config.annotations, config.questions)
    missing_ids = [
        id
        for id, prediction in predictions.items()
        if id not in truths or not same_question(prediction.question, truths[id])
    ]
    if missing_ids:
        raise UserError(
            f"the file has changed since the answers were generated: {len(missing_ids)} questions are missing or "
            "have another text, "
            f"the first is {quoted(missing_ids[0])}. Restore the file, or run the benchmark again.",
            code="run-mismatch",
            file=config.annotations[0],
        )
    predicted = {id: truth for id, truth in truths.items() if id in predictions}
    return score_predictions(benchmark, predicted, predictions, config.official)


def headline_rate(scores: BenchmarkScores) -> Rate:
    """Returns the value that papers report: the mean score, or for POPE the mean F1.

    For MME it is the sum of the scores of all categories, divided by its maximum, and for LLaVA-Bench the relative
    score. The interval is clustered by image, or by question for MMBench and ScienceQA.
    """
    if scores.ratio_terms:
        ratios = [
            [(term.cluster, term.numerator, term.denominator) for term in terms]
            for terms in scores.ratio_terms.values()
        ]
        return mean_ratio(ratios, scores.missing)
    return mean_score(scores)


def mean_score(scores: BenchmarkScores, subset: str | None = None) -> Rate:
    """Returns the mean score of all questions, or of one subset, such as an answer type."""
    questions = [question for question in scores.questions if subset is None or subset in question.subsets]
    return rate(
        [question.value for question in questions],
        [question.cluster for question in questions],
        scores.missing if subset is None else 0,
    )


@dataclass(frozen=True)
class BenchmarkRun:
    """The result of `run_benchmark`.

    Attributes:
        predictions: The file with the model's answers.
        scores: The scores, or None if the answers cannot be scored here.
        unscored_reason: Why there are no scores, and what to do. Empty if there are scores.
        submission: The file with the answers in the format of the official server or evaluator, if there is one.
    """

    predictions: Path
    scores: BenchmarkScores | None
    unscored_reason: str = ""
    submission: Path | None = None


def run_benchmark(suite: Suite, run: str | PathLike[str], name: str, on_done: OnDone | None = None) -> BenchmarkRun:
    """Generates the answers to a suite's only benchmark and scores them. An interrupted run resumes.

    The function writes predictions.jsonl, summary.json and, if the benchmark has an official format for answers,
    submission.json.

    Args:
        suite: The suite, with exactly one benchmark.
        run: The run folder, as a path or as an `EvaluationRun`.
        name: The name of the row in summary.json.
        on_done: As in `generate_run`.

    Raises:
        UserError: Files are broken, the model cannot be loaded, or the folder contains another run.
    """
    config = suite.benchmarks[0]
    benchmark = get_benchmark(config.name)
    unscored_reason = _unscored_reason(benchmark, config)  # reads the answers: broken ones end the run before it starts
    run = EvaluationRun(run)
    generate_run(suite, run, on_done)
    prompts, responses = run.read_answers()
    predictions = collect_predictions(config.name, prompts, responses, {})
    texts = {id: prediction.text for id, prediction in predictions.items()}
    write_lines(run.predictions_file, ({"question_id": id, "text": text} for id, text in texts.items()))
    submission = benchmark.submission(texts)
    if submission is not None:
        write_json(run.submission_file, submission)
    scores = None if unscored_reason else benchmark_scores(config, predictions)
    headline = rate([], []) if scores is None else headline_rate(scores)
    run.write_summary(Summary(rows=[Row(model=name, metrics={config.name: headline})]))
    submission_file = None if submission is None else run.submission_file
    return BenchmarkRun(run.predictions_file, scores, unscored_reason, submission_file)


def _unscored_reason(benchmark: Benchmark, config: BenchmarkConfig) -> str:
    """Returns why `run_benchmark` cannot score the answers. Empty if it can."""
    try:
        load_truths(benchmark, config.annotations, config.questions)
    except AnswersNotPublicError as error:
        return str(error)
    if benchmark.needs_judge:
        return (
            f"{benchmark.name}: a language model scores the answers. Run `vlm-unlearn judge run` with the rubric "
            f"{benchmark.rubric}, then `vlm-unlearn benchmark score` with the verdicts as --predictions."
        )
    return ""
