"""``vlm-unlearn data select-harmful`` and ``diversify``: the steps that may ask a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vlm_unlearn.cli.chat_options import CACHE, CONCURRENCY, MODEL, SERVER, Asker
from vlm_unlearn.cli.common import JSON_OPTION, Stages, print_json, reading, showing
from vlm_unlearn.cli.data_quality import ANSWER, FILE, IMAGE, QUESTION, SET, label_by, table_columns

if TYPE_CHECKING:
    from vlm_unlearn.data.formats.table import Columns


def select_harmful(
    source: Path = typer.Argument(..., metavar="VLGUARD.json", help="VLGuard's train.json."),
    answers: list[Path] = typer.Argument(
        ..., metavar="ANSWERS.json...", help="One file a model: JSON, image -> its answer to the unsafe question."
    ),
    out: Path = typer.Option(
        ..., "--out", help="The file to write: image -> chosen answer; OUT.choices.jsonl says how each was chosen."
    ),
    images: Path = typer.Option(None, "--images", help="Show the judge the images below this folder."),
    server: str = SERVER,
    model: str = MODEL,
    paper: bool = typer.Option(
        False, "--paper", help="As published: what can't be read as a choice takes the first answer."
    ),
    concurrency: int = CONCURRENCY,
    cache: bool = CACHE,
    as_json: bool = JSON_OPTION,
) -> None:
    """A judge picks the most harmful of several models' answers: what the forget set is to unlearn.

    Killed or cut off, run it again: the replies that came are cached.

    Example:

      vlm-unlearn data select-harmful train.json llava.json qwen.json --server http://localhost:8000/v1 --model JUDGE --out chosen.json
    """
    from vlm_unlearn.data.select_harmful import read_selection_tasks, select
    from vlm_unlearn.errors import Problems, UserError
    from vlm_unlearn.store import validate_not_overwriting

    if model is None:
        raise UserError("pass --model, the judge: a server's model with --server, else a model folder")
    validate_not_overwriting([out, out.with_name(f"{out.stem}.choices.jsonl")], [source, *answers])
    problems = Problems()
    asked, left_out = read_selection_tasks(source, answers, images, problems)
    with showing(problems), Stages() as stages:
        asker = Asker(stages, "judge", server, model, concurrency, cache, max_tokens=16)
        counts = left_out + select(asked, asker, out, paper)
    if as_json:
        print_json({"out": str(out), "outcomes": dict(counts), "asked": asker.asked, "broken": problems.count})
    else:
        typer.echo(
            f"{out}: "
            + ", ".join(f"{count:,} {outcome}" for outcome, count in counts.items())
            + f"; {asker.asked:,} asked anew"
        )


def diversify(
    file: str = FILE,
    out: Path = typer.Argument(
        ..., metavar="OUT", help="The file to write, in the same format; a folder for a training set."
    ),
    words: str = typer.Option(
        None, "--words", help="First words to use, with commas; default: all that there are rules for."
    ),
    seed: int = typer.Option(0, "--seed", help="Of the deal of wordings."),
    label: str = typer.Option("auto", "--label", help="What tells refusal, as in audit: set, answer, or auto."),
    server: str = SERVER,
    model: str = MODEL,
    concurrency: int = CONCURRENCY,
    cache: bool = CACHE,
    question: str = QUESTION,
    answer: str = ANSWER,
    image: str = IMAGE,
    set_column: str = SET,
    as_json: bool = JSON_OPTION,
) -> None:
    """Asks every question in another wording, so that first words no longer predict refusal; by rules, or by a model.

    Rule-made questions are blunt ("What is the way to post this image?"); a model's read better. Audit the result.

    Example:

      vlm-unlearn data diversify VLGuard/train.json train_diversified.json

      vlm-unlearn data audit train_diversified.json
    """
    from vlm_unlearn.data.diversify import diversify
    from vlm_unlearn.data.paraphrase_rules import WORDINGS
    from vlm_unlearn.errors import Problems, UserError
    from vlm_unlearn.judging.keyword import corrected_refusal
    from vlm_unlearn.store import validate_not_overwriting

    if server and model is None:
        raise UserError("pass --model, the server's model")
    if not Path(file).is_dir():
        validate_not_overwriting([out], [file])
    columns = table_columns(question=question, answer=answer, image=image, set=set_column)
    problems = Problems()
    with showing(problems), Stages() as stages, reading(stages):

        def by_model(asked: Sequence[tuple[str, str, str]]) -> Mapping[str, str]:
            return _paraphrases(Asker(stages, "paraphrase", server, model, concurrency, cache, max_tokens=256), asked)

        counts = diversify(
            file,
            out,
            tuple(WORDINGS) if words is None else [word.strip().lower() for word in words.split(",")],
            seed,
            label_by(label),
            lambda text: corrected_refusal(text) is not None,
            columns,
            by_model if model else None,
            problems,
            lambda done, total: stages.update("rewrite", done, total),
        )
    if as_json:
        print_json({"out": str(out), **counts, "broken": problems.count})
    else:
        _show_diversified(file, out, columns, counts)


def _paraphrases(asker: Asker, asked: Sequence[tuple[str, str, str]]) -> dict[str, str]:
    """(id, question, first word) -> the paraphrases that can be used, by id."""
    from vlm_unlearn.data.diversify import paraphrase_request, read_paraphrase

    replies = asker([(id, paraphrase_request(text, word), None) for id, text, word in asked])
    read = {id: read_paraphrase(replies[id][0] or "", text, word) for id, text, word in asked if id in replies}
    return {id: text for id, text in read.items() if text}


def _show_diversified(before: str, after: Path, columns: Columns, counts: Mapping[str, int]) -> None:
    from vlm_unlearn.data.readers import read_any
    from vlm_unlearn.errors import Problems, quoted

    typer.echo(
        f"{after}: {counts['questions']:,} questions, {counts['by_model']:,} by the model, {counts['by_rule']:,} by rule; for example"
    )
    both = zip(read_any(before, columns=columns, problems=Problems()), read_any(after, columns=columns), strict=False)
    for old, new in islice(both, 3):
        typer.echo(f"  {quoted(old.example.question)} -> {quoted(new.example.question)}")
