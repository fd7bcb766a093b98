"""``vlm-unlearn benchmark``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vlm_unlearn.cli.common import JSON_OPTION, Stages, print_json, quiet_libraries, status_console
from vlm_unlearn.cli.completion import benchmark_names
from vlm_unlearn.cli.evaluate import answer_share
from vlm_unlearn.cli.terminal import Commands
from vlm_unlearn.distributed import is_main_process

if TYPE_CHECKING:
    from vlm_unlearn.benchmarks import BenchmarkScores
    from vlm_unlearn.records import Rate

benchmark_app = Commands("Utility benchmarks, asked and scored from their official files.")
NAME = typer.Argument(
    ..., metavar="NAME", help="A benchmark; `benchmark list` names them.", autocompletion=benchmark_names
)
ANNOTATIONS = typer.Option(
    ..., "--annotations", help="The benchmark's official annotation file; for POPE up to three times."
)
QUESTIONS = typer.Option(None, "--questions", help="Its second official file, where it has one.")
OFFICIAL = typer.Option(False, "--official", help="Count exactly as the published evaluator, its quirks included.")


@benchmark_app.command("list")
def list_benchmarks(as_json: bool = JSON_OPTION) -> None:
    """Lists the benchmarks, the official files that each wants, and where its images are.

    Example:

      vlm-unlearn benchmark list
    """
    from vlm_unlearn.benchmarks import BENCHMARKS

    known = [benchmark for _, benchmark in sorted(BENCHMARKS.items())]
    if as_json:
        print_json(
            [
                {
                    "name": one.name,
                    "annotations": one.annotation_file,
                    "questions": one.question_file,
                    "images": one.image_folder,
                }
                for one in known
            ]
        )
        return
    for one in known:
        typer.echo(f"{one.name}\n  --annotations  {one.annotation_file}")
        if one.question_file:
            typer.echo(f"  --questions    {one.question_file}")
        typer.echo(f"  --images       {one.image_folder}")


@benchmark_app.command("run")
def run(
    name: str = NAME,
    overrides: list[str] = typer.Argument(
        None, metavar="[key=value ...]", help="model=... is needed; generation.batch_size=8 and so on."
    ),
    annotations: list[Path] = ANNOTATIONS,
    questions: Path = QUESTIONS,
    images: Path = typer.Option(Path(), "--images", help="Its image folder."),
    limit: int = typer.Option(
        None, "--limit", min=1, help="Ask only the first so many questions (of each annotation file)."
    ),
    official: bool = OFFICIAL,
    out: Path = typer.Option(..., "--out", help="The run folder."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Asks a model a benchmark's questions and scores the answers. Run again after an interruption it goes on.

    Example:

      vlm-unlearn benchmark run gqa model=runs/npo --annotations testdev_balanced_questions.json --images images --out gqa-npo
    """
    from vlm_unlearn.config import Suite, apply_overrides, validate

    asked = {
        "name": name,
        "annotations": annotations,
        "questions": questions,
        "images": images,
        "limit": limit,
        "official": official,
    }
    suite = validate(Suite, apply_overrides({"benchmarks": [asked]}, overrides or [], Suite), "benchmark run")
    if not is_main_process():
        answer_share(suite, out)
        return
    with status_console().status("loading transformers"):
        from vlm_unlearn.evaluation.benchmarks import run_benchmark

        quiet_libraries()
    with Stages() as bars:
        bars.wait("loading the model")
        done = run_benchmark(suite, out, out.resolve().name, bars.update)
    files = {"predictions": str(done.predictions), "submission": str(done.submission) if done.submission else None}
    if done.scores is not None:
        _show(name, official, done.scores, as_json, files)
    elif as_json:
        print_json({"benchmark": name, "official": official, "score": None, "reason": done.unscored_reason, **files})
    else:
        typer.echo(done.unscored_reason)
    if not as_json:
        typer.echo(
            f"answers in {done.predictions}"
            + (f"; as the official evaluation takes them in {done.submission}" if done.submission else "")
        )


@benchmark_app.command("score")
def score(
    name: str = NAME,
    predictions: Path = typer.Option(
        ..., "--predictions", help='JSON lines {"question_id": ..., "text": ...}; for mmvet a judge\'s verdicts.'
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

    _show(name, official, score_file(get_benchmark(name), predictions, annotations, questions, official), as_json, {})


def _show(name: str, official: bool, found: BenchmarkScores, as_json: bool, files: dict[str, Any]) -> None:
    """Prints scores: the headline, the mean score where that is another number, its parts, and what couldn't be scored."""
    from vlm_unlearn.evaluation.benchmarks import headline_rate, mean_score

    first, share = headline_rate(found), mean_score(found)
    parts = {
        part: mean_score(found, part) for part in sorted({part for one in found.questions for part in one.subsets})
    }
    unparsed = sum(one.unparsed for one in found.questions)
    if as_json:
        counted = {
            "benchmark": name,
            "official": official,
            "score": share.value,
            "low": share.low,
            "high": share.high,
            "n": share.n,
        }
        told = {"headline": first.model_dump(), "missing": found.missing, "unparsed": unparsed, **found.extra_metrics}
        print_json(
            {**counted, **told, "parts": {part: part_rate.model_dump() for part, part_rate in parts.items()}, **files}
        )
        return
    if share.value is None:
        typer.echo(f"{name}: nothing to score; {found.missing:,} questions have no answer")
        return
    if found.ratio_terms:
        typer.echo(f"{name}: F1 {_percent(first)}, n = {first.n:,}")
    typer.echo(f"{'  accuracy' if found.ratio_terms else name}: {_percent(share)}, n = {share.n:,}")
    for part, part_rate in parts.items():
        typer.echo(f"  {part}: {100 * (part_rate.value or 0):.2f} %, n = {part_rate.n:,}")
    for key, value in found.extra_metrics.items():
        typer.echo(f"  {key}: {100 * value:.2f} %")
    if found.missing or unparsed:
        typer.echo(f"  without an answer {found.missing:,} (in no score), unparsed {unparsed:,} (wrong)")


def _percent(rate: Rate) -> str:
    if rate.value is None or rate.low is None or rate.high is None:
        return "–"
    return f"{100 * rate.value:.2f} % [{100 * rate.low:.2f}, {100 * rate.high:.2f}]"
