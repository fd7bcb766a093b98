"""Reads any supported data file as examples. The format is detected from the content."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vlm_unlearn.data.formats import table
from vlm_unlearn.data.formats.base import FORMATS, Entry, get_format
from vlm_unlearn.data.formats.table import Columns, Table
from vlm_unlearn.data.json_stream import stream
from vlm_unlearn.data.training_set import read_dataset_json
from vlm_unlearn.errors import Problems, UserError
from vlm_unlearn.store import describe_path


def detect(source: str | Path) -> str:
    """Returns the format of a file or folder.

    Raises:
        UserError: The file does not exist or contains no records, or the folder is not a training set.
    """
    path = Path(source)
    if (path / "dataset.json").is_file():
        return "training_set"
    if path.is_dir() and (path / "forget.jsonl").exists():
        raise UserError(
            "is a training set without dataset.json, because its import did not finish. Run the import again.",
            code="run-unfinished",
            file=path,
        )
    if path.is_dir() and describe_path(path):
        problem = f"is neither a data file nor a training set{describe_path(path)}"
        raise UserError(problem, code="not-a-file", file=path)
    is_json = table.suffix(path) in (".json", ".jsonl", ".ndjson")
    table_suffixes = (*table.SEPARATORS, ".parquet", ".arrow", ".xlsx", ".xls", ".ods")
    if not is_json and (not path.is_file() or table.suffix(path) in table_suffixes):
        return "table"
    formats = {key: name for name, built_in in FORMATS.built_in_items() for key in built_in.identifying_keys}
    has_objects = False
    for item in stream(path):
        if isinstance(item.value, dict):
            has_objects = True
            for key, name in formats.items():
                if key in item.value:
                    return name
        if item.number >= 100:  # a few broken records at the start do not change the format
            break
    if has_objects:
        return "table"
    raise UserError("contains no records", code="no-records", file=path)


def read_any(
    source: str | Path,
    images: Path | None = None,
    columns: Columns | None = None,
    problems: Problems | None = None,
    format_name: str | None = None,
) -> Iterator[Entry]:
    """Reads the questions of a file or training set, one at a time, in file order.

    Args:
        source: A file, a training set, or the name of a dataset on the hub.
        images: The image root. None skips the check of the image files.
        columns: The names of a table's columns.
        problems: Collects broken records. Without it the first one raises.
        format_name: The name of the format. None detects it.

    Raises:
        UserError: The file cannot be read, or `problems` is None and a record is broken.
    """
    name = format_name or detect(source)
    if name == "table":
        yield from Table(columns).entries(source, images, problems)
    else:
        yield from get_format(name, "format").entries(Path(source), images, problems)


def image_roots(source: str | Path, images: Path | None) -> dict[str, Path]:
    """Returns the image root of each `Example.source` of a file.

    Args:
        source: A file or a training set.
        images: The image root. None uses the roots in the ``dataset.json`` of a training set, or the folder of the
            file.

    Raises:
        UserError: `images` is not a folder.
    """
    path = Path(source)
    if images is not None and not images.is_dir():
        raise UserError("no such image folder", code="not-a-folder", file=images)
    if detect(source) == "training_set":
        return {name: images or root for name, root in read_dataset_json(path)[0].items()}
    root = images or (path.parent if path.exists() else Path())
    return dict.fromkeys(("vlguard", "safe_eraser", "llava", "table"), root)
