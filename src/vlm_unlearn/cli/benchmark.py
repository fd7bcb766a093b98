"""``vlm-unlearn benchmark``."""

from __future__ import annotations

from pathlib import Path

import typer

from vlm_unlearn.cli.common import JSON_OPTION, print_json

benchmark_app = typer.Typer(help="Utility benchmarks, from their official files.", no_args_is_help=True, rich_markup_mode=None)


@benchmark_app.callback()
def root() -> None:
    """Utility benchmarks, from their official files."""


@benchmark_app.command("list")
def list_benchmarks(as_json: bool = JSON_OPTION) -> None:
    """Lists the benchmarks and the official files that each wants.

    Example:

      vlm-unlearn benchmark list
    """
    from vlm_unlearn.benchmarks import BENCHMARKS

    if as_json:
        print_json([{"name": name, "annotations": benchmark.source} for name, benchmark in sorted(BENCHMARKS.items())])
        return
    for name, benchmark in sorted(BENCHMARKS.items()):
        typer.echo(f"{name:<12}{benchmark.source}")


@benchmark_app.command("score")
def score(
    name: str = typer.Argument(..., metavar="NAME", help="A benchmark; `benchmark list` names them."),
    predictions: Path = typer.Option(..., "--predictions", help='JSON lines {"question_id": ..., "text": ...}.'),
    annotations: Path = typer.Option(..., "--annotations", help="The benchmark's official annotation file."),
    questions: Path = typer.Option(None, "--questions", help="Its second official file, where it has one (ScienceQA's pid_splits.json)."),
    official: bool = typer.Option(False, "--official", help="Count exactly as the published evaluator, its quirks included."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Scores a file of answers against a benchmark's official annotations.

    Example:

      vlm-unlearn benchmark score vqav2 --predictions answers.jsonl --annotations v2_mscoco_val2014_annotations.json
    """
    from vlm_unlearn.benchmarks import score as score_file
    from vlm_unlearn.benchmarks.base import find
    from vlm_unlearn.metrics.rates import rate

    benchmark = find(name)
    found = score_file(benchmark, predictions, annotations, questions, official)
    share = rate([one.value for one in found.questions], [one.cluster for one in found.questions], found.missing)
    parts = {
        part: rate([one.value for one in found.questions if one.part == part], [one.cluster for one in found.questions if one.part == part])
        for part in sorted({one.part for one in found.questions if one.part})
    }
    unparsed = sum(one.unparsed for one in found.questions)
    if as_json:
        counted = {"benchmark": name, "official": official, "score": share.value, "low": share.low, "high": share.high, "n": share.n}
        told = {"missing": found.missing, "unparsed": unparsed, **found.numbers}
        print_json({**counted, **told, "parts": {part: part_rate.model_dump() for part, part_rate in parts.items()}})
        return
    if share.value is None or share.low is None or share.high is None:
        typer.echo(f"{name}: nothing to score; {found.missing:,} questions have no answer")
        return
    typer.echo(f"{name}: {100 * share.value:.2f} % [{100 * share.low:.2f}, {100 * share.high:.2f}], n = {share.n:,}")
    for part, part_rate in parts.items():
        typer.echo(f"  {part}: {100 * (part_rate.value or 0):.2f} %, n = {part_rate.n:,}")
    for key, value in found.numbers.items():
        typer.echo(f"  {key}: {100 * value:.2f} %")
    if found.missing or unparsed:
        typer.echo(f"  without an answer {found.missing:,} (in no score), unparsed {unparsed:,} (wrong)")
