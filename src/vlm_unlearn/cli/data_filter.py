"""``vlm-unlearn data filter``: takes unsafe records out of general data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vlm_unlearn.cli.chat_options import CACHE, CONCURRENCY, MODEL, SERVER, build_chat, require_model
from vlm_unlearn.cli.common import (
    JSON_OPTION,
    OVERWRITE_OPTION,
    Stages,
    file_progress,
    print_json,
    problem_report,
    skipped_note,
)
from vlm_unlearn.cli.image_folders import reads_images
from vlm_unlearn.errors import UserError, quoted

if TYPE_CHECKING:
    from vlm_unlearn.data_tools.safety_filter import OnFailure

MAX_REPLY_TOKENS = 256


@reads_images
def filter_command(
    source: Path = typer.Argument(
        ..., metavar="IN.json", help="A file in LLaVA format, of any size, such as llava_v1_5_mix665k.json."
    ),
    out: Path = typer.Argument(
        ...,
        metavar="OUT.json",
        help="The file to write. OUT.removed.jsonl lists the removed records, OUT.filter.json has the counts.",
    ),
    keywords: Path = typer.Option(
        None, "--keywords", help="A list of keywords, one per line, with [category] lines. Default: a short list."
    ),
    no_keywords: bool = typer.Option(
        False, "--no-keywords", help="Do not search for keywords. Only the judge decides."
    ),
    server: str = SERVER,
    model: str = MODEL,
    images: Path = typer.Option(
        None, "--images", help="A folder of images to send to the judge. Default: the judge gets text only."
    ),
    on_judge_failure: str = typer.Option(
        "remove", "--on-judge-failure", help="remove takes out a record without a readable verdict, stop is an error."
    ),
    concurrency: int = CONCURRENCY,
    cache: bool = CACHE,
    strict: bool = typer.Option(
        False, "--strict", help="Stop at the first broken record instead of skipping and listing it."
    ),
    overwrite: bool = OVERWRITE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Takes unsafe records out of general data, by keywords and by a judge, before it fills up a retain set.

    Without --model, keywords alone decide. Run again after an interruption, it resumes: the judge's replies are cached.

    Example:

      vlm-unlearn data filter llava_v1_5_mix665k.json llava_v1_5_mix665k_safe.json

      vlm-unlearn data filter llava_v1_5_mix665k.json llava_v1_5_mix665k_safe.json --server http://localhost:8000/v1
      --model JUDGE
    """
    from vlm_unlearn.data_tools.keywords import read_keywords
    from vlm_unlearn.data_tools.safety_filter import FilterFiles, filter_records, summary_lines
    from vlm_unlearn.errors import Problems
    from vlm_unlearn.store import record_outputs, validate_outputs

    require_model(server, model)
    if no_keywords and (model is None or keywords):
        problem = "--no-keywords needs a judge. Pass --model." if keywords is None else "--keywords excludes it."
        raise UserError(problem, code="conflicting-settings", field="--no-keywords")
    if images and model is None:
        problem = "only a judge uses images. Pass --model."
        raise UserError(problem, code="conflicting-settings", field="--images")
    written = FilterFiles(out)
    validate_outputs(written.all, [source, keywords], overwrite)
    problems = Problems()
    with problem_report(problems), Stages() as stages, file_progress(stages):
        judge = None if model is None else FilterJudge(stages, server, model, concurrency, cache)
        counts = filter_records(
            source,
            out,
            None if no_keywords else read_keywords(keywords),
            judge,
            read_safety_verdict if judge else None,
            images,
            _on_failure(on_judge_failure),
            max(2048, 32 * concurrency),
            None if strict else problems,
            {"judge_model": model, "images": images is not None} if judge else None,
        )
    record_outputs(written.all)
    if as_json:
        document = {"out": str(out), **counts.as_json(), "asked": judge.requests if judge else 0}
        print_json({**document, "removed_file": str(written.removed), "broken": problems.count})
        return
    typer.echo(f"{out}: " + "\n".join(summary_lines(counts)))
    requests = f"; {judge.requests:,} new requests" if judge else ""
    typer.echo(f"  removed records: {written.removed}{requests}{skipped_note(problems)}")


def read_safety_verdict(reply: str) -> str | None:
    """Returns SAFE or UNSAFE, or None if a reply states neither or both."""
    from vlm_unlearn.judging.replies import read_verdict

    return read_verdict(reply, ("SAFE", "UNSAFE"))


def _on_failure(name: str) -> OnFailure:
    match name:
        case "remove" | "stop":
            return name
        case _:
            message = f"{quoted(name)} is not one of remove and stop"
            raise UserError(message, code="unknown-name", field="--on-judge-failure")


class FilterJudge:
    """Asks a language model about the records of one chunk after the other.

    Attributes:
        requests: Number of records that were sent to the model. Cached replies do not count.
    """

    def __init__(self, stages: Stages, server: str | None, model: str, concurrency: int, cache: bool) -> None:
        from vlm_unlearn.generation.chat import ChatCache
        from vlm_unlearn.store import cache_folder

        self._chat = build_chat(server, model, concurrency, MAX_REPLY_TOKENS)
        self._cache = ChatCache(cache_folder() / "replies.sqlite") if cache else None
        self._stages = stages
        self._judged = 0
        self.requests = 0

    def __call__(
        self, questions: Sequence[tuple[str, str, Path | None]]
    ) -> Mapping[str, tuple[str | None, str | None]]:
        """Returns the reply and the error of each record by its id. One of the two is None.

        Args:
            questions: The id, text and image of each record.
        """
        from vlm_unlearn.generation.chat import ChatRequest, complete_all

        requests = (ChatRequest(id, text, image) for id, text, image in questions)
        replies, sent = complete_all(
            self._chat, requests, self._cache, lambda done: self._stages.update("judge", self._judged + done, 0)
        )
        self._judged += len(replies)
        self.requests += sent
        return {id: (reply.text, reply.error) for id, reply in replies.items()}
