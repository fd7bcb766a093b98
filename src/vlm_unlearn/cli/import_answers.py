"""``vlm-unlearn import-answers``: makes an evaluation run of the answers of another program."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vlm_unlearn.cli.common import JSON_OPTION, Stages, file_progress, print_json
from vlm_unlearn.cli.completion import suite_names
from vlm_unlearn.cli.evaluate import OUT
from vlm_unlearn.cli.image_folders import reads_images

if TYPE_CHECKING:
    from vlm_unlearn.config import Suite
    from vlm_unlearn.evaluation.import_answers import AnswerFile


def _format_names() -> list[str]:
    from vlm_unlearn.plugins import ANSWER_FORMATS

    return list(ANSWER_FORMATS)


@reads_images
def import_answers(
    arguments: list[str] = typer.Argument(
        ...,
        metavar="[SPLIT=]FILE... [key=value ...]",
        help="Answer files, each with the split that it is for if the answers don't say it. Then dotted overrides of "
        "the suite, such as root=VLGuard.",
    ),
    format_name: str = typer.Option(
        ...,
        "--format",
        help="vlguard_eval, safe_eraser, lmms_eval, vlmevalkit, jsonl, a plug-in, or FILE.py:CLASS.",
        autocompletion=_format_names,
    ),
    suite_file: Path = typer.Option(
        ...,
        "--suite",
        metavar="SUITE.yaml",
        help="The suite with the questions, or the name of a shipped one.",
        autocompletion=suite_names,
    ),
    out: Path = OUT,
    splits: list[str] = typer.Option(
        [], "--split", help="A split to import. May be repeated. Default: all, or those named with the files."
    ),
    allow_missing: bool = typer.Option(
        False, "--allow-missing", help="Accept prompts without an answer. They count as failed answers."
    ),
    allow_unmatched: bool = typer.Option(
        False, "--allow-unmatched", help="Leave out answers to prompts that the suite does not have."
    ),
    by_position: bool = typer.Option(
        False,
        "--by-position",
        help="Where several prompts have the same question, use the position of the answer. Questions are still "
        "compared.",
    ),
    as_json: bool = JSON_OPTION,
) -> None:
    """Makes a run of answers that another program has written, for judge run, score, report, compare and table.

    Every answer is matched to a prompt by its id, or by its question and image. Nothing is written if one does not fit.

    Examples:

      vlm-unlearn import-answers unsafe=results/normal/unsafes/npo.json safe=results/normal/safe_safes/npo.json
      root=VLGuard --format vlguard_eval --suite suites/safety_mirage --out evaluations/npo

      vlm-unlearn import-answers results.json root=dataset --format safe_eraser --suite suites/safe_eraser
      --split generality --split benign_image --split harmless --out evaluations/po_pd
    """
    from vlm_unlearn.evaluation.import_answers import ImportOptions, import_notes
    from vlm_unlearn.evaluation.import_answers import import_answers as import_files
    from vlm_unlearn.store import EvaluationRun

    suite, files = _suite_and_files(suite_file, arguments)
    options = ImportOptions(splits, allow_missing, allow_unmatched, by_position)
    with Stages() as stages, file_progress(stages):
        result = import_files(suite, files, format_name, out, options, stages.update)
    if as_json:
        from dataclasses import asdict

        print_json({"out": str(out), **asdict(result)})
        return
    for note in import_notes(result):
        typer.echo(note, err=True)
    typer.echo(f"{result.imported:,} answers in {EvaluationRun(out).responses_file}")


def _suite_and_files(suite_file: Path, arguments: Sequence[str]) -> tuple[Suite, list[AnswerFile]]:
    """Returns the suite with its overrides, and the answer files.

    An argument ``KEY=VALUE`` with a key of the suite is an override. With the name of a split as KEY it is a file.

    Raises:
        UserError: An argument is neither, or there is no file.
    """
    from vlm_unlearn.config import Suite, load
    from vlm_unlearn.config.loader import read_resolved
    from vlm_unlearn.errors import UserError, nearest, quoted
    from vlm_unlearn.evaluation.import_answers import AnswerFile
    from vlm_unlearn.evaluation.prompts import image_roots
    from vlm_unlearn.store import user_path

    keys = {*Suite.model_fields, *Suite.renamed_keys}
    overrides = [text for text in arguments if "=" in text and text.partition("=")[0].partition(".")[0].strip() in keys]
    rest = [text for text in arguments if text not in overrides]
    has_model = "model" in read_resolved(suite_file) or any(
        text.partition("=")[0].strip() == "model" for text in overrides
    )
    suite = load(Suite, suite_file, overrides, None if has_model else {"model": _default_model(rest)})
    names = list(image_roots(suite))
    files = []
    for text in rest:
        name, equals, path = text.partition("=")
        if equals and name in names:
            files.append(AnswerFile(user_path(path), name))
        elif equals and not user_path(text).exists():
            raise UserError(
                f"{quoted(name)} is neither a split nor a key of the suite{nearest(name, [*names, *keys]) or '.'} "
                f"Splits: {', '.join(names)}.",
                code="unknown-name",
                field=quoted(text)[1:-1],
            )
        else:
            files.append(AnswerFile(user_path(text)))
    if not files:
        raise UserError("there is no answer file. Pass one, or SPLIT=FILE.", code="missing-setting")
    return suite, files


def _default_model(arguments: Sequence[str]) -> str:
    """Returns the name for a model that wrote answers, for an import without ``model=``: the name of the file."""
    return f"answers in {Path(arguments[0].rpartition('=')[2]).name}" if arguments else "imported answers"
