"""Tables with a question and an answer per row.

Supported are JSON lines, CSV, TSV, and everything that `datasets` loads: parquet, arrow, and datasets on the hub.
"""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from vlm_unlearn.data.formats.base import KINDS_OF_SETS, Entry, Format, register
from vlm_unlearn.data.formats.fields import RawRecord, parse_records, read_objects
from vlm_unlearn.data.formats.groups import AttackRecord, prompts_of_groups
from vlm_unlearn.data.formats.llava import IMAGE_PLACEHOLDER, validate_no_embedded_image
from vlm_unlearn.data.images import resolve_image
from vlm_unlearn.data.json_stream import MAX_RECORD_BYTES, UNDECODED, dump
from vlm_unlearn.errors import Problems, UserError, nearest, quoted, report_problem
from vlm_unlearn.records import Example, Kind, Prompt
from vlm_unlearn.store import detect_encoding, is_other_encoding, not_utf8, open_atomically

SEPARATORS = {".csv": ",", ".tsv": "\t"}
OUTPUT_COLUMNS = ("id", "image", "question", "answer", "category", "pair_id", "set")


@dataclass(frozen=True)
class Columns:
    """The names of a table's columns.

    A table must have the columns `question` and `answer`, and the columns of the fields in `required`.

    Attributes:
        question: The question.
        answer: The answer.
        image: The path of the image below the image root.
        id: The id of the row. Without it the number of the row is used.
        category: The category of the question.
        pair: The id that ties a decouple or preferred row to its forget row.
        set: The set of the row: forget, retain, decouple or preferred.
        required: The fields of this class whose columns must exist, because the user named them.
    """

    question: str = "question"
    answer: str = "answer"
    image: str = "image"
    id: str = "id"
    category: str = "category"
    pair: str = "pair_id"
    set: str = "set"
    required: frozenset[str] = frozenset()


SETS = {
    **dict.fromkeys(("forget", "harmful", "unsafe"), "forget"),
    **dict.fromkeys(("retain", "harmless", "safe"), "retain"),
    "decouple": "decouple",
    "preferred": "preferred",
}


@dataclass(frozen=True)
class Row:
    """A row as an example, with the set in its set column."""

    example: Example
    set: str | None


def read_table(
    source: str | Path,
    columns: Columns,
    images: Path | None,
    problems: Problems | None = None,
    embedded: Path | None = None,
) -> Iterator[Row]:
    """Reads the rows of a table, one at a time.

    Args:
        source: A file, a folder that `datasets` saved, or the name of a dataset on the hub (``owner/name:split``).
        columns: The names of the columns.
        images: The image root. None skips the check of the image files.
        problems: Collects broken rows. Without it the first one raises.
        embedded: The folder for images that are stored in the table. Each is written under the digest of its content.

    Raises:
        UserError: The table cannot be read or lacks a column, or `problems` is None and a row is broken.
    """
    return parse_records(
        raw_rows(source, columns, problems), lambda record: _row(record, columns, images, embedded), problems
    )


def _row(record: RawRecord, columns: Columns, images: Path | None, embedded: Path | None) -> Row:
    image, source = _image(record, columns.image, images, embedded)
    question = cell_text(record, columns.question)
    if IMAGE_PLACEHOLDER in question:  # as in LLaVA's files
        if image is None:
            raise record.error(
                f"the question contains {IMAGE_PLACEHOLDER}, but the row has no image",
                "placeholder-in-text",
                columns.question,
            )
        question = question.replace(IMAGE_PLACEHOLDER, "").strip()
    answer = cell_text(record, columns.answer)
    if not question:
        raise record.error("the question is empty", "empty-field", columns.question)
    if IMAGE_PLACEHOLDER in answer:
        problem = f"the answer contains {IMAGE_PLACEHOLDER}. Remove it."
        raise record.error(problem, "placeholder-in-text", columns.answer)
    return Row(
        Example(
            id=_optional(record, columns.id) or str(record.number),
            image=image,
            question=question,
            answer=answer,
            category=_optional(record, columns.category),
            pair_id=_optional(record, columns.pair),
            source=source,
        ),
        set_of(record, columns),
    )


def set_of(record: RawRecord, columns: Columns) -> str | None:
    """Returns the set of a row: forget, retain, decouple or preferred. None for a table without a set column.

    Raises:
        UserError: The set column is required and contains another value. A column that is called "set" by coincidence
        can
            contain any value.
    """
    if "set" not in columns.required:
        return SETS.get(str(record.value.get(columns.set, "")).strip().lower())
    name = cell_text(record, columns.set).strip().lower()
    if name not in SETS:
        raise record.error(
            f"unknown set {quoted(name)}. Use forget, retain, decouple or preferred{nearest(name, SETS)}",
            "unknown-name",
            columns.set,
        )
    return SETS[name]


