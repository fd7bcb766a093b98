"""The answer file of a run folder: merging the shards of several processes, sorting, and removing failed answers."""

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
SHARDS = "parts"  # folder with one answer file per process, until the main process merges them


@contextmanager
def response_log(folder: Path, group: ProcessGroup) -> Iterator[RecordLog]:
    """Opens the file to which this process appends its answers.

    A single process writes to the run's answer file. Each of several processes writes to a shard.

    Raises:
        UserError: A process of an earlier start still writes to the shard.
    """
    if group.size == 1:
        yield RecordLog(folder / RESPONSES, Response)
        return
    shard = folder / SHARDS / f"{group.rank}.jsonl"
    shard.parent.mkdir(exist_ok=True)
    with _lock_shard(shard):
        yield RecordLog(shard, Response)


def merge_shards(folder: Path) -> None:
    """Moves the answers of all shards to the run's answer file.

    If the process is killed, the next call completes the merge without lost or duplicate answers.

    Raises:
        UserError: A process of an earlier start still writes to a shard.
    """
    log = RecordLog(folder / RESPONSES, Response)
    for shard in sorted({file.with_suffix(".jsonl") for file in (folder / SHARDS).glob("*.*")}):
        with _lock_shard(shard):
            if shard.exists():
                RecordLog(shard, Response)  # drops a half-written last line
                log.append(read_records(shard, Response))
    shutil.rmtree(folder / SHARDS, ignore_errors=True)


@contextmanager
def _lock_shard(shard: Path) -> Iterator[None]:
    try:
        with FileLock(shard.with_suffix(".lock"), timeout=0):
            yield
    except Timeout:
        raise UserError(
            "another process is writing answers to this folder. Stop it, or wait until it has finished.",
            code="run-locked",
            file=shard.parent.parent,
        ) from None


def sort_responses(folder: Path, keys: Sequence[ResponseKey]) -> None:
    """Rewrites the run's answer file in the order of `keys`, if it is not in that order."""
    responses = {response.key: response for response in read_records(folder / RESPONSES, Response)}
    if list(responses) != list(keys) or sum(1 for _ in read_records(folder / RESPONSES, Response)) != len(keys):
        write_records(folder / RESPONSES, [responses[key] for key in keys])


def failed_responses(folder: Path) -> set[ResponseKey]:
    """Returns the keys of the run's failed answers."""
    file = folder / RESPONSES
    if not file.exists():
        return set()
    RecordLog(file, Response)  # drops a half-written last line
    return {response.key for response in read_records(file, Response) if response.error is not None}


def remove_failed_responses(folder: Path, failed: Collection[ResponseKey]) -> None:
    """Removes failed answers, the verdicts on them and the batching check, so that the run generates them again."""
    manifest = read_manifest(folder)
    write_json(folder / "manifest.json", {**manifest, "finished": False})
    (folder / "batching.json").unlink(missing_ok=True)
    for verdicts in folder.glob("verdicts-*.jsonl"):
        RecordLog(verdicts, Verdict)
        write_records(verdicts, [verdict for verdict in read_records(verdicts, Verdict) if verdict.key not in failed])
    file = folder / RESPONSES
    write_records(file, [response for response in read_records(file, Response) if response.key not in failed])
