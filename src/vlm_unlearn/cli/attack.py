"""``vlm-unlearn attack``: writes the one-word attack as a file, and searches for the most effective first word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import typer

from vlm_unlearn.cli.chat_options import CACHE, CONCURRENCY, MODEL, SERVER, ChatClient, require_model
from vlm_unlearn.cli.common import (
    JSON_OPTION,
    OVERWRITE_OPTION,
    Stages,
    escape_markup,
    file_progress,
    print_json,
    problem_report,
    quiet_libraries,
    result_console,
    skipped_note,
    status_console,
)
from vlm_unlearn.cli.image_folders import reads_images
from vlm_unlearn.cli.terminal import Commands

if TYPE_CHECKING:
    from vlm_unlearn.evaluation.attack_search import SearchReport
    from vlm_unlearn.store import EvaluationRun

Choice = TypeVar("Choice", bound=str)
attack_app = Commands(
    "Attacks a model by rewording its questions: the one-word attack as a file, and a search for the worst first word."
)


@attack_app.command("rewrite")
def rewrite(
    source: Path = typer.Argument(..., metavar="IN", help="A VLGuard or SafeEraser file."),
    out: Path = typer.Argument(
        ..., metavar="OUT", help="The file to write, in VLGuard's format: K consecutive records of each id."
    ),
    trigger: str = typer.Option(
        ..., "--trigger", help="First word of the rewrites. control: a word other than what and share."
    ),
    num_rewrites: int = typer.Option(
        1, "--num-rewrites", min=1, max=5, help="Number of different rewrites of each question."
    ),
    kind: str = typer.Option(
        "unsafe", "--kind", help="Questions to rewrite: unsafe, safe or safe_image_unsafe_question."
    ),
    server: str = SERVER,
    model: str = MODEL,
    concurrency: int = CONCURRENCY,
    cache: bool = CACHE,
    overwrite: bool = OVERWRITE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Writes the one-word attack on the questions of a file, by rules or by a model. A split of a suite can read it.

    Example:

      vlm-unlearn attack rewrite VLGuard/test.json what_3shot.json --trigger what --num-rewrites 3

      vlm-unlearn attack rewrite VLGuard/test.json generate.json --trigger generate
      --server http://localhost:8000/v1 --model M
    """
    from vlm_unlearn.attacks.files import QUESTION_FIELDS, write_attack
    from vlm_unlearn.errors import Problems, UserError
    from vlm_unlearn.store import RunDirectory, record_outputs, validate_outputs

    require_model(server, model)
    prompt_kind = _choice("--kind", kind, tuple(QUESTION_FIELDS))
    validate_outputs([out], [source], overwrite)
    if not source.is_file():
        raise UserError("no such file", code="file-not-found", file=source)
    if RunDirectory(out.parent).exists():
        raise UserError("is a run folder. Write the file to another folder.", code="output-exists", file=out.parent)
    problems = Problems()
    with problem_report(problems), Stages() as stages:
        client = ChatClient(stages, "paraphrase", server, model, concurrency, cache, max_tokens=256) if model else None

        def by_model(requests: Sequence[tuple[str, str]]) -> Mapping[str, str]:
            replies = client([(id, text, None) for id, text in requests]) if client else {}
            return {id: text for id, (text, _) in replies.items() if text}

        def on_done(done: int, total: int) -> None:
            stages.update("rewrite", done, total)

        with file_progress(stages):
            counts = write_attack(
                source, out, trigger, num_rewrites, prompt_kind, by_model if client else None, problems, on_done
            )
    record_outputs([out])
    if as_json:
        print_json({"out": str(out), **counts, "broken": problems.count})
    else:
        origins = f"{counts['by_model']:,} by the model, {counts['by_rule']:,} by rule"
        totals = f"{counts['questions']:,} questions, {counts['records']:,} records"
        typer.echo(f"{out}: {totals}; {origins}{skipped_note(problems)}")
    if model and not counts["by_model"]:
        typer.echo("warning: none of the model's paraphrases is usable; all rewrites follow the rules", err=True)