def cell_text(record: RawRecord, column: str) -> str:
    """Returns the text of a cell. A number is converted to text.

    Raises:
        UserError: The cell is missing or empty, or contains neither text nor a number.
    """
    value = record.value.get(column)
    if (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    return record.text(column)


def _optional(record: RawRecord, column: str) -> str | None:
    return None if record.value.get(column) in (None, "") else cell_text(record, column)


def _image(record: RawRecord, column: str, images: Path | None, embedded: Path | None) -> tuple[str | None, str]:
    """Returns the image path of a row, and its source.

    The source is ``table`` for a path below the image root, and ``embedded`` for an image that is stored in the table.
    """
    image = record.value.get(column)
    if isinstance(image, list):
        if len(image) > 1:
            raise record.error(f"{len(image)} images, but an example has at most one", "invalid-field", column)
        image = image[0] if image else None
    if isinstance(image, dict):  # an undecoded Image column of `datasets`
        if isinstance(image.get("bytes"), bytes) and image["bytes"]:
            return _write_embedded(image["bytes"], embedded), "embedded"
        image = image.get("path")
    if image is None or image == "":
        return None, "table"
    path = RawRecord({column: image}, record.file, lambda: str(record.position)).text(column)
    if images is not None:
        resolve_image(images, path, record.file, record.position)
    return path, "table"


def _write_embedded(content: bytes, image_root: Path | None) -> str:
    # The suffix does not matter: images are opened by their content.
    name = f"{hashlib.sha256(content).hexdigest()[:32]}.img"
    if image_root is not None:
        image_root.mkdir(parents=True, exist_ok=True)
        (image_root / name).write_bytes(content)
    return name


def raw_rows(source: str | Path, columns: Columns, problems: Problems | None) -> Iterator[RawRecord]:
    """Reads the unparsed rows of a table, one at a time, after a check that the table has the required columns.

    Args:
        source: As in `read_table`.
        columns: The names of the columns.
        problems: Collects broken rows. Without it the first one raises.

    Raises:
        UserError: The table cannot be read or lacks a column, or `problems` is None and a row is broken.
    """
    path = Path(source)
    kind = suffix(path)
    if kind in (".xlsx", ".xls", ".ods"):
        raise UserError("spreadsheets are not supported. Save it as CSV (UTF-8).", code="invalid-table", file=path)
    if kind in SEPARATORS:
        records = _csv_records(path, SEPARATORS[kind], problems)
    elif path.is_file() and kind not in (".parquet", ".arrow"):
        records = read_objects(path, columns.id, problems)
    else:
        records = _dataset_records(str(source))
    yield from _with_required_columns(records, columns, path.name)


def suffix(path: Path) -> str:
    """Returns the suffix that identifies the type of a file, in lower case: ``.csv`` for ``A.CSV``."""
    return path.suffix.lower()


def _with_required_columns(records: Iterable[RawRecord], columns: Columns, name: str) -> Iterator[RawRecord]:
    records = iter(records)
    head = list(islice(records, 20))  # a single row without the column is a broken row, twenty are a wrong table
    for field in dict.fromkeys(("question", "answer", *sorted(columns.required))):
        column = getattr(columns, field)
        if head and not any(column in record.value for record in head):
            available = ", ".join(quoted(key, 40) for key in list(head[0].value)[:20])
            raise UserError(
                f"no column {quoted(column)}. The columns are {available}. "
                f"Pass --{field}-column{nearest(column, head[0].value)}",
                code="missing-field",
                file=name,
                field=column,
            )
    yield from head
    yield from records


def _csv_records(path: Path, separator: str, problems: Problems | None) -> Iterator[RawRecord]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    try:
        with path.open("rb") as raw:
            if not detect_encoding(raw.read(16)).startswith("utf-8"):
                raise not_utf8(path)
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
            reader = csv.reader(handle, delimiter=separator, strict=True)
            header = next(reader, [])
            if len(header) == 1 and ";" in header[0]:
                raise UserError('the columns are separated by ";". Use commas.', code="invalid-table", file=path)
            if not header or len(set(header)) < len(header):
                problem = "contains a column twice" if header else "is empty"
                raise UserError(
                    f"the first line {problem}. It must contain the column names.", code="invalid-table", file=path
                )
            number, is_checked = -1, False
            for row in reader:
                if not row:
                    continue
                if not is_checked and UNDECODED.search("".join(row)):
                    if is_other_encoding(path):
                        raise not_utf8(path)
                    is_checked = True
                number += 1
                line = reader.line_num - sum(cell.count("\n") for cell in row)
                position = partial("{} (line {})".format, number + 1, line)
                if len(row) != len(header):
                    problem = (
                        f"has {len(row)} cells, but the header has {len(header)}. "
                        f"Put cells that contain a separator in quotes."
                    )
                    report_problem(
                        UserError(problem, code="invalid-table", file=path.name, record=position()), problems
                    )
                    continue
                yield RawRecord(dict(zip(header, row, strict=True)), path.name, position, number)
    except csv.Error as error:  # after an open quote, the next row cannot be located
        problem = f"line {reader.line_num}: not valid {path.suffix[1:].upper()}: {error}"
        raise UserError(problem, code="invalid-table", file=path) from None
    except FileNotFoundError:
        raise UserError("no such file", code="file-not-found", file=path) from None
    except OSError as error:
        raise UserError(str(error.strerror), code="file-unreadable", file=path) from None


def _dataset_records(source: str) -> Iterator[RawRecord]:
    import datasets

    table = _load(datasets, source)
    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            table = table.cast_column(name, datasets.List(datasets.Image(decode=False)))
    for number, row in enumerate(table):
        yield RawRecord(row, source, partial(str, number + 1), number)


def _load(datasets: Any, source: str) -> Any:
    name, _, split = source.partition(":")
    path = Path(source)
    try:
        if path.is_dir() and (path / "dataset_info.json").exists():
            return datasets.load_from_disk(source)
        if suffix(path) in (".parquet", ".arrow"):
            return datasets.load_dataset(suffix(path)[1:], data_files=source, split="train")
        if path.is_dir() or name.count("/") == 1:
            return datasets.load_dataset(name, split=split or "train")
    except UserError:
        raise
    except Exception as error:  # `datasets` and its readers raise many types of errors for broken files
        problem = f"`datasets` cannot load it: {type(error).__name__}: {quoted(error, 200)}"
        code = "invalid-table" if path.exists() else "file-not-found"
        raise UserError(problem, code=code, file=source) from None
    raise UserError("no such file", code="file-not-found", file=source)


def prompts(rows: Iterable[Row], set_name: str, kind: Kind) -> Iterator[Prompt]:
    """Yields the evaluation prompts of one kind, with the answers as references.

    Rows with the same id are rewrites of one question and form a group.

    Raises:
        UserError: The image of a row is stored inside the table.
    """

    def records() -> Iterator[AttackRecord]:
        for row in rows:
            example = row.example
            if KINDS_OF_SETS.get(row.set or "") != kind:
                continue
            validate_no_embedded_image(example)
            yield example.id, example.image, example.question, example.answer, example.category

    yield from prompts_of_groups(records(), set_name, kind)


def row_of(example: Example, set_name: str | None) -> dict[str, str | None]:
    """Returns an example as a row with the columns in `OUTPUT_COLUMNS`.

    Raises:
        UserError: The example has several rounds or an image inside a table. Rows cannot represent either.
    """
    if example.history:
        raise UserError(
            f"the conversation has {len(example.history) + 1} rounds, but a row has one. Write LLaVA's .json format.",
            code="unsupported-setting",
            record=quoted(example.id),
        )
    validate_no_embedded_image(example)
    return {"set": set_name, **{column: getattr(example, column) for column in OUTPUT_COLUMNS if column != "set"}}


def write_table(path: Path, rows: Iterable[Row], problems: Problems | None = None) -> int:
    """Writes a .jsonl, .csv or .tsv file.

    Args:
        path: The output file.
        rows: The rows.
        problems: Collects examples that a row cannot represent. Without it the first one raises.

    Returns:
        The number of rows.

    Raises:
        UserError: There are no rows, or `problems` is None and a row cannot represent an example.
    """
    count = 0
    with open_atomically(path) as handle:
        writer = None
        if suffix(path) in SEPARATORS:
            writer = csv.DictWriter(handle, OUTPUT_COLUMNS, delimiter=SEPARATORS[suffix(path)])
            writer.writeheader()
        for example, set_name in ((row.example, row.set) for row in rows):
            try:
                row = row_of(example, set_name)
            except UserError as error:
                report_problem(error, problems)
                continue
            if writer:
                writer.writerow(row)
            else:
                handle.write(dump(row) + "\n")
            count += 1
        if not count:
            raise UserError("there are no rows to write", code="no-records", file=path)
    return count


@register("table")
class Table(Format):
    """Rows of CSV, TSV, JSON lines, parquet and everything else that `datasets` loads.

    Args:
        columns: The names of the columns.
    """

    def __init__(self, columns: Columns | None = None) -> None:
        self._columns = columns or Columns()

    def entries(self, path: str | Path, images: Path | None, problems: Problems | None = None) -> Iterator[Entry]:
        for row in read_table(path, self._columns, images, problems):
            refused = None if row.set is None else row.set in ("forget", "preferred")
            yield Entry(row.example, row.set or "", refused)

    def prompts(self, path: Path, images: Path, set_name: str, kind: Kind) -> Iterator[Prompt]:
        return prompts(read_table(path, self._columns, images), set_name, kind)
