"""Tables with a question and an answer a row: JSON lines, CSV, TSV, and whatever `datasets` loads (parquet, arrow folders, the hub)."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vlm_unlearn.data.formats.fields import RawRecord, read_objects
from vlm_unlearn.data.images import resolve_image
from vlm_unlearn.data.json_stream import LONGEST_RECORD
from vlm_unlearn.errors import Problems, RequestError, nearest, refuse, shown
from vlm_unlearn.records import Example
from vlm_unlearn.store import writing

SEPARATORS = {".csv": ",", ".tsv": "\t"}
WRITTEN = ("id", "image", "question", "answer", "category", "pair_id")


@dataclass(frozen=True)
class Columns:
    """Which column holds what. `image`, `id`, `category`, `pair` may be missing from a table; None means that none does."""

    question: str = "question"
    answer: str = "answer"
    image: str | None = "image"
    id: str | None = "id"
    category: str | None = "category"
    pair: str | None = "pair_id"
    set: str | None = None  # forget, retain or decouple


SETS = {
    **dict.fromkeys(("forget", "harmful", "unsafe"), "forget"),
    **dict.fromkeys(("retain", "harmless", "safe"), "retain"),
    "decouple": "decouple",
}


@dataclass(frozen=True)
class Row:
    """A row as an example, and the set its set column names."""

    example: Example
    set: str | None


def read_table(
    source: str | Path, columns: Columns, images: Path | None, problems: Problems | None = None, embedded: Path | None = None
) -> Iterator[Row]:
    """The rows of a table, one at a time.

    Args:
        source: a file, a folder that ``datasets`` saved, or the name of a data set on the hub (``owner/name:split``).
        images: the image root; None leaves the files unlooked-at.
        problems: takes broken rows; without it the first one raises.
        embedded: the folder that images held by the table itself are written to, by the digest of their content.

    Raises:
        RequestError: the table can't be read or lacks the question or the answer column; a broken row where `problems` is None.
    """
    for record in raw_rows(source, columns, problems):
        try:
            yield _row(record, columns, images, embedded)
        except RequestError as error:
            refuse(error, problems)


def _row(record: RawRecord, columns: Columns, images: Path | None, embedded: Path | None) -> Row:
    image, source = _image(record, columns.image, images, embedded)
    name = _optional(record, columns.id)
    return Row(
        Example(
            id=f"{record.number}/{name}" if name else str(record.number),
            image=image,
            question=_text(record, columns.question),
            answer=_text(record, columns.answer),
            category=_optional(record, columns.category),
            pair_id=_optional(record, columns.pair),
            source=source,
        ),
        set_of(record, columns),
    )


def set_of(record: RawRecord, columns: Columns) -> str | None:
    """The set that a row's set column names: forget, retain or decouple; None for a table without one.

    Raises:
        RequestError: it names another.
    """
    if columns.set is None:
        return None
    named = _text(record, columns.set).strip().lower()
    if named not in SETS:
        raise RequestError(f"{record.where}: {columns.set} {shown(named)}: use forget, retain or decouple{nearest(named, SETS)}")
    return SETS[named]


def _text(record: RawRecord, column: str) -> str:
    """A cell's text; a number, as an answer often is, is written out."""
    found = record.value.get(column)
    if (isinstance(found, int) and not isinstance(found, bool)) or (isinstance(found, float) and math.isfinite(found)):
        return str(found)
    return record.text(column)


def _optional(record: RawRecord, column: str | None) -> str | None:
    found = None if column is None else record.value.get(column)
    return None if column is None or found is None or found == "" else _text(record, column)


def _image(record: RawRecord, column: str | None, images: Path | None, embedded: Path | None) -> tuple[str | None, str]:
    """The row's image path, and whether it is below the image root (``table``) or came out of the table (``embedded``)."""
    found = None if column is None else record.value.get(column)
    if isinstance(found, list):
        if len(found) > 1:
            raise RequestError(f"{record.where}: {len(found)} images; an example has one")
        found = found[0] if found else None
    if isinstance(found, dict):  # datasets' Image column, undecoded
        if isinstance(found.get("bytes"), bytes) and found["bytes"]:
            return _keep(found["bytes"], embedded), "embedded"
        found = found.get("path")
    if found is None or found == "":
        return None, "table"
    path = RawRecord({column: found}, lambda: record.where).text(str(column))
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
    if path.suffix in (".json", ".jsonl", ".ndjson"):
        yield from _checked(read_objects(path, columns.id or "id", problems), columns, path.name)
    elif path.suffix in SEPARATORS:
        yield from _checked(_csv_records(path, SEPARATORS[path.suffix], problems), columns, path.name)
    else:
        yield from _checked(_dataset_records(str(source), columns), columns, path.name)


