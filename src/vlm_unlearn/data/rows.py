"""Reads the rows of data sets in memory: a `datasets.Dataset`, or a list of dicts."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from vlm_unlearn.errors import UserError

_ROWS_AT_ONCE = 16  # read from a `datasets.Dataset` while its texts are read: a row may contain megabytes of image


def value_at(value: Any, path: tuple[str | int, ...]) -> Any:
    """Returns the value at the keys of a nested value."""
    for key in path:
        value = value[key]
    return value


class Row:
    """A row of a list, whose images are held by the caller's objects.

    Attributes:
        value: The columns of the row. Images are undecoded.
    """

    def __init__(self, value: Mapping[str, Any]) -> None:
        self.value = value if isinstance(value, dict) else dict(value)

    def loader(self, path: tuple[str | int, ...]) -> partial[Any] | None:
        """Returns a function that loads the image at the keys `path`, or None to hold the image itself."""
        return None


class TableRow(Row):
    """A row of a `datasets.Dataset`, whose images are read again when they are used."""

    def __init__(self, value: Mapping[str, Any], table: Any, number: int) -> None:
        super().__init__(value)
        self._table = table
        self._number = number

    def loader(self, path: tuple[str | int, ...]) -> partial[Any] | None:
        return partial(_load_cell, self._table, self._number, path)


def _load_cell(table: Any, number: int, path: tuple[str | int, ...]) -> Any:
    """Returns the stored value of one cell, undecoded."""
    column, *keys = path
    return value_at(table[number].column(column)[0].as_py(), tuple(keys))


def column_names(table: Any) -> Sequence[str]:
    """Returns the columns of a `datasets.Dataset` or of the first row of a list."""
    columns = getattr(table, "column_names", None)
    if columns is None and isinstance(table, list | tuple) and table and isinstance(table[0], Mapping):
        columns = list(table[0])
    return columns or ()


def validate_not_streamed(table: Any) -> None:
    """Validates that a table is not a streaming data set.

    Raises:
        UserError: The table is a `datasets.IterableDataset`.
    """
    datasets: Any = sys.modules.get("datasets")
    if datasets is not None and isinstance(table, datasets.IterableDataset):
        raise UserError(
            "a streaming data set has no length and no random access. Load it without streaming=True, or take its "
            "first rows: Dataset.from_list(list(data.take(1000))).",
            code="streaming-dataset",
        )


def read_rows(table: Any, name: str) -> Iterator[Row]:
    """Yields the rows of a table. Images of a `datasets.Dataset` are bytes or paths, as stored.

    Args:
        table: A `datasets.Dataset`, or a list of dicts.
        name: The name of the table in error messages.

    Raises:
        UserError: The table has a transform, or is no table.
    """
    datasets: Any = sys.modules.get("datasets")  # a value of this type exists only if the module has been imported
    if datasets is not None and isinstance(table, datasets.Dataset):
        yield from _dataset_rows(table, name)
    elif isinstance(table, Sequence) and not isinstance(table, str | bytes):
        for number, row in enumerate(table, start=1):
            if not isinstance(row, Mapping):
                problem = f"a row must be a dict, found {type(row).__name__}"
                raise UserError(problem, code="invalid-field", record=number, field=name)
            yield Row(row)
    else:
        raise UserError(
            f"is a {type(table).__name__}. Pass a datasets.Dataset or a list of dicts, such as "
            "Dataset.from_pandas(frame) or list(rows).",
            code="invalid-field",
            field=name,
        )


def _dataset_rows(dataset: Any, name: str) -> Iterator[Row]:
    if dataset.format["type"] == "custom":
        raise UserError(
            "has a transform, which is applied to decoded rows only. Apply it with Dataset.map, or remove it with "
            "with_format(None).",
            code="unsupported-setting",
            field=name,
        )
    table = dataset.with_format("arrow")
    features = dataset.features
    undecoded = type(features)({column: _undecoded(feature) for column, feature in features.items()})
    names = {column: feature.int2str for column, feature in features.items() if hasattr(feature, "int2str")}
    number = 0
    for batch in table.iter(batch_size=_ROWS_AT_ONCE):
        for stored in batch.to_pylist():
            row = undecoded.decode_example(stored)
            for column, int2str in names.items():  # a ClassLabel is stored as a number
                if row[column] is not None:
                    row[column] = int2str(row[column]) if row[column] >= 0 else None  # -1 is a missing label
            yield TableRow(row, table, number)
            number += 1


def _undecoded(feature: Any) -> Any:
    """Returns a feature of `datasets` in which images are not decoded."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List | datasets.LargeList):
        return type(feature)(_undecoded(feature.feature))
    if isinstance(feature, dict):
        return {name: _undecoded(value) for name, value in feature.items()}
    return feature
