"""Files: written atomically, read with errors that name file and line, append-only JSON lines that survive kill -9, digests."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

from pydantic import BaseModel, ValidationError

from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.records import AnswerRecord

Model = TypeVar("Model", bound=BaseModel)


def user_path(name: str | Path) -> Path:
    """A path with ``~`` as the user's home; that of a user who isn't there stays as it is written, and so is no folder."""
    return Path(os.path.expanduser(name))  # pathlib's raises a RuntimeError for it


@contextmanager
def open_atomically(path: Path) -> Iterator[TextIO]:
    """A text file to write, of any size, so that a reader, or a kill at any moment, sees the old content or the new, never a part.

    A link is followed. A lone surrogate, which no UTF-8 file can hold, is written as ``?``.

    Raises:
        UserError: a folder, or something else than a file, is there, or the file can't be made.
    """
    _refuse_special(path)
    target = path.resolve() if path.is_symlink() else path
    part = target.with_name(f".{target.name[:100]}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_stale_temp_files(target.parent, glob.escape(target.name[:100]))
        handle = part.open("w", encoding="utf-8", errors="replace", newline="")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; choose another output") from None
    try:
        with handle:
            yield handle
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def remove_stale_temp_files(folder: Path, name: str = "*") -> None:
    """Deletes what processes that were killed while they wrote a file of such a name have left, ``.NAME.PROCESS.part``."""
    for part in folder.glob(f".{name}.*.part"):
        pid = part.suffixes[-2][1:] if len(part.suffixes) > 1 else ""
        if pid.isdecimal() and part.is_file() and not _alive(int(pid)):
            part.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    import psutil

    return bool(psutil.pid_exists(pid))


def _refuse_special(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file to write")
    _refuse_endless(path, "name a file to write")


def _refuse_endless(path: Path, mend: str = "a file is wanted") -> None:
    """Refuses what reading may never come to an end of."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path}: is a device or a pipe; {mend}")


def validate_not_overwriting(outputs: Iterable[Path], inputs: Iterable[str | Path | None]) -> None:
    """Looks before anything is written that no output is an input, under whatever name.

    Raises:
        UserError: one is, or a folder or a device stands where a file is to be written.
    """
    known = [Path(source) for source in inputs if source is not None]
    for out in outputs:
        _refuse_special(out)
        for source in known:
            if out.exists() and source.exists() and out.samefile(source):
                raise UserError(f"{out}: is an input too; choose another output")


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically."""
    with open_atomically(path) as handle:
        handle.write(replace_surrogates(text))


def replace_surrogates(text: str) -> str:
    """The text with lone surrogates, which no UTF-8 file can hold, replaced by U+FFFD."""
    return text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")


def write_json(path: Path, value: object) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        UserError: the file is missing, or is not JSON; the line is named.
    """
    _refuse_endless(path)
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply to be data") from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{path}: {error}") from None


def read_records(path: Path, model: type[Model]) -> Iterator[Model]:
    """Yields the records of a JSON-lines file.

    Raises:
        UserError: the file is missing or a line is not such a record; the line and the field are named.
    """
    _refuse_endless(path)
    try:
        handle = path.open(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    with handle:
        try:
            for number, line in enumerate(handle, start=1):
                if line.strip():
                    yield _parse(model, line, f"{path}: line {number}")
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8 text") from None


def _parse(model: type[Model], line: str, where: str) -> Model:
    try:
        return model.model_validate_json(line)
    except ValidationError as error:
        raise UserError(f"{where}: {describe_validation_error(error)}") from None


def describe_validation_error(error: ValidationError) -> str:
    """``"field: what is wrong with it"``, of the first of the problems; the file's own words in it are escaped."""
    first = error.errors()[0]
    field = ".".join(quoted(part)[1:-1] for part in first["loc"])
    return f"{field + ': ' if field else ''}{first['msg']}"


def dump_record(record: BaseModel) -> str:
    """One JSON line."""
    return replace_surrogates(json.dumps(record.model_dump(mode="python", by_alias=True), ensure_ascii=False)) + "\n"


def write_records(path: Path, records: Iterable[BaseModel]) -> int:
    """Writes a whole JSON-lines file atomically; returns how many records it holds."""
    count = 0
    with open_atomically(path) as handle:
        for record in records:
            handle.write(dump_record(record))
            count += 1
    return count


class RecordLog:
    """An append-only JSON-lines file, keyed by id, that a run killed at any moment can go on with.

    Opening it drops a half-written last line. `append` writes whole batches in one call; a key that is there already is
    passed over, so that nothing is doubled.
    """

    def __init__(self, path: Path, model: type[AnswerRecord]) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _refuse_endless(path)
            _drop_half_line(path)
        self.keys = {record.key for record in read_records(path, model)} if path.exists() else set()

    def append(self, records: Iterable[AnswerRecord]) -> None:
        """Adds the records whose key is not there yet, in one write."""
        fresh = [record for record in records if record.key not in self.keys]
        if not fresh:
            return
        with self.path.open("ab") as handle:
            handle.write("".join(dump_record(record) for record in fresh).encode("utf-8"))
            handle.flush()
            os.fsync(handle.fileno())
        self.keys.update(record.key for record in fresh)


def _drop_half_line(path: Path) -> None:
    with path.open("rb+") as handle:
        size = handle.seek(0, os.SEEK_END)
        end = size
        while end > 0:
            start = max(0, end - 65536)
            handle.seek(start)
            newline = handle.read(end - start).rfind(b"\n")
            if newline >= 0:
                handle.truncate(start + newline + 1)
                return
            end = start
        handle.truncate(0)


def digest_text(text: str) -> str:
    """SHA-256 of a text, as hexadecimal."""
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def digest_json(value: object) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return digest_text(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str))


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest_model(folder: Path) -> str:
    """SHA-256 over a model folder's weights, configuration, tokenizer and chat template (their bytes, never the path)."""
    wanted = {".safetensors", ".json", ".jinja", ".model", ".txt"}
    files = sorted(
        path for path in folder.iterdir() if path.is_file() and path.suffix in wanted and path.name != "manifest.json"
    )
    return digest_json({path.name: digest_file(path) for path in files})