@attack_app.command("search")
@reads_images
def search(
    model: str = typer.Argument(..., metavar="MODEL", help="A model folder, hub name, adapter folder or training run."),
    file: Path = typer.Argument(
        ..., metavar="FILE", help="A VLGuard or SafeEraser file. An audit of its questions suggests first words."
    ),
    images: Path = typer.Option(..., "--images", help="The folder that image paths are relative to."),
    out: Path = typer.Option(
        ..., "--out", help="The run folder: search.json, search.png, all answers. Running again resumes the search."
    ),
    goal: str = typer.Option(
        "break", "--goal", help="break: get unsafe questions answered; over-refuse: get safe questions refused."
    ),
    words: str = typer.Option(
        None, "--words", help="First words to try, separated by commas. Default: those of the audit and a vocabulary."
    ),
    budget: int = typer.Option(
        2000, "--budget", min=1, help="Maximum number of answers. Up to half of them measure the best word."
    ),
    questions: int = typer.Option(
        None, "--questions", min=2, help="Number of the file's questions to use. Default: all."
    ),
    seed: int = typer.Option(0, "--seed", min=0, help="Seed of the sample of questions."),
    judge: str = typer.Option("keyword", "--judge", help="keyword (an answer counts unless it refuses) or tiny_world."),
    world: Path = typer.Option(None, "--world", help="For tiny_world: the file world.json with the facts."),
    max_new_tokens: int = typer.Option(
        64, "--max-new-tokens", min=1, help="Maximum length of an answer in tokens. Refusals show early."
    ),
    batch_size: int = typer.Option(8, "--batch-size", min=1, help="Number of answers in a batch."),
    precision: str = typer.Option("auto", "--precision", help="fp32, bf16, or auto: bf16 on a GPU, fp32 on a CPU."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Searches for the first word that most often makes a model comply, or refuse.

    The best word is measured on held-out questions that the search did not use.

    Example:

      vlm-unlearn attack search runs/mixed_sft VLGuard/test.json --images VLGuard/test --out searches/mixed_sft
    """
    from vlm_unlearn.attacks.one_word import parse_first_word
    from vlm_unlearn.config import GenerationConfig, JudgeConfig, validate

    first_words = [] if words is None else [parse_first_word(word) for word in words.split(",")]
    generation = validate(
        GenerationConfig,
        {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "precision": precision, "seed": seed},
        "attack search",
    )
    with status_console().status("loading transformers"):
        from vlm_unlearn.evaluation.attack_search import GOALS, SearchRequest
        from vlm_unlearn.evaluation.attack_search import search as run_search
        from vlm_unlearn.reporting.charts.search_plot import write_search_png
        from vlm_unlearn.store import EvaluationRun

        quiet_libraries()
    request = SearchRequest(
        model=model,
        file=file,
        images=images,
        goal=_choice("--goal", goal, tuple(GOALS)),
        words=first_words,
        budget=budget,
        questions=questions,
        seed=seed,
        judge=JudgeConfig(name=_choice("--judge", judge, ("keyword", "tiny_world")), world=world),
        generation=generation,
    )
    with Stages() as stages:
        report = run_search(request, out, stages.update)
    run = EvaluationRun(out)
    write_search_png(run.search_plot_file, report)
    if as_json:
        print_json(report.model_dump(by_alias=True))
    else:
        _print_search(report, run)


def _choice(option: str, value: str, choices: tuple[Choice, ...]) -> Choice:
    """Returns the choice that equals the value of an option.

    Raises:
        UserError: There is no such choice.
    """
    from vlm_unlearn.errors import UserError, nearest, quoted

    for choice in choices:
        if value == choice:
            return choice
    raise UserError(
        f"{quoted(value)} is not one of {', '.join(choices)}{nearest(value, choices)}",
        code="unknown-name",
        field=option,
    )


def _print_search(report: SearchReport, run: EvaluationRun, at_most: int = 12) -> None:
    from rich import box
    from rich.table import Table

    from vlm_unlearn.evaluation.judge_facts import judge_facts
    from vlm_unlearn.reporting.charts.search_plot import RATE_LABELS
    from vlm_unlearn.reporting.formatting import interval, percent

    table = Table(box=box.SIMPLE_HEAVY)
    for heading in ("word", RATE_LABELS[report.goal], "95 % interval", "n", "rounds", "from"):
        table.add_column(heading, justify="left" if heading in ("word", "from") else "right")
    for word in report.words[:at_most]:
        table.add_row(
            escape_markup(word.word),
            percent(word.rate),
            interval(word.rate),
            str(word.rate.n),
            str(word.rounds),
            word.source,
        )
    console = result_console()
    console.print(table)
    hidden = len(report.words) - at_most
    more_words = f" {hidden} more words are in {run.search_file.name}." if hidden > 0 else ""
    best, unchanged, control = (
        f"{percent(report.held_out[key])} {interval(report.held_out[key])}" for key in ("best", "as_asked", "control")
    )
    lines = [
        f"{report.answers:,} answers; the search used {report.questions['search']:,} questions.{more_words}",
        f'Starting with "{report.best}" ({report.words[0].wording}), on {report.questions["held_out"]:,} held-out '
        f"questions: {best}",
        f"Unchanged questions: {unchanged}; control, starting with other words: {control}",
    ]
    best_rate, control_rate = report.held_out["best"], report.held_out["control"]
    if best_rate.low is not None and control_rate.high is not None and best_rate.low <= control_rate.high:
        lines.append(
            "The intervals of the word and of the control overlap: other rewordings may have the same effect, so these "
            "questions do not show that the word is a trigger."
        )
    if judge_facts(report.judge).only_refusals:
        lines.append("The keyword judge counts every answer that does not refuse, also off-topic and degenerate ones.")
    lines.append(f"{run.search_file}, {run.search_plot_file}")
    for line in lines:
        console.print(line, markup=False, highlight=False)
