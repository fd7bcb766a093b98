"""The prediction files of VLMEvalKit, ``MODEL_DATASET.tsv`` or ``.json``, and CSV.

A row has the columns of the benchmark, such as ``index``, ``question`` and ``image_path``, and ``prediction``. The
format of the file is that of the variable PRED_FORMAT, whose default is ``xlsx``. Spreadsheets cut texts after 32,767
characters and are not read. A prediction that begins with the words of `FAILURE` is a failed request.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vlm_unlearn.data.answer_formats.base import AnswerFormat, ForeignAnswer, register
from vlm_unlearn.data.formats.fields import RawRecord, read_objects
from vlm_unlearn.data.formats.table import SEPARATORS, csv_records, suffix
from vlm_unlearn.errors import UserError, quoted

FAILURE = "Failed to obtain answer"
SPREADSHEETS = (".xlsx", ".xls", ".ods")


@register("vlmevalkit")
class VLMEvalKit(AnswerFormat):
    """The prediction files of VLMEvalKit. Question, image and index identify the prompts."""

    def answers(self, path: Path) -> Iterator[ForeignAnswer]:
        kind = suffix(path)
        if kind in SPREADSHEETS:
            raise UserError(
                "spreadsheets are not read. Save the sheet as tab-separated text (.tsv, UTF-8), or set PRED_FORMAT=tsv "
                "and start VLMEvalKit's run.py again with --reuse.",
                code="invalid-table",
                file=path,
            )
        if kind in (".pkl", ".pickle"):
            raise UserError(
                "pickle files can run code and are not read. Pass a .tsv or .json file, from PRED_FORMAT=tsv or json.",
                code="invalid-table",
                file=path,
            )
        if kind in SEPARATORS:
            records = csv_records(path, SEPARATORS[kind], None)
        else:
            records = read_objects(path, "index", nan_as_null=True)
        return map(_answer, records)


def _answer(record: RawRecord) -> ForeignAnswer:
    if "prediction" not in record.value:
        columns = ", ".join(quoted(key, 40) for key in list(record.value)[:20])
        raise record.error(
            f"the column is missing. The columns are {columns}. Pass a file with VLMEvalKit's predictions.",
            "missing-field",
            "prediction",
        )
    text = None if record.value["prediction"] is None else _cell(record, "prediction")
    error = None
    if text is None or text.startswith(FAILURE):
        text, error = None, f"VLMEvalKit: {text or 'no prediction'}"
    index = "" if record.value.get("index") is None else _cell(record, "index")
    is_number = index.isdecimal() and len(index) < 16  # the number of a row, which is no id
    image = record.value.get("image_path")
    is_name = isinstance(image, str) and bool(image) and not image.startswith("[")  # a list names several images
    return ForeignAnswer(
        lambda: str(record.position),
        text,
        error=error,
        group=None if is_number else index or None,
        question=record.text("question"),
        image=record.text("image_path") if is_name else None,
        number=int(index) if is_number else None,
    )


def _cell(record: RawRecord, column: str) -> str:
    """Returns the text of a cell, which may be empty. JSON files contain numbers where all predictions are numbers."""
    value = record.value[column]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return record.text(column, empty=True)
