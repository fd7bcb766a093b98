"""Tables with a question and an answer a row: JSON lines, CSV, TSV, and whatever `datasets` loads (parquet, arrow folders, the hub)."""

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

from vlm_unlearn.data.formats.fields import RawRecord, parsed, read_objects
from vlm_unlearn.data.formats.groups import AttackRecord, prompts_of_groups
from vlm_unlearn.data.formats.llava import IMAGE_MARK, validate_no_embedded_image
from vlm_unlearn.data.images import resolve_image
from vlm_unlearn.data.json_stream import MAX_RECORD_BYTES, dump
from vlm_unlearn.errors import Problems, UserError, nearest, quoted, report_problem
from vlm_unlearn.records import Example, Kind, Prompt
from vlm_unlearn.store import open_atomically

SEPARATORS = {".csv": ",", ".tsv": "\t"}
WRITTEN = ("id", "image", "question", "answer", "category", "pair_id", "set")


@dataclass(frozen=True)
class Columns:
    """Which column holds what. All but question and answer may be missing from a table, unless they are `named`."""

    question: str = "question"
    answer: str = "answer"
    image: str = "image"
    id: str = "id"
    category: str = "category"
    pair: str = "pair_id"
    set: str = "set"  # forget, retain, decouple or preferred
    named: frozenset[str] = frozenset()  # the fields above that somebody named: their columns must be there


SETS = {
    **dict.fromkeys(("forget", "harmful", "unsafe"), "forget"),
    **dict.fromkeys(("retain", "harmless", "safe"), "retain"),
    "decouple": "decouple",
    "preferred": "preferred",
}

KINDS: dict[str, Kind] = {"forget": "unsafe", "retain": "safe", "decouple": "safe_image_unsafe_question"}


@dataclass(frozen=True)
class Row:
    """A row as an example, and the set its set column names."""

    example: Example
    set: str | None


def read_table(
    source: str | Path,
    columns: Columns,
    images: Path | None,
    problems: Problems | None = None,
    embedded: Path | None = None,
) -> Iterator[Row]:
    """The rows of a table, one at a time.

    Args:
        source: a file, a folder that ``datasets`` saved, or the name of a data set on the hub (``owner/name:split``).
        images: the image root; None leaves the files unlooked-at.
        problems: takes broken rows; without it the first one raises.
        embedded: the folder that images held by the table itself are written to, by the digest of their content.

    Raises:
        UserError: the table can't be read or lacks the question or the answer column; a broken row where `problems` is None.
    """
    return parsed(raw_rows(source, columns, problems), lambda record: _row(record, columns, images, embedded), problems)


def _row(record: RawRecord, columns: Columns, images: Path | None, embedded: Path | None) -> Row:
    image, source = _image(record, columns.image, images, embedded)
    question = cell_text(record, columns.question)
    if IMAGE_MARK in question:  # as LLaVA's files have it
        if image is None:
            raise UserError(f"{record.where}: the question holds {IMAGE_MARK}, but there is no image")
        question = question.replace(IMAGE_MARK, "").strip()
    answer = cell_text(record, columns.answer)
    if not question or IMAGE_MARK in answer:
        what = f"the answer holds {IMAGE_MARK}; take it out" if question else "asks nothing"
        raise UserError(f"{record.where}: {what}")
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
    """The set that a row's set column names: forget, retain or decouple; None for a table without one.

    Raises:
        UserError: it names another, and the column was named. A column that only happens to be called "set" may hold what it likes.
    """
    if "set" not in columns.named:
        return SETS.get(str(record.value.get(columns.set, "")).strip().lower())
    named = cell_text(record, columns.set).strip().lower()
    if named not in SETS:
        raise UserError(
            f"{record.where}: {columns.set} {quoted(named)}: use forget, retain or decouple{nearest(named, SETS)}"
        )
    return SETS[named]


def cell_text(record: RawRecord, column: str) -> str:
    """A cell's text; a number, as an answer often is, is written out."""
    found = record.value.get(column)
    if (isinstance(found, int) and not isinstance(found, bool)) or (isinstance(found, float) and math.isfinite(found)):
        return str(found)
    return record.text(column)


def _optional(record: RawRecord, column: str) -> str | None:
    return None if record.value.get(column) in (None, "") else cell_text(record, column)


def _image(record: RawRecord, column: str, images: Path | None, embedded: Path | None) -> tuple[str | None, str]:
    """The row's image path, and whether it is below the image root (``table``) or came out of the table (``embedded``)."""
    found = record.value.get(column)
    if isinstance(found, list):
        if len(found) > 1:
            raise UserError(f"{record.where}: {len(found)} images; an example has one")
        found = found[0] if found else None
    if isinstance(found, dict):  # datasets' Image column, undecoded
        if isinstance(found.get("bytes"), bytes) and found["bytes"]:
            return _keep(found["bytes"], embedded), "embedded"
        found = found.get("path")
    if found is None or found == "":
        return None, "table"
    path = RawRecord({column: found}, lambda: record.where).text(column)
    if images is not None:
        resolve_image(images, path, record.where)
    return path, "table"


def _keep(content: bytes, embedded: Path | None) -> str:
    name = f"{hashlib.sha256(content).hexdigest()[:32]}.img"  # the readers of images look at the content, never at the ending
    if embedded is not None:
        embedded.mkdir(parents=True, exist_ok=True)
        (embedded / name).write_bytes(content)
    return name


