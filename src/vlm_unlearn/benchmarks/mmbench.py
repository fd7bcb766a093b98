"""MMBench (Liu et al. 2023, arXiv 2307.06281), circular: right means right under every order of the options."""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_unlearn.benchmarks.base import Benchmark, BenchmarkQuestion, QuestionScore, register
from vlm_unlearn.benchmarks.official_files import LETTER, answers_not_public
from vlm_unlearn.benchmarks.scienceqa import parse_option
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.store import cache_folder

ROTATION = 1_000_000  # added to a question's index for each further order of its options
LONGEST_IMAGE = 32 << 20  # characters of base64; the benchmark's images have some 100,000
LONGEST_NAME = (
    64  # a shorter image field names the row that has the image, as in VLMEvalKit, the benchmark's own evaluator
)


@dataclass(frozen=True)
class _Row:
    """A row without its image."""

    text: str
    reference: str | None
    category: str | None
    image_of: str  # index of the row that has the image


@register(
    "mmbench",
    "mmbench_dev_en_20231003.tsv (circular) or another TSV of the MMBench repository; the test files have no answers",
    "inside the TSV; they are unpacked into the cache folder",
)
class MMBench(Benchmark):
    """Share of questions right under all rotations. An answer without an option is wrong, never a random option; the published
    evaluator asks a language model to find one."""

    def read_questions(
        self, annotations: Path, questions: Path | None, limit: int | None = None
    ) -> list[BenchmarkQuestion]:
        """Reads the file twice, so that no more than one image is held; `limit` counts a question with all its rotations once."""
        rows: dict[str, _Row] = {}
        for where, row in _rows(annotations):
            index = _index(row, where)
            if index in rows:
                raise UserError(f"{where}: the index {index} is there twice")
            rows[index] = _asked(row, index, where)
        wanted = set(list(dict.fromkeys(_question(index) for index in rows))[:limit])
        rows = {index: row for index, row in rows.items() if _question(index) in wanted}
        images = _unpack(annotations, {row.image_of: index for index, row in rows.items()}, self.image_root(Path()))
        return [
            BenchmarkQuestion(index, row.text, images[row.image_of], _question(index), row.reference, row.category)
            for index, row in rows.items()
        ]

    def read_truths(self, annotations: Path, questions: Path | None) -> Mapping[str, Any]:
        found: dict[str, Any] = {}
        for where, row in _rows(annotations):
            if "answer" not in row:
                raise answers_not_public(annotations)
            index, choices, answer = _index(row, where), list(_options(row).values()), row["answer"] or ""
            if len(answer) != 1 or answer not in "ABCD"[: len(choices)]:
                raise UserError(f'{where} must have "index", options "A" to "D", and one of them as "answer"')
            found[index] = {"choices": choices, "answer": "ABCD".index(answer), "category": _category(row)}
        return found

    def score_answer(self, id: str, truth: Any, text: str, official: bool) -> QuestionScore:
        option = parse_option(text, truth["choices"], official=False)
        parts = (truth["category"],) if truth["category"] else ()
        return QuestionScore(id, float(option == truth["answer"]), _question(id), parts, unparsed=option < 0)

    def merge_scores(self, graded: Sequence[QuestionScore], truths: Mapping[str, Any]) -> list[QuestionScore]:
        """One score a question, of those whose every rotation has an answer."""
        wanted: dict[str, int] = {}
        for index in truths:
            wanted[_question(index)] = wanted.get(_question(index), 0) + 1
        groups: dict[str, list[QuestionScore]] = {}
        for one in graded:
            groups.setdefault(one.cluster, []).append(one)
        return [
            QuestionScore(
                group,
                float(all(one.value for one in found)),
                group,
                found[0].subsets,
                any(one.unparsed for one in found),
            )
            for group, found in groups.items()
            if len(found) == wanted[group]
        ]

    def image_root(self, images: Path) -> Path:
        return cache_folder() / "mmbench"


