"""Training sets: the folders that `data import` writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from vlm_unlearn.data.formats.base import Entry, Format, register
from vlm_unlearn.data.formats.fields import RawRecord, read_objects
from vlm_unlearn.data.training_set import ROLES, read_dataset_json
from vlm_unlearn.errors import Problems, quoted, report_problem
from vlm_unlearn.records import Example


@register("training_set")
class TrainingSetFolder(Format):
    """A folder with ``dataset.json`` and a file for each role."""

    def entries(self, path: Path, images: Path | None, problems: Problems | None = None) -> Iterator[Entry]:
        for name, raw in training_set_records(path, problems):
            try:
                yield Entry(Example.model_validate(raw.value), name, name in ("forget", "preferred"))
            except ValidationError as error:
                details = error.errors()[0]
                field = ".".join(quoted(key)[1:-1] for key in details["loc"])
                report_problem(raw.error(details["msg"], "invalid-field", field), problems)


def training_set_records(folder: Path, problems: Problems | None) -> Iterator[tuple[str, RawRecord]]:
    """Yields the set and the raw record of each line in the files that the ``dataset.json`` of a training set lists."""
    listed = read_dataset_json(folder)[1]
    for name in ROLES:
        if f"{name}.jsonl" in listed:
            for raw in read_objects(folder / f"{name}.jsonl", "id", problems):
                yield name, raw
