"""Tables with a question and an answer per row, or with chat messages as in TRL.

Supported are JSON lines, CSV, TSV, and everything that `datasets` loads: parquet, arrow, and datasets on the hub.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from vlm_unlearn.data.formats.base import KINDS_OF_SETS, Entry, Format, register
from vlm_unlearn.data.formats.fields import RawRecord, parse_records, read_objects
from vlm_unlearn.data.formats.groups import AttackRecord, prompts_of_groups
from vlm_unlearn.data.formats.llava import validate_no_embedded_image
from vlm_unlearn.data.formats.table_rows import SETS as SETS
from vlm_unlearn.data.formats.table_rows import Columns as Columns
from vlm_unlearn.data.formats.table_rows import Row as Row
from vlm_unlearn.data.formats.table_rows import cell_text as cell_text
from vlm_unlearn.data.formats.table_rows import is_chat, read_row
from vlm_unlearn.data.formats.table_rows import set_of as set_of
from vlm_unlearn.data.image_paths import UNPACKED
from vlm_unlearn.data.json_stream import MAX_RECORD_BYTES, UNDECODED, dump
from vlm_unlearn.data.rows import read_rows
from vlm_unlearn.errors import Problems, UserError, nearest, quoted, report_problem
from vlm_unlearn.records import Example, Kind, Prompt
from vlm_unlearn.store import cache_folder, detect_encoding, is_other_encoding, not_utf8, open_atomically

SEPARATORS = {".csv": ",", ".tsv": "\t"}
OUTPUT_COLUMNS = ("id", "image", "question", "answer", "category", "pair_id", "set")


def read_table(
    source: str | Path,
    columns: Columns,
    images: Path | None,
    problems: Problems | None = None,
    embedded: Path | None = None,
    answered: bool = True,
) -> Iterator[Row]:
    """Reads the rows of a table, one at a time.

    Args:
        source: A file, a folder that `datasets` saved, or the name of a dataset on the hub (``owner/name:split``).
        columns: The names of the columns.
        images: The image root. None skips the check of the image files.
        problems: Collects broken rows. Without it the first one raises.
        embedded: The folder for images that are stored in the table. Each is written under the digest of its content.
        answered: Whether messages must end with an answer.

    Raises:
        UserError: The table cannot be read or lacks a column, or `problems` is None and a row is broken.
    """
    return parse_records(
        raw_rows(source, columns, problems),
        lambda record: read_row(record, columns, images, embedded, answered),
        problems,
    )


def raw_rows(source: str | Path, columns: Columns, problems: Problems | None) -> Iterator[RawRecord]:
    """Reads the unparsed rows of a table, one at a time, after a check that the table has the required columns.

    Args:
        source: As in `read_table`.
        columns: The names of the columns.
        problems: Collects broken rows. Without it the first one raises.

    Raises:
        UserError: The table cannot be read or lacks a column, or `problems` is None and a row is broken.
    """
    records = raw_records(source, columns.id, problems)
    yield from _with_required_columns(records, columns, Path(source).name)


def raw_records(source: str | Path, name_field: str, problems: Problems | None) -> Iterator[RawRecord]:
    """Reads the unparsed rows of a file, one at a time, whatever its columns are.

    Args:
        source: As in `read_table`.
        name_field: The column with the id of a row, for error messages.
        problems: Collects broken rows. Without it the first one raises.

    Raises:
        UserError: The file cannot be read, or `problems` is None and a row is broken.
    """
    path = Path(source)
    kind = suffix(path)
    if kind in (".xlsx", ".xls", ".ods"):
        raise UserError("spreadsheets are not supported. Save it as CSV (UTF-8).", code="invalid-table", file=path)
    if kind in SEPARATORS:
        records = csv_records(path, SEPARATORS[kind], problems)
    elif path.is_file() and kind not in (".parquet", ".arrow"):
        records = read_objects(path, name_field, problems)
    else:
        records = _dataset_records(str(source))
    yield from records


def suffix(path: Path) -> str:
    """Returns the suffix that identifies the type of a file, in lower case: ``.csv`` for ``A.CSV``."""
    return path.suffix.lower()


def _with_required_columns(records: Iterable[RawRecord], columns: Columns, name: str) -> Iterator[RawRecord]:
    records = iter(records)
    head = list(islice(records, 20))  # a single row without the column is a broken row, twenty are a wrong table
    is_question_table = not any(is_chat(record, columns) for record in head)
    for field in dict.fromkeys((*(("question", "answer") * is_question_table), *sorted(columns.required))):
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


def csv_records(path: Path, separator: str, problems: Problems | None) -> Iterator[RawRecord]:
    """Reads the rows of a CSV or TSV file as objects with the column names as keys, one at a time.

    Args:
        path: The file. Its first line contains the column names.
        separator: The character between two cells.
        problems: Collects rows with too few or too many cells. Without it the first one raises.

    Raises:
        UserError: The file cannot be read, is not UTF-8, or is not CSV. `problems` is None and a row is broken.
    """
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

    for number, row in enumerate(read_rows(_load(datasets, source), source)):
        yield RawRecord(row.value, source, partial(str, number + 1), number)


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

    Rows with the same id are rewrites of one question and form a group. Messages have no sets, so that all of them are
    of this kind, unless the file has a set column. Images that are stored inside the table must be in the folder
    `UNPACKED` of the cache.
    """

    def records() -> Iterator[AttackRecord]:
        for row in rows:
            example = row.example
            row_kind = kind if row.is_chat and row.set is None else KINDS_OF_SETS.get(row.set or "")
            if row_kind == kind:
                record = AttackRecord.of_example(example)
                yield record._replace(image=f"{UNPACKED}/{record.image}") if example.source == "embedded" else record

    yield from prompts_of_groups(records(), set_name, kind)


def row_of(example: Example, set_name: str | None) -> dict[str, str | None]:
    """Returns an example as a row with the columns in `OUTPUT_COLUMNS`.

    Raises:
        UserError: The example has several rounds, a system message or an image inside a table. Rows have none of them.
    """
    problem = ""
    if example.history:
        problem = f"has {len(example.history) + 1} rounds, but a row has one. Write LLaVA's .json format."
    elif example.system is not None:
        problem = "has a system message, but a row has none. Remove it."
    if problem:
        raise UserError(f"the conversation {problem}", code="unsupported-setting", record=quoted(example.id))
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
    """Rows of CSV, TSV, JSON lines, parquet and everything else that `datasets` loads, with columns or with messages.

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
        unpacked = cache_folder() / UNPACKED
        return prompts(read_table(path, self._columns, images, None, unpacked, answered=False), set_name, kind)
