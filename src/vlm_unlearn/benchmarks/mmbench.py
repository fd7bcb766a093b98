"""MMBench (Liu et al. 2023, arXiv 2307.06281), circular evaluation.

Every question is asked in all rotations of its options.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import os
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar

from vlm_unlearn.benchmarks.base import Benchmark, BenchmarkQuestion, QuestionScore, register
from vlm_unlearn.benchmarks.official_files import LETTER, answers_not_public
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.metrics.option_reading import read_option
from vlm_unlearn.store import cache_folder, not_utf8

OPTION_LETTERS = tuple(string.ascii_uppercase)  # MMBench has A to D, other files in its layout have more
ROTATION_OFFSET = 1_000_000  # added to a question's index for each further rotation of its options
MAX_IMAGE_CHARS = 32 << 20  # characters of base64; the benchmark's images have about 100,000
# An image field up to this length is the index of the row that has the image, as in VLMEvalKit, the official evaluator.
MAX_INDEX_CHARS = 64


@dataclass(frozen=True)
class _Row:
    """A row of the TSV file.

    Attributes:
        file: The TSV file.
        number: The number of the row below the header, from 1.
        cells: The cells by column.
    """

    file: Path
    number: int
    cells: Mapping[str, str | None]

    def text(self, column: str) -> str:
        """Returns a cell's text. Pandas, which wrote the files, writes some empty cells as nan."""
        text = (self.cells.get(column) or "").strip()
        return "" if text.lower() == "nan" else text

    @property
    def index(self) -> str:
        """The row's index, which identifies a question in one rotation."""
        index = self.cells.get("index") or ""
        if not (index.isascii() and index.isdigit() and len(index) <= 18):
            raise UserError(
                f"the index of row {self.number} must be a number, found {quoted(index)}",
                code="invalid-field",
                file=self.file,
                record=self.number,
                field="index",
            )
        return index

    @property
    def image(self) -> str:
        """The image as base64, or the index of the row that has the image."""
        return self.cells.get("image") or ""

    @property
    def options(self) -> dict[str, str]:
        """The options by letter. Each column named by a capital letter is an option, unless its cell is empty."""
        return {letter: text for letter in self.cells if letter in OPTION_LETTERS and (text := self.text(letter))}

    @property
    def category(self) -> str | None:
        """The broader of the two categories. Its column has another name in each release."""
        return self.text("l2-category") or self.text("L2-category") or self.text("category") or None

    def error(self, message: str, code: str, field: str) -> UserError:
        """Returns an error about a column of the row."""
        record = f"{self.number} (index {quoted(self.index)[1:-1]})"
        return UserError(message, code=code, file=self.file, record=record, field=field)


@dataclass(frozen=True)
class _Question:
    """A question in one rotation, without its image."""

    text: str
    reference: str | None
    category: str | None
    image_index: str  # index of the row that has the image


@register(
    "mmbench",
    "mmbench_dev_en_20231003.tsv (circular) or another TSV of the MMBench repository; the test files have no answers",
    "inside the TSV; they are unpacked into the cache folder",
)
class MMBench(Benchmark):
    """Share of questions that are answered right in all rotations of their options.

    An answer without an option letter is wrong. The published evaluator asks a language model to find an option in it.
    """

    instruction: ClassVar[str] = LETTER

    def read_questions(
        self, annotations: Path, questions: Path | None, limit: int | None = None
    ) -> list[BenchmarkQuestion]:
        """Reads the questions, and unpacks their images.

        The file is read twice, so that only one image is in memory. `limit` counts a question with all rotations once.
        """
        parsed: dict[str, _Question] = {}
        for row in _read_rows(annotations):
            if row.index in parsed:
                raise row.error("an earlier row has the same index", "duplicate-id", "index")
            parsed[row.index] = _parse_question(row, self.instruction)
        question_ids = set(list(dict.fromkeys(_question_id(index) for index in parsed))[:limit])
        parsed = {index: question for index, question in parsed.items() if _question_id(index) in question_ids}
        user_by_image = {question.image_index: index for index, question in parsed.items()}
        images = _unpack_images(annotations, user_by_image, self.image_root(Path()))
        return [
            BenchmarkQuestion(
                index,
                question.text,
                images[question.image_index],
                _question_id(index),
                question.reference,
                question.category,
            )
            for index, question in parsed.items()
        ]

    def read_truths(self, annotations: Path, questions: Path | None) -> Mapping[str, Any]:
        truths: dict[str, Any] = {}
        for row in _read_rows(annotations):
            if "answer" not in row.cells:
                raise answers_not_public(annotations)
            if row.index in truths:
                raise row.error("an earlier row has the same index", "duplicate-id", "index")
            options, answer = row.options, row.text("answer")
            if answer not in options:
                raise row.error("must be the letter of an option", "invalid-field", "answer")
            truths[row.index] = {
                "options": options,
                "answer": answer,
                "category": row.category,
                "question": row.text("question"),
            }
        return truths

    def score_answer(self, id: str, truth: Any, text: str, official: bool) -> QuestionScore:
        option = read_option(text, truth["options"])
        subsets = (truth["category"],) if truth["category"] else ()
        return QuestionScore(id, float(option == truth["answer"]), _question_id(id), subsets, unparsed=option is None)

    def merge_scores(self, scores: Sequence[QuestionScore], truths: Mapping[str, Any]) -> list[QuestionScore]:
        """Returns one score per question. Questions with a missing answer to one of their rotations are left out."""
        rotation_counts = Counter(_question_id(index) for index in truths)
        scores_by_question: dict[str, list[QuestionScore]] = {}
        for score in scores:
            scores_by_question.setdefault(score.cluster, []).append(score)
        return [
            QuestionScore(
                question_id,
                float(all(score.value for score in rotations)),
                question_id,
                rotations[0].subsets,
                any(score.unparsed for score in rotations),
            )
            for question_id, rotations in scores_by_question.items()
            if len(rotations) == rotation_counts[question_id]
        ]

    def image_root(self, images: Path) -> Path:
        return cache_folder() / "mmbench"


