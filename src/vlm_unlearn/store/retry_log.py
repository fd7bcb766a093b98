"""Replaces failed records of a finished file without a moment in which the file lacks a record."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from vlm_unlearn.records import AnswerRecord
from vlm_unlearn.store.files import RecordLog, read_records, write_records


class RetryLog:
    """A `RecordLog` whose records of certain keys are replaced once their successors exist.

    Successors are appended to ``<file>.retries``. `merge` puts them in the place of the old records and deletes that
    file. If the process is killed, the file keeps its old records, and the next `RetryLog` of it uses the successors
    that were saved.

    Args:
        path: The file.
        model: The type of its records.
        retried: The keys of the records to replace.

    Attributes:
        path: The file.
        keys: The keys of the records that are final.
    """

    def __init__(self, path: Path, model: type[AnswerRecord], retried: Collection[tuple[str, int]]) -> None:
        self.path = path
        self._model = model
        self._log = RecordLog(path, model)
        self._retries_file = path.with_name(f"{path.name}.retries")
        self._retries = RecordLog(self._retries_file, model)
        self._retried = set(retried) & self._log.keys
        self.keys = (self._log.keys - self._retried) | (self._retries.keys & self._retried)

    def append(self, records: Iterable[AnswerRecord]) -> None:
        """Appends the records whose keys are not final yet."""
        new_records = [record for record in records if record.key not in self.keys]
        self._retries.append([record for record in new_records if record.key in self._retried])
        self._log.append([record for record in new_records if record.key not in self._retried])
        self.keys.update(record.key for record in new_records)

    def merge(self) -> set[tuple[str, int]]:
        """Replaces the old records that have successors, in their places. Returns the keys of the replaced records."""
        if not self._retries_file.exists():
            return set()
        successors = {record.key: record for record in read_records(self._retries_file, self._model)}
        if successors:
            records = [successors.get(record.key, record) for record in read_records(self.path, self._model)]
            write_records(self.path, records)
        self._retries_file.unlink()
        return set(successors)
