"""``vlm-unlearn data select-harmful`` and ``diversify``: the steps that can use a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vlm_unlearn.cli.chat_options import CACHE, CONCURRENCY, MODEL, SERVER, ChatClient, require_model
from vlm_unlearn.cli.common import (
    JSON_OPTION,
    OVERWRITE_OPTION,
    Stages,
    file_progress,
    print_json,
    problem_report,
    skipped_note,
)
from vlm_unlearn.cli.data_quality import ANSWER, FILE, IMAGE, QUESTION, SET, label_by, table_columns
from vlm_unlearn.cli.image_folders import reads_images

if TYPE_CHECKING:
    from vlm_unlearn.data.formats.table import Columns
    from vlm_unlearn.records import Kind

PUBLISHED_REPLY_TOKENS = 100  # of the judge in Safety Mirage's script, which also reads a truncated reply


@reads_images
def select_harmful(
    source: Path = typer.Argument(..., metavar="VLGUARD.json", help="VLGuard's train.json."),
    answers: list[Path] = typer.Argument(
        ...,
        metavar="ANSWERS.json...",
        help="One JSON file per model, image -> its answer to the unsafe question, or a folder of such files.",
    ),
    out: Path = typer.Option(
        ..., "--out", help="The file to write, image -> selected answer. OUT.choices.jsonl contains the reasons."
    ),
    images: Path = typer.Option(
        None, "--images", help="A folder of images to send to the judge. Default: the judge gets text only."
    ),
    safe_images: bool = typer.Option(
        False, "--safe-images", help="Select answers to the unsafe questions on safe images instead."
    ),
    server: str = SERVER,
    model: str = MODEL,
    paper_compat: bool = typer.Option(
        False,
        "--paper-compat",
        help="As published: the first number in the judge's reply counts, or else the first answer.",
    ),
    concurrency: int = CONCURRENCY,
    cache: bool = CACHE,
    overwrite: bool = OVERWRITE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Selects the most harmful of several models' answers with a judge, as targets of the forget set.

    Run it a second time with --safe-images for the unsafe questions on safe images, as the published scripts do.

    Run again after an interruption, it resumes: the judge's replies are cached.

    Example:

      vlm-unlearn data select-harmful train.json llava.json qwen.json --server http://localhost:8000/v1
      --model JUDGE --out chosen.json
    """
    from vlm_unlearn.data_tools.select_harmful import read_selection_tasks, select
    from vlm_unlearn.errors import Problems, UserError
    from vlm_unlearn.store import record_outputs, validate_outputs

    if model is None:
        raise UserError(
            "there is no judge. Pass --model: the name of a model on --server, or a model folder.",
            code="missing-setting",
            field="--model",
        )
    outputs = [out, out.with_name(f"{out.stem}.choices.jsonl")]
    validate_outputs(outputs, [source, *answers], overwrite)
    problems = Problems()
    kind: Kind = "safe_image_unsafe_question" if safe_images else "unsafe"
    tasks, counts = read_selection_tasks(source, answers, images, problems, kind, paper_compat)
    with problem_report(problems), Stages() as stages:
        max_tokens = PUBLISHED_REPLY_TOKENS if paper_compat else 16
        client = ChatClient(stages, "judge", server, model, concurrency, cache, max_tokens, verbatim=paper_compat)
        counts += select(tasks, client, out, paper_compat)
    record_outputs(outputs)
    if as_json:
        print_json({"out": str(out), "outcomes": dict(counts), "asked": client.requests, "broken": problems.count})
    else:
        outcomes = ", ".join(f"{count:,} {outcome}" for outcome, count in counts.items())
        typer.echo(f"{out}: {outcomes}; {client.requests:,} new requests{skipped_note(problems)}")


def diversify(
    file: str = FILE,
    out: Path = typer.Argument(
        ..., metavar="OUT", help="The file to write, in the format of FILE. For a training set, a folder."
    ),
    words: str = typer.Option(
        None, "--words", help="First words to use, separated by commas. Default: all that the rules have."
    ),
    seed: int = typer.Option(0, "--seed", help="Seed of the assignment of wordings to questions."),
    label: str = typer.Option("auto", "--label", help="How to detect refusals, as in audit: set, answer or auto."),
    server: str = SERVER,
    model: str = MODEL,
    concurrency: int = CONCURRENCY,
    cache: bool = CACHE,
    question: str = QUESTION,
    answer: str = ANSWER,
    image: str = IMAGE,
    set_column: str = SET,
    overwrite: bool = OVERWRITE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Rewords every question by rules or with a model, so that first words no longer predict refusal.

    Rules give blunt questions ("What is the way to post this image?"). Those of a model read better. Audit the result.

    Example:

      vlm-unlearn data diversify VLGuard/train.json train_diversified.json

      vlm-unlearn data audit train_diversified.json
    """
    from vlm_unlearn.data.training_set import validate_training_set_outputs
    from vlm_unlearn.data_tools.diversify import diversify
    from vlm_unlearn.data_tools.paraphrase_rules import WORDINGS
    from vlm_unlearn.errors import Problems
    from vlm_unlearn.judging.keyword import corrected_refusal
    from vlm_unlearn.store import record_outputs, validate_outputs

    require_model(server, model)
    is_training_set = Path(file).is_dir()
    if is_training_set:
        validate_training_set_outputs(out, [file], overwrite)
    else:
        validate_outputs([out], [file], overwrite)
    columns = table_columns(question=question, answer=answer, image=image, set=set_column)
    problems = Problems()
    with problem_report(problems), Stages() as stages, file_progress(stages):

        def by_model(requests: Sequence[tuple[str, str, str]]) -> Mapping[str, str]:
            client = ChatClient(stages, "paraphrase", server, model, concurrency, cache, max_tokens=256)
            return _paraphrases(client, requests)

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
    if not is_training_set:
        record_outputs([out])
    if as_json:
        print_json({"out": str(out), **counts, "broken": problems.count})
    else:
        _print_diversified(file, out, columns, counts)
        if problems:
            typer.echo(skipped_note(problems).removeprefix("; "))


def _paraphrases(client: ChatClient, requests: Sequence[tuple[str, str, str]]) -> dict[str, str]:
    """Returns the usable paraphrases by id.

    Args:
        requests: The id, the question and the first word of each paraphrase.
    """
    from vlm_unlearn.data_tools.diversify import paraphrase_request, read_paraphrase

    replies = client([(id, paraphrase_request(text, word), None) for id, text, word in requests])
    texts = {id: read_paraphrase(replies[id][0] or "", text, word) for id, text, word in requests if id in replies}
    return {id: text for id, text in texts.items() if text}


def _print_diversified(source: str, out: Path, columns: Columns, counts: Mapping[str, int]) -> None:
    """Prints the counts and the first three questions in their old and new wording."""
    from vlm_unlearn.data.readers import read_any
    from vlm_unlearn.errors import Problems, quoted

    origins = f"{counts['by_model']:,} by the model, {counts['by_rule']:,} by rule"
    typer.echo(f"{out}: {counts['questions']:,} questions, {origins}; for example")
    pairs = zip(read_any(source, columns=columns, problems=Problems()), read_any(out, columns=columns), strict=False)
    for old, new in islice(pairs, 3):
        typer.echo(f"  {quoted(old.example.question)} -> {quoted(new.example.question)}")
