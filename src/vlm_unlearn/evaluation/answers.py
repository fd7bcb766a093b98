"""The answers in a run folder: joined from several processes, put in order, asked anew where they failed."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from vlm_unlearn.distributed import ProcessGroup
from vlm_unlearn.errors import UserError
from vlm_unlearn.generation.base import ResponseKey
from vlm_unlearn.records import Response, Verdict
from vlm_unlearn.store import RecordLog, read_manifest, read_records, write_json, write_records

RESPONSES = "responses.jsonl"
PARTS = "parts"  # what each of several processes has answered, until the first joins it


@contextmanager
def response_log(folder: Path, together: ProcessGroup) -> Iterator[RecordLog]:
    """The file that this process writes its answers to: the run's, or of several processes each its own.

    Raises:
        UserError: a process that an earlier start left behind still writes there.
    """
    if together.size == 1:
        yield RecordLog(folder / RESPONSES, Response)
        return
    part = folder / PARTS / f"{together.rank}.jsonl"
    part.parent.mkdir(exist_ok=True)
    with _held(part):
        yield RecordLog(part, Response)


def merge_shards(folder: Path) -> None:
    """Adds what several processes have answered to the run's answers. A kill at any moment loses and doubles nothing.

    Raises:
        UserError: a process that an earlier start left behind still writes there.
    """
    log = RecordLog(folder / RESPONSES, Response)
    for part in sorted({file.with_suffix(".jsonl") for file in (folder / PARTS).glob("*.*")}):
        with _held(part):
            if part.exists():
                RecordLog(part, Response)  # drops a half-written line
                log.append(read_records(part, Response))
    shutil.rmtree(folder / PARTS, ignore_errors=True)


@contextmanager
def _held(part: Path) -> Iterator[None]:
    try:
        with FileLock(part.with_suffix(".lock"), timeout=0):
            yield
    except Timeout:
        raise UserError(f"{part.parent.parent}: another process is at work in this folder") from None


def sort_responses(folder: Path, keys: Sequence[ResponseKey]) -> None:
    """Writes the answers in the order of `keys`, whatever order they came in."""
    found = {response.key: response for response in read_records(folder / RESPONSES, Response)}
    if list(found) != list(keys) or sum(1 for _ in read_records(folder / RESPONSES, Response)) != len(keys):
        write_records(folder / RESPONSES, [found[key] for key in keys])


def failed_responses(folder: Path) -> set[ResponseKey]:
    """The questions whose answers failed."""
    file = folder / RESPONSES
    if not file.exists():
        return set()
    RecordLog(file, Response)  # drops a half-written line
    return {response.key for response in read_records(file, Response) if response.error is not None}


def remove_failed_responses(folder: Path, failed: Collection[ResponseKey]) -> None:
    """Takes out the answers that failed, and what was made of them, so that they are asked anew."""
    manifest = read_manifest(folder)
    write_json(folder / "manifest.json", {**manifest, "finished": False})
    (folder / "batching.json").unlink(missing_ok=True)
    for verdicts in folder.glob("verdicts-*.jsonl"):
        RecordLog(verdicts, Verdict)
        write_records(verdicts, [verdict for verdict in read_records(verdicts, Verdict) if verdict.key not in failed])
    file = folder / RESPONSES
    write_records(file, [response for response in read_records(file, Response) if response.key not in failed])
