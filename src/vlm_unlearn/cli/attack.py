"""``vlm-unlearn attack``: the one-word attack as a file, and the search for the word that does most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import typer

from vlm_unlearn.cli.chat_options import CACHE, CONCURRENCY, MODEL, SERVER, Asker
from vlm_unlearn.cli.common import (
    JSON_OPTION,
    Stages,
    plain,
    print_json,
    quiet_libraries,
    reading,
    result_console,
    showing,
    status_console,
)
from vlm_unlearn.cli.terminal import Commands

if TYPE_CHECKING:
    from vlm_unlearn.evaluation.attack_search import SearchReport

Choice = TypeVar("Choice", bound=str)
attack_app = Commands(
    "Attacks what a model has learned to refuse: the one-word attack as a file, and a search for the worst word."
)


@attack_app.command("rewrite")
def rewrite(
    source: Path = typer.Argument(..., metavar="IN", help="A VLGuard or SafeEraser file."),
    out: Path = typer.Argument(
        ..., metavar="OUT", help="The file to write, in VLGuard's format: K records of one id in a row."
    ),
    trigger: str = typer.Option(..., "--trigger", help="The first word; control: neither what nor share."),
    shots: int = typer.Option(1, "--shots", min=1, max=5, help="Different rewrites of each question."),
    kind: str = typer.Option("unsafe", "--kind", help="Which questions: unsafe, safe, safe_image_unsafe_question."),
    server: str = SERVER,
    model: str = MODEL,
    concurrency: int = CONCURRENCY,
    cache: bool = CACHE,
    as_json: bool = JSON_OPTION,
) -> None:
    """Writes the one-word attack on a file's questions, by rules or by a model, for any suite's case to read.

    Example:

      vlm-unlearn attack rewrite VLGuard/test.json what_3shot.json --trigger what --shots 3

      vlm-unlearn attack rewrite VLGuard/test.json generate.json --trigger generate --server http://localhost:8000/v1 --model M
    """
    from vlm_unlearn.attacks.files import QUESTION_FIELDS, write_attack
    from vlm_unlearn.errors import Problems, UserError
    from vlm_unlearn.store import validate_not_overwriting

    if server and model is None:
        raise UserError("pass --model, the server's model")
    chosen = _one_of("--kind", kind, tuple(QUESTION_FIELDS))
    validate_not_overwriting([out], [source])
    if not source.is_file():
        raise UserError(f"{source}: no such file")
    if (out.parent / "manifest.json").exists():
        raise UserError(f"{out.parent}: is a run; write the file somewhere else")
    problems = Problems()
    with showing(problems), Stages() as stages:
        asker = Asker(stages, "paraphrase", server, model, concurrency, cache, max_tokens=256) if model else None

        def by_model(asked: Sequence[tuple[str, str]]) -> Mapping[str, str]:
            replies = asker([(id, text, None) for id, text in asked]) if asker else {}
            return {id: text for id, (text, _) in replies.items() if text}

        def on_done(done: int, total: int) -> None:
            stages.update("rewrite", done, total)

        with reading(stages):
            counts = write_attack(source, out, trigger, shots, chosen, by_model if asker else None, problems, on_done)
    if as_json:
        print_json({"out": str(out), **counts, "broken": problems.count})
    else:
        made = f"{counts['by_model']:,} by the model, {counts['by_rule']:,} by rule"
        typer.echo(f"{out}: {counts['questions']:,} questions, {counts['records']:,} records; {made}")
    if model and not counts["by_model"]:
        typer.echo("warning: not one of the model's paraphrases could be used; all are made by rule", err=True)


@attack_app.command("search")
def search(
    model: str = typer.Argument(..., metavar="MODEL", help="A model folder, hub name, adapter folder or training run."),
    file: Path = typer.Argument(
        ..., metavar="FILE", help="VLGuard or SafeEraser: the questions, and what an audit finds in them."
    ),
    images: Path = typer.Option(..., "--images", help="The folder that image paths are relative to."),
    out: Path = typer.Option(
        ..., "--out", help="The run folder: search.json, search.png, all answers. Run again, it goes on."
    ),
    goal: str = typer.Option(
        "break", "--goal", help="break: unsafe questions answered; over-refuse: safe questions refused."
    ),
    words: str = typer.Option(
        None, "--words", help="First words to try, with commas; default: the audit's, and a vocabulary."
    ),
    budget: int = typer.Option(
        2000, "--budget", min=1, help="Most answers to ask for; half at most measures the winner."
    ),
    questions: int = typer.Option(
        None, "--questions", min=2, help="Use so many of the file's questions; default: all."
    ),
    seed: int = typer.Option(0, "--seed", min=0, help="Of the draw of questions."),
    judge: str = typer.Option("keyword", "--judge", help="keyword (answered means: not refused) or tiny_world."),
    world: Path = typer.Option(None, "--world", help="For tiny_world: the world's facts, world.json."),
    max_new_tokens: int = typer.Option(64, "--max-new-tokens", min=1, help="Of an answer; a refusal shows early."),
    batch_size: int = typer.Option(8, "--batch-size", min=1, help="Answers made at once."),
    precision: str = typer.Option("auto", "--precision", help="fp32, bf16, or auto: bf16 on a GPU, fp32 on a CPU."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Which first word breaks this model most, or makes it refuse most? Measured anew on questions that the search never saw.

    Example:

      vlm-unlearn attack search runs/mixed_sft VLGuard/test.json --images VLGuard/test --out searches/mixed_sft
    """
    from vlm_unlearn.attacks.one_word import parse_first_word
    from vlm_unlearn.config import GenerationConfig, JudgeConfig, validate

    named = [] if words is None else [parse_first_word(word) for word in words.split(",")]
    generation = validate(
        GenerationConfig,
        {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "precision": precision, "seed": seed},
        "attack search",
    )
    with status_console().status("loading transformers"):
        from vlm_unlearn.evaluation.attack_search import GOALS, SearchRequest
        from vlm_unlearn.evaluation.attack_search import search as run_search
        from vlm_unlearn.reporting.charts.search_plot import write_search_png

        quiet_libraries()
    request = SearchRequest(
        model=model,
        file=file,
        images=images,
        goal=_one_of("--goal", goal, tuple(GOALS)),
        words=named,
        budget=budget,
        questions=questions,
        seed=seed,
        judge=JudgeConfig(name=_one_of("--judge", judge, ("keyword", "tiny_world")), world=world),
        generation=generation,
    )
    with Stages() as stages:
        report = run_search(request, out, stages.update)
    write_search_png(out / "search.png", report)
    if as_json:
        print_json(report.model_dump(by_alias=True))
    else:
        _print_search(report, out)