def raw_rows(source: str | Path, columns: Columns, problems: Problems | None) -> Iterator[RawRecord]:
    """The rows as they are, once the first is seen to have the columns that a table needs."""
    path = Path(source)
    kind = suffix(path)
    if kind in (".xlsx", ".xls", ".ods"):
        raise UserError(f"{path}: spreadsheets are not read; save it as CSV (UTF-8)")
    if kind in SEPARATORS:
        records = _csv_records(path, SEPARATORS[kind], problems)
    elif path.is_file() and kind not in (".parquet", ".arrow"):
        records = read_objects(path, columns.id, problems)
    else:
        records = _dataset_records(str(source))
    yield from _checked(records, columns, path.name)


def suffix(path: Path) -> str:
    """The ending that tells a file's form: ``.csv`` of ``A.CSV``."""
    return path.suffix.lower()


def _checked(records: Iterable[RawRecord], columns: Columns, name: str) -> Iterator[RawRecord]:
    """The records, once the first is seen to have the columns that a table needs."""
    records = iter(records)
    first = list(islice(records, 20))  # one odd row is a broken row, twenty are a table without the column
    for field in dict.fromkeys(("question", "answer", *sorted(columns.named))):
        column = getattr(columns, field)
        if first and not any(column in record.value for record in first):
            there = ", ".join(quoted(key, 40) for key in list(first[0].value)[:20])
            raise UserError(
                f"{name}: no column {quoted(column)}; its columns are {there}; pass --{field}-column{nearest(column, first[0].value)}"
            )
    yield from first
    yield from records


def _csv_records(path: Path, separator: str, problems: Problems | None) -> Iterator[RawRecord]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
            reader = csv.reader(handle, delimiter=separator, strict=True)
            header = next(reader, [])
            if header and header[0].startswith(("\udcff\udcfe", "\udcfe\udcff")):
                raise UserError(f"{path}: is UTF-16; save it as UTF-8")
            if len(header) == 1 and ";" in header[0]:
                raise UserError(f'{path}: its columns are separated by ";"; save it with commas')
            if not header or len(set(header)) < len(header):
                what = "names a column twice" if header else "is empty"
                raise UserError(f"{path}: the first line {what}; it must name the columns")
            number = -1
            for row in reader:
                if not row:
                    continue
                number += 1
                place = partial(
                    "{}: line {}".format, path.name, reader.line_num - sum(cell.count("\n") for cell in row)
                )
                if len(row) != len(header):
                    what = f"has {len(row)} cells, the header {len(header)}; quote cells that hold a separator"
                    report_problem(UserError(f"{place()}: {what}"), problems)
                    continue
                yield RawRecord(dict(zip(header, row, strict=True)), place, number)
    except csv.Error as error:  # nothing can be found again behind an open quote
        raise UserError(f"{path}: line {reader.line_num}: not {path.suffix[1:].upper()}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _dataset_records(source: str) -> Iterator[RawRecord]:
    import datasets

    table = _load(datasets, source)
    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            table = table.cast_column(name, datasets.List(datasets.Image(decode=False)))
    for number, row in enumerate(table):
        yield RawRecord(row, partial("{}: row {}".format, source, number), number)


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
    except Exception as error:  # datasets and what is below it raise whatever a broken file leads them to
        raise UserError(f"{source}: datasets could not load it: {type(error).__name__}: {quoted(error, 200)}") from None
    raise UserError(f"{source}: no such file")


def prompts(rows: Iterable[Row], set_name: str, kind: Kind) -> Iterator[Prompt]:
    """Evaluation prompts of one kind, from the rows of its set. Rows with the same id are shots of one group; answers are references."""

    def asked() -> Iterator[AttackRecord]:
        for row in rows:
            example = row.example
            if KINDS.get(row.set or "") != kind:
                continue
            if example.source == "embedded":
                raise UserError(
                    f"row {quoted(example.id)}: a suite reads images from a folder; `data convert` unpacks those in a table"
                )
            yield example.id, example.image, example.question, example.answer, example.category

    yield from prompts_of_groups(asked(), set_name, kind)


def row_of(example: Example, set_name: str | None) -> dict[str, str | None]:
    """An example as a row with the columns that `Columns` expects, and ``set``.

    Raises:
        UserError: the example has several rounds, which a table can't hold.
    """
    if example.history:
        raise UserError(
            f"{quoted(example.id)}: has {len(example.history) + 1} rounds, a table row has one; write LLaVA's .json format"
        )
    validate_no_embedded_image(example)
    return {"set": set_name, **{column: getattr(example, column) for column in WRITTEN if column != "set"}}


def write_table(path: Path, rows: Iterable[Row], problems: Problems | None = None) -> int:
    """Writes .jsonl, .csv or .tsv, and returns how many rows.

    Args:
        problems: takes examples that a table can't hold; without it the first one raises.

    Raises:
        UserError: there is nothing to write.
    """
    count = 0
    with open_atomically(path) as handle:
        writer = None
        if suffix(path) in SEPARATORS:
            writer = csv.DictWriter(handle, WRITTEN, delimiter=SEPARATORS[suffix(path)])
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
            raise UserError(f"{path}: there is no row to write")
    return count
