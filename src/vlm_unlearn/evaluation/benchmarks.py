"""The scores of a suite's utility benchmarks, out of the answers that its run holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vlm_unlearn.benchmarks import (
    AnswersNotPublicError,
    Benchmark,
    BenchmarkScores,
    Prediction,
    get_benchmark,
    load_truths,
    score_predictions,
)
from vlm_unlearn.config import BenchmarkConfig, Suite
from vlm_unlearn.data.json_stream import write_lines
from vlm_unlearn.errors import UserError
from vlm_unlearn.evaluation.generate import OnDone, generate_run, read_answers
from vlm_unlearn.metrics.rates import Outcomes, mean_of_rates, mean_ratio, rate
from vlm_unlearn.records import Prompt, Rate, Response, Row, Summary
from vlm_unlearn.store import write_json

# SafeEraser's specificity (arXiv 2502.12520) is the mean of these.
SPECIFICITY = ("gqa", "vizwiz", "scienceqa", "vqav2", "pope", "mmvet", "mmbench")


def benchmark_rates(
    suite: Suite, prompts: Mapping[str, Prompt], responses: Iterable[Response], judged: Mapping[str, float | None]
) -> dict[str, Rate]:
    """The rate of each of a suite's benchmarks under its name, and their mean as ``specificity`` where all seven are there.

    A benchmark whose official answers are not public has a rate without a value, and so has then the mean. Its interval takes the
    benchmarks as independent of each other.

    Args:
        prompts: the run's, by id.
        responses: the run's; those to other prompts are passed over.
        judged: prompt id -> a judge's score, 0 to 1, for benchmarks that a judge scores (MM-Vet). What is missing has failed.

    Raises:
        UserError: a benchmark's files have changed since the model was asked.
    """
    found = list(responses)
    rates: dict[str, Rate] = {}
    for config in suite.benchmarks:
        try:
            rates[config.name] = headline_rate(
                benchmark_scores(config, collect_predictions(config.name, prompts, found, judged))
            )
        except AnswersNotPublicError:
            rates[config.name] = rate([], [])
    if set(SPECIFICITY) <= set(rates):
        rates["specificity"] = mean_of_rates([rates[name] for name in SPECIFICITY])
    return rates


def benchmark_outcomes(
    config: BenchmarkConfig,
    prompts: Mapping[str, Prompt],
    responses: Iterable[Response],
    judged: Mapping[str, float | None],
) -> Outcomes:
    """How each question of one benchmark counted; arguments and errors as in `benchmark_rates`, and AnswersNotPublicError."""
    scores = benchmark_scores(config, collect_predictions(config.name, prompts, responses, judged))
    return Outcomes(
        {one.id: one.value for one in scores.questions},
        {one.id: one.cluster for one in scores.questions},
        scores.missing,
    )


def collect_predictions(
    name: str, prompts: Mapping[str, Prompt], responses: Iterable[Response], judged: Mapping[str, float | None]
) -> dict[str, Prediction]:
    """A benchmark's predictions out of a run's responses, by question id, in the order of its file."""
    texts = {response.prompt_id: response.text for response in responses}
    asked = [prompt.id for prompt in prompts.values() if prompt.set == name]
    return {
        (id := prompt_id.removeprefix(f"{name}/")): Prediction(
            question_id=id, text=texts.get(prompt_id), score=judged.get(prompt_id)
        )
        for prompt_id in asked
    }


def benchmark_scores(config: BenchmarkConfig, predictions: Mapping[str, Prediction]) -> BenchmarkScores:
    """Scores the questions that were asked, which with a `limit` are not all.

    Raises:
        AnswersNotPublicError: the official answers are not public.
        UserError: a question that was asked is not in the official files any more.
    """
    truths = load_truths(get_benchmark(config.name), config.annotations, config.questions)
    lost = [id for id in predictions if id not in truths]
    if lost:
        raise UserError(
            f"{config.annotations[0]}: has changed since the model was asked: {len(lost)} questions are gone, {lost[0]} first"
        )
    asked = {id: truth for id, truth in truths.items() if id in predictions}
    return score_predictions(get_benchmark(config.name), asked, predictions, config.official)


def headline_rate(scores: BenchmarkScores) -> Rate:
    """The number that papers give: the mean score, or for POPE the mean F1; intervals are clustered by image."""
    if scores.ratio_terms:
        parts = [
            [(one.cluster, one.numerator, one.denominator) for one in part] for part in scores.ratio_terms.values()
        ]
        return mean_ratio(parts, scores.missing)
    return mean_score(scores)


def mean_score(scores: BenchmarkScores, part: str | None = None) -> Rate:
    """The mean over all questions, or over those of one part."""
    kept = [one for one in scores.questions if part is None or part in one.subsets]
    return rate([one.value for one in kept], [one.cluster for one in kept], scores.missing if part is None else 0)


@dataclass(frozen=True)
class BenchmarkRun:
    """What asking one benchmark came to."""

    predictions: Path
    scores: BenchmarkScores | None
    unscored_reason: str = ""  # why there are no scores, and what to do
    submission: Path | None = None  # the answers as the official server or evaluator takes them


def run_benchmark(suite: Suite, folder: Path, name: str, on_done: OnDone | None = None) -> BenchmarkRun:
    """Asks a suite's only benchmark and scores it: predictions.jsonl, submission.json where there is such a format, summary.json.

    Run again after an interruption it goes on.

    Args:
        name: the row's in summary.json.

    Raises:
        UserError: broken files, a model that can't be loaded, or a folder that holds another run.
    """
    config = suite.benchmarks[0]
    benchmark = get_benchmark(config.name)
    unscored = _unscored(benchmark, config)  # broken answers are named before hours of generation
    generate_run(suite, folder, on_done)
    prompts, responses = read_answers(folder)
    predictions = collect_predictions(config.name, prompts, responses, {})
    file = folder / "predictions.jsonl"
    write_lines(file, ({"question_id": id, "text": prediction.text} for id, prediction in predictions.items()))
    submission = benchmark.submission({id: prediction.text for id, prediction in predictions.items()})
    submitted = None if submission is None else folder / "submission.json"
    if submitted is not None:
        write_json(submitted, submission)
    scores = None if unscored else benchmark_scores(config, predictions)
    value = rate([], []) if scores is None else headline_rate(scores)
    write_json(folder / "summary.json", Summary(rows=[Row(model=name, metrics={config.name: value})]).model_dump())
    return BenchmarkRun(file, scores, unscored, submitted)


def _unscored(benchmark: Benchmark, config: BenchmarkConfig) -> str:
    """Why answers alone won't be scored; empty where they will."""
    try:
        load_truths(benchmark, config.annotations, config.questions)
    except AnswersNotPublicError as error:
        return str(error)
    if benchmark.needs_judge:
        return (
            f"{benchmark.name}: a language model scores its answers; judge them by the rubric mm_vet (`vlm-unlearn judge run`), then "
            "`vlm-unlearn benchmark score` with the verdicts as --predictions"
        )
    return ""