def _read_rows(annotations: Path) -> Iterator[_Row]:
    """Reads the rows of the TSV file.

    Raises:
        UserError: The file is missing, has no rows, or is not a TSV file.
    """
    csv.field_size_limit(MAX_IMAGE_CHARS)
    number = 0
    try:
        with annotations.open(encoding="utf-8-sig", newline="") as handle:
            reader = csv.reader(handle, delimiter="\t")
            header = next(reader, [])
            _validate_header(header, annotations)
            for number, cells in enumerate(filter(None, reader), start=1):
                if len(cells) > len(header):
                    problem = f"the row has {len(cells)} cells, but the header has {len(header)}"
                    raise UserError(problem, code="invalid-table", file=annotations, record=number)
                yield _Row(annotations, number, dict(zip_longest(header, cells)))
    except csv.Error as error:
        raise UserError(
            f"the row is not tab-separated text ({error})", code="invalid-table", file=annotations, record=number + 1
        ) from None
    except OSError as error:
        code = "file-not-found" if isinstance(error, FileNotFoundError) else "file-unreadable"
        raise UserError(str(error.strerror), code=code, file=annotations) from None
    except UnicodeDecodeError:
        raise not_utf8(annotations) from None
    if not number:
        raise UserError("the file has no questions", code="no-records", file=annotations)


def _validate_header(header: Sequence[str], file: Path) -> None:
    """Checks that no column is named twice, because only one of the two could be read."""
    duplicate = next((column for column, count in Counter(header).items() if count > 1), None)
    if duplicate is not None:
        raise UserError(
            f"the first line contains the column {quoted(duplicate)} twice", code="duplicate-key", file=file
        )


def _question_id(index: str) -> str:
    """Returns the id of the question that a row is a rotation of."""
    return str(int(index) % ROTATION_OFFSET)


def _parse_question(row: _Row, instruction: str) -> _Question:
    hint, text, options = row.text("hint"), row.text("question"), row.options
    for column, value in (("question", text), ("A", options), ("image", row.image)):
        if not value:
            raise row.error("the field is empty", "empty-field", column)
    for column in ("hint", "question", *options):
        if "\0" in row.text(column):
            raise row.error("contains a NUL character. Remove it.", "invalid-encoding", column)
    lines = [hint] if hint else []
    lines += [text, *(f"{letter}. {option}" for letter, option in options.items()), instruction]
    image_index = row.image.strip() if len(row.image) <= MAX_INDEX_CHARS else row.index
    return _Question("\n".join(lines), row.text("answer") or None, row.category, image_index)


def _unpack_images(annotations: Path, user_by_image: Mapping[str, str], image_root: Path) -> dict[str, str]:
    """Writes the images of rows to a folder.

    Args:
        annotations: The TSV file.
        user_by_image: The indices of the rows with a needed image. The values are indices of rows that use the image,
            for error messages.
        image_root: The folder for the images.

    Returns:
        The names of the image files by the index of their row.
    """
    names: dict[str, str] = {}
    for row in _read_rows(annotations):
        index = row.cells.get("index") or ""
        if index in user_by_image and len(row.image) > MAX_INDEX_CHARS:
            names[index] = _write_image(row, image_root)
    missing = next((index for index in user_by_image if index not in names), None)
    if missing is not None:
        raise UserError(
            f"the image of index {user_by_image[missing]} is neither base64 nor the index of a row with an image: "
            f"{quoted(missing)}",
            code="image-not-found",
            file=annotations,
            field="image",
        )
    return names


def _write_image(row: _Row, image_root: Path) -> str:
    """Writes a row's image, under a name made of the question's id and the digest of the image.

    Rotations that repeat an image share one file.

    Raises:
        UserError: The image is not base64, not an image, or too large to open safely.
    """
    from vlm_unlearn.data.images import open_image

    try:
        content = base64.b64decode(row.image, validate=True)
    except (binascii.Error, ValueError):
        raise row.error("the image is not base64", "invalid-image", "image") from None
    name = f"{_question_id(row.index)}-{hashlib.sha256(content).hexdigest()[:32]}"
    target = image_root / name
    if target.exists():
        return name  # a file that exists has been opened successfully before
    image_root.mkdir(parents=True, exist_ok=True)
    temporary = image_root / f".{name}.{os.getpid()}.part"
    try:
        temporary.write_bytes(content)
        open_image(temporary)
        os.replace(temporary, target)
    except UserError as error:
        raise row.error(f"the image {error.message}", error.code, "image") from None
    finally:
        temporary.unlink(missing_ok=True)
    return name
