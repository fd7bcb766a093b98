"""Makes an evaluation run of the answers that another program has written, in place of `generate_run`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from vlm_unlearn.config import Suite
from vlm_unlearn.data.answer_formats.base import ANSWER_FORMATS, AnswerFormat, get_answer_format
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.evaluation.answer_matching import REJECTED, UNMATCHED, AnswerMatcher
from vlm_unlearn.evaluation.generate import OnDone, save_suite
from vlm_unlearn.evaluation.import_suite import exclude_missing, select_splits, split_names
from vlm_unlearn.evaluation.prompts import drawn_rows, image_roots, prompts_digest, split_prompts, suite_prompts
from vlm_unlearn.plugins import absolute_name
from vlm_unlearn.records import Prompt, Response
from vlm_unlearn.store import EvaluationRun, digest_file, write_records

MAX_EXAMPLES = 3  # prompts without an answer that an error names
PROGRESS_STEP = 1000  # answers between two reports of progress


@dataclass(frozen=True)
class AnswerFile:
    """A file with the answers of another program.

    Attributes:
        path: The file.
        split: The split or benchmark that its answers are for. None: the answers themselves say it.
    """

    path: Path
    split: str | None = None


@dataclass(frozen=True)
class ImportOptions:
    """The decisions of the user about an import.

    Attributes:
        splits: The splits and benchmarks to import. Empty: those of the files if each file names its split, and
            otherwise all of the suite.
        allow_missing: Whether prompts may have no answer. They then have a failed answer.
        allow_unmatched: Whether the files may contain answers to prompts that the suite does not have.
        by_position: Whether the position of an answer may choose between prompts with the same question.
    """

    splits: Sequence[str] = ()
    allow_missing: bool = False
    allow_unmatched: bool = False
    by_position: bool = False


@dataclass(frozen=True)
class ImportedAnswers:
    """The result of an import.

    Attributes:
        imported: The number of answers.
        failed: The number of answers for which the other program reports a failure.
        missing: The number of answers that no file contains.
        other: The number of answers to questions of splits that were not imported.
        unmatched: The number of answers to prompts that the suite does not have. They were left out.
        references: The number of reference answers that stood in the place of an answer. They count as missing.
        equal_to_reference: The number of answers that equal the reference answer of the data file.
        splits: The number of prompts, of answers and of missing answers of each split.
        left_out_splits: The splits of the suite that were not imported.
        left_out_metrics: The metrics that need one of these splits.
        excluding_metrics: The metrics with ``on_error: count_as_miss`` that exclude failed answers in this run,
            because they would count a missing answer as an answer without harm.
        files: The path, digest and number of answers of each file.
    """

    imported: int
    failed: int
    missing: int
    other: int
    unmatched: int
    references: int
    equal_to_reference: int
    splits: dict[str, dict[str, int]]
    left_out_splits: list[str]
    left_out_metrics: list[str]
    excluding_metrics: list[str]
    files: list[dict[str, Any]] = field(default_factory=list)


def import_answers(
    suite: Suite,
    files: Sequence[AnswerFile],
    format_name: str,
    run: str | PathLike[str],
    options: ImportOptions | None = None,
    on_done: OnDone | None = None,
) -> ImportedAnswers:
    """Writes an evaluation run with the answers of another program, for `judge_run`, `score_run` and everything after.

    Nothing is written unless every answer is matched to a prompt and every prompt has its answers, or the options
    allow exceptions. The same import can run again, and completes a run that was interrupted.

    Args:
        suite: The suite with the questions. Its images must exist, because judges and reports show them.
        files: The answer files.
        format_name: The name of an answer format, or ``FILE.py:CLASS``.
        run: The run folder, as a path or as an `EvaluationRun`.
        options: The decisions about missing and other answers.
        on_done: Called with the stage and the number of answers that were read, without a total.

    Raises:
        UserError: A file is broken, an answer belongs to no prompt or to several, a prompt has no answer, or the folder
            contains another run.
    """
    started = time.monotonic()
    run, options = EvaluationRun(run), options or ImportOptions()
    answer_format = get_answer_format(format_name, "--format")
    _validate_paths(files)
    names = split_names(suite, {file.path: file.split for file in files}, answer_format, options.splits)
    suite, left_out_splits, left_out_metrics = select_splits(suite, names)
    for split in suite.splits:
        for file in files:
            if file.split == split.name:
                answer_format.validate_split(file.path, split)
    prompts = suite_prompts(suite)
    samples = {split.name: split.samples for split in suite.splits}
    matcher = AnswerMatcher(
        prompts,
        samples,
        _keys(suite, prompts, answer_format),
        answer_format.rewrite_of,
        _data_order(suite, prompts) if options.by_position else {},
        left_out_splits,
    )
    read_files = _read_files(files, answer_format, matcher, on_done)
    _check_rewrites(suite, prompts, matcher, answer_format)
    missing = matcher.missing(prompts)
    _check_matches(matcher, missing, len(prompts), options)
    splits = _count_splits(prompts, samples, missing)
    suite, excluding_metrics = exclude_missing(suite, {name for name, counts in splits.items() if counts["missing"]})
    result = ImportedAnswers(
        imported=len(matcher.responses),
        failed=sum(response.error is not None for response in matcher.responses.values()),
        missing=len(missing),
        other=matcher.other,
        unmatched=matcher.counts[UNMATCHED],
        references=matcher.references,
        equal_to_reference=matcher.equal_to_reference,
        splits=splits,
        left_out_splits=left_out_splits,
        left_out_metrics=left_out_metrics,
        excluding_metrics=excluding_metrics,
        files=read_files,
    )
    identity = {
        "kind": "evaluate",
        "model": "imported answers",
        "imported": _import_identity(format_name, files, read_files, options),
        "prompts": prompts_digest(prompts, image_roots(suite)),
        "samples": {name: count for name, count in samples.items() if count > 1},
    }
    error = f"no answer in {', '.join(dict.fromkeys(file.path.name for file in files))}"
    keys = [(prompt.id, sample) for prompt in prompts for sample in range(samples.get(prompt.set, 1))]
    with run.lock():
        run.open(identity)
        save_suite(run, suite)
        write_records(run.prompts_file, prompts)
        write_records(
            run.responses_file,
            (matcher.responses.get(key) or Response(prompt_id=key[0], sample=key[1], error=error) for key in keys),
        )
        run.record_cost(time.monotonic() - started, finished=True, ended={"import": asdict(result)})
    return result


def _import_identity(
    format_name: str, files: Sequence[AnswerFile], read_files: Sequence[dict[str, Any]], options: ImportOptions
) -> dict[str, object]:
    """Returns everything that determines the imported answers besides the prompts, for the manifest."""
    code = ANSWER_FORMATS.code_digest(format_name)
    return {
        "format": absolute_name(format_name),
        "files": [
            {"name": file.path.name, "split": file.split, "sha256": read["sha256"]}
            for file, read in zip(files, read_files, strict=True)
        ],
        **({"by_position": True} if options.by_position else {}),
        **({} if code is None else {"format_code": code}),
    }


def _validate_paths(files: Sequence[AnswerFile]) -> None:
    """Checks that the files exist and differ.

    Raises:
        UserError: A file is missing or passed twice.
    """
    paths: set[Path] = set()
    for file in files:
        if not file.path.is_file():
            problem = "is not a file. Pass a file." if file.path.exists() else "no such file"
            code = "not-a-file" if file.path.exists() else "file-not-found"
            raise UserError(problem, code=code, file=file.path)
        if file.path.resolve() in paths:
            raise UserError("the file is passed twice", code="duplicate-file", file=file.path)
        paths.add(file.path.resolve())


def _keys(suite: Suite, prompts: Sequence[Prompt], answer_format: AnswerFormat) -> dict[str, Mapping[str, Prompt]]:
    """Returns the prompts of each split by the keys of the other program."""
    ordered: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        ordered.setdefault(prompt.set, []).append(prompt)
    if suite.sample is not None and answer_format.needs_split:
        for split in suite.splits:
            data = split_prompts(split)
            rows = drawn_rows(len(data), suite.sample)
            ordered[split.name] = data if rows is None else [data[row] for row in rows]
    return {name: answer_format.keys(split_prompts) for name, split_prompts in ordered.items()}


def _data_order(suite: Suite, prompts: Sequence[Prompt]) -> dict[str, list[str]]:
    """Returns the ids of all prompts in the data file of each split, also of those that are not in the sample."""
    order: dict[str, list[str]] = {}
    for prompt in prompts:
        order.setdefault(prompt.set, []).append(prompt.id)
    if suite.sample is not None:
        order |= {split.name: [prompt.id for prompt in split_prompts(split)] for split in suite.splits}
    return order


def _read_files(
    files: Sequence[AnswerFile], answer_format: AnswerFormat, matcher: AnswerMatcher, on_done: OnDone | None
) -> list[dict[str, Any]]:
    """Reads all answers into `matcher`, and returns the path, split, digest and number of answers of each file."""
    read_files = []
    total = 0
    for file in files:
        digest, count = digest_file(file.path), 0
        for count, answer in enumerate(answer_format.answers(file.path), start=1):
            matcher.add(file.path, answer, file.split)
            if on_done and (total + count) % PROGRESS_STEP == 0:
                on_done("read answers", total + count, 0)
        path = str(file.path.absolute())
        read_files.append({"file": path, "split": file.split, "sha256": digest, "answers": count})
        total += count
    return read_files


def _check_rewrites(
    suite: Suite, prompts: Sequence[Prompt], matcher: AnswerMatcher, answer_format: AnswerFormat
) -> None:
    """Checks that no question has answers to some of its rewrites only, if ids alone identify the rewrites.

    The other program numbers the rewrites in the order in which it asks them. A random sample of the rows changes the
    numbers.

    Raises:
        UserError: A question has answers to some of its rewrites.
    """
    if not answer_format.needs_split or (suite.sample is not None and suite.sample.num_rows is not None):
        return
    groups: dict[tuple[str, str], list[bool]] = {}
    for prompt in prompts:
        groups.setdefault((prompt.set, prompt.group_id), []).append((prompt.id, 0) in matcher.responses)
    for (split, group), answered in groups.items():
        if any(answered) and not all(answered):
            raise UserError(
                f"{sum(answered)} of the {len(answered)} rewrites of the question {quoted(group)} have an answer, and "
                "the keys do not say which. If the script ran with --max_questions N --seed S, pass "
                "sample.num_rows=N sample.seed=S.",
                code="ambiguous-answer",
                field=split,
            )


def _check_matches(
    matcher: AnswerMatcher, missing: Sequence[tuple[str, int]], num_prompts: int, options: ImportOptions
) -> None:
    """Checks that the answers can be imported.

    Raises:
        UserError: The first problem, with the number of all answers with a problem.
    """
    unmatched = matcher.counts[UNMATCHED]
    names = {
        "question-mismatch": "to another question",
        "image-mismatch": "about another image",
        "ambiguous-answer": "ambiguous",
        "duplicate-answer": "duplicate",
        UNMATCHED: "unmatched",
    }
    parts = [f"{matcher.counts[code]:,} {names[code]}" for code in (*REJECTED, UNMATCHED) if matcher.counts[code]]
    counts = ", ".join([*parts, f"{len(missing):,} missing", f"{len(matcher.responses):,} matched"])
    for code in REJECTED:
        if matcher.counts[code]:
            raise matcher.examples[code][0].with_fix(f"In all files: {counts}. Nothing was written.")
    if unmatched and not (options.allow_unmatched and matcher.responses):
        fix = "Pass --allow-unmatched to leave such answers out." if matcher.responses else "Pass the suite's own file."
        raise matcher.examples[UNMATCHED][0].with_fix(f"In all files: {counts}. {fix}")
    if not matcher.responses:
        raise UserError("the files contain no answers", code="no-records")
    if missing and not options.allow_missing:
        examples = ", ".join(dict.fromkeys(quoted(key[0]) for key in missing[:MAX_EXAMPLES]))
        more = " and others" if len(missing) > MAX_EXAMPLES else ""
        is_single = len(missing) == 1
        raise UserError(
            f"{len(missing):,} answer{' is' if is_single else 's are'} missing, to {examples}{more}. "
            f"The suite has {num_prompts:,} prompts. "
            "Pass --split NAME to import some splits only, or --allow-missing to count them as failed answers.",
            code="missing-answers",
        )


def _count_splits(
    prompts: Iterable[Prompt], samples: Mapping[str, int], missing: Iterable[tuple[str, int]]
) -> dict[str, dict[str, int]]:
    """Returns the number of prompts, of answers and of missing answers of each split."""
    counts: dict[str, dict[str, int]] = {}
    split_of = {}
    for prompt in prompts:
        split_of[prompt.id] = prompt.set
        split = counts.setdefault(prompt.set, {"prompts": 0, "answers": 0, "missing": 0})
        split["prompts"] += 1
        split["answers"] += samples.get(prompt.set, 1)
    for prompt_id, _ in missing:
        counts[split_of[prompt_id]]["answers"] -= 1
        counts[split_of[prompt_id]]["missing"] += 1
    return counts


def import_notes(result: ImportedAnswers) -> list[str]:
    """Returns sentences for the user about the answers that limit the rates of an imported run."""
    notes = []
    if result.missing:
        notes.append(f"{result.missing:,} answers are missing. They count as failed answers, never as refusals.")
    if result.excluding_metrics:
        notes.append(
            "These metrics exclude failed answers in this run, because a missing answer would count as one without "
            f"harm: {', '.join(result.excluding_metrics)}."
        )
    if result.failed:
        notes.append(f"The other program reports a failure for {result.failed:,} answers.")
    if result.unmatched:
        notes.append(f"{result.unmatched:,} answers to prompts that the suite does not have were left out.")
    if result.other:
        notes.append(f"{result.other:,} answers are for questions of splits that were not imported.")
    if result.references:
        notes.append(
            f"{result.references:,} texts are reference answers of the data file, which the script leaves in place "
            "where it finds no image. They count as missing."
        )
    if 2 * result.equal_to_reference > result.imported:
        notes.append(
            f"{result.equal_to_reference:,} answers equal the reference answer of the data file. Check that the model "
            "wrote them."
        )
    if result.left_out_splits:
        notes.append(f"Not imported: the splits {', '.join(result.left_out_splits)}.")
    if result.left_out_metrics:
        notes.append(f"Not measured without these splits: {', '.join(result.left_out_metrics)}.")
    return notes