def _rows(annotations: Path) -> Iterator[tuple[str, dict[str, str | None]]]:
    """Each row with its place, for an error.

    Raises:
        UserError: the file is missing, holds no rows, or is no such text.
    """
    csv.field_size_limit(LONGEST_IMAGE)  # an image is a field
    where = str(annotations)
    try:
        with annotations.open(encoding="utf-8-sig", newline="") as handle:
            number = 0
            for number, row in enumerate(csv.DictReader(handle, delimiter="\t"), start=1):
                where = f"{annotations}: row {number}"
                yield where, row
                where = f"{annotations}: row {number + 1}"
            if not number:
                raise UserError(f"{annotations}: holds no questions")
    except csv.Error as error:
        raise UserError(f"{where}: is not tab-separated text ({error})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{annotations}: {getattr(error, 'strerror', None) or 'is not a tab-separated text file'}"
        ) from None


def _index(row: Mapping[str, str | None], where: str) -> str:
    index = row.get("index") or ""
    if not (index.isascii() and index.isdigit() and len(index) <= 18):
        raise UserError(f'{where}: "index" must be a whole number, found {quoted(index)}')
    return index


def _question(index: str) -> str:
    """The question that a rotation is of."""
    return str(int(index) % ROTATION)


def _options(row: Mapping[str, str | None]) -> dict[str, str]:
    return {letter: text for letter in "ABCD" if (text := _said(row, letter))}


def _said(row: Mapping[str, str | None], column: str) -> str:
    """A cell's text; pandas, which wrote the files, writes some empty cells as nan."""
    text = (row.get(column) or "").strip()
    return "" if text.lower() == "nan" else text


def _category(row: Mapping[str, str | None]) -> str | None:
    """The broader of the two categories, as the releases call it."""
    return _said(row, "l2-category") or _said(row, "L2-category") or _said(row, "category") or None


def _asked(row: Mapping[str, str | None], index: str, where: str) -> _Row:
    hint, question, options, image = _said(row, "hint"), _said(row, "question"), _options(row), row.get("image") or ""
    if not question or not options or not image:
        raise UserError(f'{where} (index {index}) must have "question", options from "A" on, and "image"')
    if any("\0" in text for text in (hint, question, *options.values())):
        raise UserError(f"{where} (index {index}) holds a NUL character")
    lines = [hint] if hint else []
    lines += [question, *(f"{letter}. {text}" for letter, text in options.items()), LETTER]
    image_of = image.strip() if len(image) <= LONGEST_NAME else index
    return _Row("\n".join(lines), _said(row, "answer") or None, _category(row), image_of)


def _unpack(annotations: Path, wanted: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Writes the images of rows below `folder`; returns their names, by the rows' index.

    Args:
        wanted: index of a row with an image -> index of one that asks about it.
    """
    found: dict[str, str] = {}
    for where, row in _rows(annotations):
        index, image = row.get("index") or "", row.get("image") or ""
        if index in wanted and len(image) > LONGEST_NAME:
            found[index] = _write_image(image, index, f"{where} (index {index})", folder)
    lost = next((index for index in wanted if index not in found), None)
    if lost is not None:
        raise UserError(
            f"{annotations}: the image of index {wanted[lost]} is neither base64 nor the index of a row with one: {quoted(lost)}"
        )
    return found


def _write_image(text: str, index: str, where: str, folder: Path) -> str:
    """Writes an image under a name made of question and content, once it has opened as one.

    Raises:
        UserError: it is not base64, not an image, or too large to be opened safely.
    """
    from vlm_unlearn.data.images import open_image

    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise UserError(f"{where}: the image is not base64") from None
    name = (
        f"{_question(index)}-{hashlib.sha256(content).hexdigest()[:32]}"  # rotations with an image each share the file
    )
    target = folder / name
    if target.exists():
        return name  # it has opened once
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{name}.{os.getpid()}.part"
    try:
        part.write_bytes(content)
        open_image(part)
        os.replace(part, target)
    except UserError as error:
        raise UserError(f"{where}: the image {str(error).removeprefix(f'{part}: ')}") from None
    finally:
        part.unlink(missing_ok=True)
    return name