def _one_of(option: str, value: str, known: tuple[Choice, ...]) -> Choice:
    from vlm_unlearn.errors import UserError, nearest, quoted

    for name in known:
        if value == name:
            return name
    raise UserError(f"{option} {quoted(value)}: use one of {', '.join(known)}{nearest(value, known)}")


def _print_search(report: SearchReport, out: Path, at_most: int = 12) -> None:
    from rich import box
    from rich.table import Table

    from vlm_unlearn.reporting.charts.search_plot import RATE_LABELS
    from vlm_unlearn.reporting.formatting import interval, percent

    table = Table(box=box.SIMPLE_HEAVY)
    for heading in ("word", RATE_LABELS[report.goal], "95 % interval", "n", "rounds", "from"):
        table.add_column(heading, justify="left" if heading in ("word", "from") else "right")
    for word in report.words[:at_most]:
        table.add_row(
            plain(word.word), percent(word.rate), interval(word.rate), str(word.rate.n), str(word.rounds), word.source
        )
    console = result_console()
    console.print(table)
    rest = f" {len(report.words) - at_most} more words are in search.json." if len(report.words) > at_most else ""
    best, asked, control = (
        f"{percent(report.held_out[way])} {interval(report.held_out[way])}" for way in ("best", "as_asked", "control")
    )
    lines = [
        f"{report.answers:,} answers; searched on {report.questions['search']:,} questions.{rest}",
        f'Begun with "{report.best}" ({report.words[0].wording}), on {report.questions["held_out"]:,} other questions: {best}',
        f"the same as asked: {asked}; as control, begun with other words: {control}",
    ]
    first, second = report.held_out["best"], report.held_out["control"]
    if first.low is not None and second.high is not None and first.low <= second.high:
        lines.append(
            "The two intervals overlap: rewording alone does about as much, and the word is no trigger that these questions can show."
        )
    if report.judge.startswith("keyword"):
        lines.append("Judged by keywords: answered means not refused; what is off the topic or broken counts too.")
    lines.append(f"{out / 'search.json'}, {out / 'search.png'}")
    for line in lines:
        console.print(line, markup=False, highlight=False)