def _checked(records: Iterable[RawRecord], columns: Columns, name: str) -> Iterator[RawRecord]:
    """The records, once the first is seen to have the columns that a table needs."""
    for index, record in enumerate(records):
        if index == 0:
            for column in (columns.question, columns.answer, columns.set):
                if column is not None and column not in record.value:
                    there = ", ".join(shown(key, 40) for key in list(record.value)[:20])
                    option = next(key for key, value in vars(columns).items() if value == column)
                    raise RequestError(
                        f"{name}: no column {shown(column)}; its columns are {there}; pass --{option}-column{nearest(column, record.value)}"
                    )
        yield record


def _csv_records(path: Path, separator: str, problems: Problems | None) -> Iterator[RawRecord]:
    csv.field_size_limit(LONGEST_RECORD)
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
            reader = csv.DictReader(handle, delimiter=separator, strict=True)
            header = list(reader.fieldnames or ())
            if not header or len(set(header)) < len(header):
                what = "names a column twice" if header else "is empty"
                raise RequestError(f"{path}: the first line {what}; it must name the columns")
            for number in range(1 << 62):
                line = reader.line_num + 1
                place = partial("{}: row {} (line {})".format, path.name, number, line)
                row = next(reader, None)
                if row is None:
                    return
                if None in row or None in row.values():
                    refuse(RequestError(f"{place()}: has not as many cells as the header; quote cells that hold a separator"), problems)
                    continue
                yield RawRecord(row, place, number)
    except csv.Error as error:  # nothing can be found again behind an open quote
        raise RequestError(f"{path}: line {reader.line_num}: not {path.suffix[1:].upper()}: {error}") from None
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from None


def _dataset_records(source: str, columns: Columns) -> Iterator[RawRecord]:
    import datasets

    table = _load(datasets, source)
    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    for number, row in enumerate(table):
        yield RawRecord(row, partial("{}: row {}".format, source, number), number)


def _load(datasets: Any, source: str) -> Any:
    name, _, split = source.partition(":")
    path = Path(source)
    try:
        if path.is_dir() and (path / "dataset_info.json").exists():
            return datasets.load_from_disk(source)
        if path.suffix in (".parquet", ".arrow"):
            return datasets.load_dataset(path.suffix[1:], data_files=source, split="train")
        if path.is_file():
            raise RequestError(f"{path}: not a table that can be read; give .json, .jsonl, .csv, .tsv, .parquet or .arrow")
        if path.is_dir() or name.count("/") == 1:
            return datasets.load_dataset(name, split=split or "train")
    except RequestError:
        raise
    except Exception as error:  # datasets and what is below it raise whatever a broken file leads them to
        raise RequestError(f"{source}: datasets could not load it: {type(error).__name__}: {shown(error, 200)}") from None
    raise RequestError(f"{source}: no such file")


def row_of(example: Example) -> dict[str, str | None]:
    """An example as a row with the columns that `Columns` expects.

    Raises:
        RequestError: the example has several rounds, which a table can't hold.
    """
    if example.history:
        raise RequestError(f"{shown(example.id)}: has {len(example.history) + 1} rounds, a table row has one; write LLaVA's .json format")
    return {column: getattr(example, column) for column in WRITTEN}


def write_table(path: Path, examples: Iterable[Example]) -> int:
    """Writes .jsonl, .csv or .tsv, a row an example; returns how many."""
    count = 0
    with writing(path) as handle:
        writer = None
        if path.suffix in SEPARATORS:
            writer = csv.DictWriter(handle, WRITTEN, delimiter=SEPARATORS[path.suffix])
            writer.writeheader()
        for example in examples:
            row = row_of(example)
            if writer:
                writer.writerow(row)
            else:
                handle.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count
