"""``vlm-unlearn benchmark``: runs and scores utility benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vlm_unlearn.cli.common import JSON_OPTION, Stages, print_json, quiet_libraries, status_console
from vlm_unlearn.cli.completion import benchmark_names
from vlm_unlearn.cli.evaluate import generate_worker_share
from vlm_unlearn.cli.image_folders import reads_images
from vlm_unlearn.cli.terminal import Commands
from vlm_unlearn.distributed import is_main_process

if TYPE_CHECKING:
    from vlm_unlearn.benchmarks import BenchmarkScores
    from vlm_unlearn.records import Rate

benchmark_app = Commands("Runs utility benchmarks from their official files, and scores answers to them.")
NAME = typer.Argument(
    ..., metavar="NAME", help="A benchmark. `benchmark list` lists them.", autocompletion=benchmark_names
)
ANNOTATIONS = typer.Option(
    ..., "--annotations", help="The benchmark's official annotation file. For POPE up to three times."
)
QUESTIONS = typer.Option(None, "--questions", help="The second official file, if the benchmark has one.")
OFFICIAL = typer.Option(False, "--official", help="Score exactly as the published evaluator, defects included.")


@benchmark_app.command("list")
def list_benchmarks(as_json: bool = JSON_OPTION) -> None:
    """Lists the benchmarks with their official files and image folders.

    Example:

      vlm-unlearn benchmark list
    """
    from vlm_unlearn.benchmarks import BENCHMARKS, get_benchmark

    names = [name for name, _ in BENCHMARKS.working_items(lambda error: typer.echo(f"warning: {error}", err=True))]
    benchmarks = [get_benchmark(name) for name in names]
    if as_json:
        print_json(
            [
                {
                    "name": benchmark.name,
                    "annotations": benchmark.annotation_file,
                    "questions": benchmark.question_file,
                    "images": benchmark.image_folder,
                }
                for benchmark in benchmarks
            ]
        )
        return
    for benchmark in benchmarks:
        typer.echo(f"{benchmark.name}\n  --annotations  {benchmark.annotation_file}")
        if benchmark.question_file:
            typer.echo(f"  --questions    {benchmark.question_file}")
        typer.echo(f"  --images       {benchmark.image_folder}")


@benchmark_app.command("run")
@reads_images
def run(
    name: str = NAME,
    overrides: list[str] = typer.Argument(
        None,
        metavar="[key=value ...]",
        help="Overrides of a suite: model=... is required, generation.batch_size=8 and so on are optional.",
    ),
    annotations: list[Path] = ANNOTATIONS,
    questions: Path = QUESTIONS,
    images: Path = typer.Option(Path(), "--images", help="The image folder."),
    limit: int = typer.Option(
        None, "--limit", min=1, help="Use only the first questions of each annotation file, this many."
    ),
    official: bool = OFFICIAL,
    out: Path = typer.Option(..., "--out", help="The run folder."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Runs a benchmark on a model and scores its answers. Run again after an interruption, it resumes.

    Example:

      vlm-unlearn benchmark run gqa model=runs/npo --annotations testdev_balanced_questions.json
      --images images --out gqa-npo
    """
    from vlm_unlearn.config import Suite, apply_overrides, validate

    settings = {
        "name": name,
        "annotations": annotations,
        "questions": questions,
        "images": images,
        "limit": limit,
        "official": official,
    }
    suite = validate(Suite, apply_overrides({"benchmarks": [settings]}, overrides or [], Suite), "benchmark run")
    if not is_main_process():
        generate_worker_share(suite, out)
        return
    with status_console().status("loading transformers"):
        from vlm_unlearn.evaluation.benchmarks import run_benchmark

        quiet_libraries()
    with Stages() as stages:
        stages.wait("loading the model")
        result = run_benchmark(suite, out, out.resolve().name, stages.update)
    submission = str(result.submission) if result.submission else None
    files = {"predictions": str(result.predictions), "submission": submission}
    if result.scores is not None:
        _print_scores(name, official, result.scores, as_json, files)
    elif as_json:
        print_json({"benchmark": name, "official": official, "score": None, "reason": result.unscored_reason, **files})
    else:
        typer.echo(result.unscored_reason)
    if not as_json:
        official_form = f"; in the form of the official evaluation: {submission}" if submission else ""
        typer.echo(f"answers in {result.predictions}{official_form}")


@benchmark_app.command("score")
def score(
    name: str = NAME,
    predictions: Path = typer.Option(
        ...,
        "--predictions",
        help='JSON lines {"question_id": ..., "text": ...}. For mmvet and llava_bench, the verdicts of a judge.',
    ),
    annotations: list[Path] = ANNOTATIONS,
    questions: Path = QUESTIONS,
    official: bool = OFFICIAL,
    as_json: bool = JSON_OPTION,
) -> None:
    """Scores a file of answers against a benchmark's official annotations.

    Example:

      vlm-unlearn benchmark score vqav2 --predictions answers.jsonl --annotations v2_mscoco_val2014_annotations.json
    """
    from vlm_unlearn.benchmarks import get_benchmark, score_file

    _print_scores(
        name, official, score_file(get_benchmark(name), predictions, annotations, questions, official), as_json, {}
    )


def _print_scores(name: str, official: bool, scores: BenchmarkScores, as_json: bool, files: dict[str, Any]) -> None:
    """Prints the headline score, the mean score if it differs, the scores by subset, and the unscored questions."""
    from vlm_unlearn.benchmarks import get_benchmark
    from vlm_unlearn.evaluation.benchmarks import headline_rate, mean_score

    benchmark = get_benchmark(name)
    headline, mean = headline_rate(scores), mean_score(scores)
    subsets = sorted({subset for question in scores.questions for subset in question.subsets})
    rates = {subset: mean_score(scores, subset) for subset in subsets}
    unparsed = sum(question.unparsed for question in scores.questions)
    if as_json:
        document = {
            "benchmark": name,
            "official": official,
            "score": mean.value,
            "low": mean.low,
            "high": mean.high,
            "n": mean.n,
            "headline": headline.model_dump(),
            "missing": scores.missing,
            "unparsed": unparsed,
            **scores.extra_metrics,
            "parts": {subset: rate.model_dump() for subset, rate in rates.items()},
        }
        print_json({**document, **files})
        return
    if mean.value is None:
        typer.echo(f"{name}: nothing to score; {scores.missing:,} questions have no answer")
        return
    if scores.ratio_terms:
        typer.echo(f"{name}: {benchmark.headline_name} {_percent(headline)}, n = {headline.n:,}")
    mean_name = f"  {benchmark.mean_name}" if scores.ratio_terms else name
    typer.echo(f"{mean_name}: {_percent(mean)}, n = {mean.n:,}")
    for subset, rate in rates.items():
        typer.echo(f"  {subset}: {100 * (rate.value or 0):.2f} %, n = {rate.n:,}")
    for key, value in scores.extra_metrics.items():
        typer.echo(f"  {key}: {value:.2f}" if key in benchmark.point_metrics else f"  {key}: {100 * value:.2f} %")
    if scores.missing or unparsed:
        typer.echo(f"  without an answer {scores.missing:,} (not scored), unparsed {unparsed:,} (scored as wrong)")


def _percent(rate: Rate) -> str:
    if rate.value is None or rate.low is None or rate.high is None:
        return "–"
    return f"{100 * rate.value:.2f} % [{100 * rate.low:.2f}, {100 * rate.high:.2f}]"
