"""Any supported file as examples: the format is told by the content, so that check, audit and diversify work on all of them."""

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
from vlm_unlearn.data.training_set import ROLES, describe
from vlm_unlearn.errors import Problems, UserError, quoted, report_problem
from vlm_unlearn.records import Example, Kind
from vlm_unlearn.store import describe_path

Format = Literal["training_set", "vlguard", "safe_eraser", "llava", "table"]
VLGUARD_SETS: dict[Kind, str] = {
    "unsafe": "forget",
    "safe": "retain",
    "safe_image_unsafe_question": "safe_image_unsafe",
}
_MARKS: dict[str, Format] = {
    "instr-resp": "vlguard",
    "unsafe_pairs": "safe_eraser",
    "SDImage_path": "safe_eraser",
    "conversations": "llava",
}


@dataclass(frozen=True)
class Entry:
    """One question of a data file."""

    example: Example
    set: str  # forget, retain, decouple, or "" where the format knows no sets
    refused: (
        bool | None
    )  # whether a model that learns this file by safety fine-tuning refuses it; None: only the answer tells


def detect(source: str | Path) -> Format:
    """The format of a file or folder.

    Raises:
        UserError: there is no such file, or it holds no record.
    """
    path = Path(source)
    if (path / "dataset.json").is_file():
        return "training_set"
    if path.is_dir() and (path / "forget.jsonl").exists():
        raise UserError(f"{path}: is a training set without dataset.json; its import was cut short, run it again")
    if path.is_dir() and describe_path(path):
        raise UserError(f"{path}: is no data file and no training set{describe_path(path)}")
    json_named = table.suffix(path) in (".json", ".jsonl", ".ndjson")
    others = (*table.SEPARATORS, ".parquet", ".arrow", ".xlsx", ".xls", ".ods")
    if not json_named and (not path.is_file() or table.suffix(path) in others):
        return "table"
    found = False
    for item in stream(path):
        if isinstance(item.value, dict):
            found = True
            for mark, name in _MARKS.items():
                if mark in item.value:
                    return name
        if item.number >= 100:  # one odd record at the head doesn't change what the file is
            break
    if found:
        return "table"
    raise UserError(f"{path}: holds no record")


def read_any(
    source: str | Path, images: Path | None = None, columns: Columns | None = None, problems: Problems | None = None
) -> Iterator[Entry]:
    """The questions of a file or training-set folder, one at a time, in file order.

    VLGuard's unsafe questions count as refused, those on safe images too: its reference answers refuse both. Those on safe images are
    a set of their own, ``safe_image_unsafe``, which `import` and `split` leave out unless asked.
    SafeEraser's benign-image questions are its decouple set, to be answered.

    Args:
        images: the image root, where the images' presence is to be checked.
        columns: a table's columns.
        problems: takes broken records; without it the first one raises.

    Raises:
        UserError: the file can't be read; a broken record where `problems` is None.
    """
    path = Path(source)
    match detect(source):
        case "training_set":
            yield from _training_set(path, problems)
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


def _training_set(folder: Path, problems: Problems | None) -> Iterator[Entry]:
    for name, raw in training_set_records(folder, problems):
        try:
            yield Entry(Example.model_validate(raw.value), name, name in ("forget", "preferred"))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(quoted(part)[1:-1] for part in first["loc"])
            report_problem(UserError(f"{raw.where}: {field}: {first['msg']}"), problems)


def training_set_records(folder: Path, problems: Problems | None) -> Iterator[tuple[str, RawRecord]]:
    """The set and the raw record of each line of a training set's files, those that its dataset.json lists."""
    listed = describe(folder)[1]
    for name in ROLES:
        if f"{name}.jsonl" in listed:
            for raw in read_objects(folder / f"{name}.jsonl", "id", problems):
                yield name, raw


def image_roots(source: str | Path, images: Path | None) -> dict[str, Path]:
    """The image root of each `Example.source` of a file: `images`, else what a training set says of itself, else the file's folder.

    Raises:
        UserError: `images` is no folder.
    """
    path = Path(source)
    if images is not None and not images.is_dir():
        raise UserError(f"{images}: no such folder of images")
    if detect(source) == "training_set":
        return {name: images or root for name, root in describe(path)[0].items()}
    root = images or (path.parent if path.exists() else Path())
    return dict.fromkeys(("vlguard", "safe_eraser", "llava", "table"), root)
