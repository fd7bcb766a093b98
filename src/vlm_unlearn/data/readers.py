"""Reads any supported data file as examples. The format is detected from the content."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from vlm_unlearn.data.formats import llava, safe_eraser, table, vlguard
from vlm_unlearn.data.formats.fields import RawRecord, read_objects
from vlm_unlearn.data.formats.table import Columns
from vlm_unlearn.data.json_stream import stream
from vlm_unlearn.data.training_set import ROLES, read_dataset_json
from vlm_unlearn.errors import Problems, UserError, quoted, report_problem
from vlm_unlearn.records import Example, Kind
from vlm_unlearn.store import describe_path

Format = Literal["training_set", "vlguard", "safe_eraser", "llava", "table"]
VLGUARD_SETS: dict[Kind, str] = {
    "unsafe": "forget",
    "safe": "retain",
    "safe_image_unsafe_question": "safe_image_unsafe",
}
_IDENTIFYING_KEYS: dict[str, Format] = {
    "instr-resp": "vlguard",
    "unsafe_pairs": "safe_eraser",
    "SDImage_path": "safe_eraser",
    "conversations": "llava",
}


@dataclass(frozen=True)
class Entry:
    """One question of a data file.

    Attributes:
        example: The question with its answer.
        set: The set of the question, such as forget, retain or decouple. Empty if the format has no sets.
        refused: Whether safety fine-tuning on this file trains the model to refuse the question. None if only the
            answer can tell.
    """

    example: Example
    set: str
    refused: bool | None


def detect(source: str | Path) -> Format:
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
    has_objects = False
    for item in stream(path):
        if isinstance(item.value, dict):
            has_objects = True
            for key, format_name in _IDENTIFYING_KEYS.items():
                if key in item.value:
                    return format_name
        if item.number >= 100:  # a few broken records at the start do not change the format
            break
    if has_objects:
        return "table"
    raise UserError("contains no records", code="no-records", file=path)


def read_any(
    source: str | Path, images: Path | None = None, columns: Columns | None = None, problems: Problems | None = None
) -> Iterator[Entry]:
    """Reads the questions of a file or training set, one at a time, in file order.

    VLGuard's unsafe questions count as refused, also those about safe images, because its reference answers refuse
    both. The unsafe questions about safe images form the set ``safe_image_unsafe``, which `import` and `split` leave
    out by default. SafeEraser's questions about benign images form its decouple set. They are to be answered.

    Args:
        source: A file, a training set, or the name of a dataset on the hub.
        images: The image root. None skips the check of the image files.
        columns: The names of a table's columns.
        problems: Collects broken records. Without it the first one raises.

    Raises:
        UserError: The file cannot be read, or `problems` is None and a record is broken.
    """
    path = Path(source)
    match detect(source):
        case "training_set":
            yield from _read_training_set_entries(path, problems)
        case "vlguard":
            for _, pairs in vlguard.read_records(path, images, problems):
                for example, kind in ((vlguard.example(pair), pair.kind) for pair in pairs):
                    yield Entry(example, VLGUARD_SETS[kind], kind != "safe")
        case "safe_eraser":
            for record in safe_eraser.read_safe_eraser(path, images, problems):
                for name, examples in zip(safe_eraser.ROLES, safe_eraser.examples([record]), strict=True):
                    for example in examples:
                        yield Entry(example, name, name == "forget")
        case "llava":
            for example in llava.read_llava(path, images, problems):
                yield Entry(example, "", None)
        case "table":
            for row in table.read_table(source, columns or Columns(), images, problems):
                yield Entry(row.example, row.set or "", None if row.set is None else row.set in ("forget", "preferred"))


def _read_training_set_entries(training_set_dir: Path, problems: Problems | None) -> Iterator[Entry]:
    for name, raw in training_set_records(training_set_dir, problems):
        try:
            yield Entry(Example.model_validate(raw.value), name, name in ("forget", "preferred"))
        except ValidationError as error:
            details = error.errors()[0]
            field = ".".join(quoted(key)[1:-1] for key in details["loc"])
            report_problem(raw.error(details["msg"], "invalid-field", field), problems)


def training_set_records(training_set_dir: Path, problems: Problems | None) -> Iterator[tuple[str, RawRecord]]:
    """Yields the set and the raw record of each line in the files that the ``dataset.json`` of a training set lists."""
    listed = read_dataset_json(training_set_dir)[1]
    for name in ROLES:
        if f"{name}.jsonl" in listed:
            for raw in read_objects(training_set_dir / f"{name}.jsonl", "id", problems):
                yield name, raw


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
