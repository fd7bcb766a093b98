"""Files: atomic writing, reading with errors that name file and line, append-only logs of records, and digests."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, Protocol, TextIO, TypeVar

from pydantic import BaseModel, ValidationError

from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.records import AnswerRecord
from vlm_unlearn.store.encodings import decode_text, not_utf8

MANIFEST = "manifest.json"  # the file that makes a folder the folder of a run
Model = TypeVar("Model", bound=BaseModel)
_ENCODER = json.JSONEncoder(ensure_ascii=False)  # `json.dumps` would create one for each record
AnswerType = TypeVar("AnswerType", bound=AnswerRecord)


def user_path(name: str | Path) -> Path:
    """Returns the path with ``~`` replaced by the user's home folder. ``~NAME`` of an unknown user is not replaced."""
    return Path(os.path.expanduser(name))  # Path.expanduser raises a RuntimeError for an unknown user


@contextmanager
def open_atomically(path: Path) -> Iterator[TextIO]:
    """Opens a text file that replaces `path` when the block ends without an error.

    A reader, also after a kill at any moment, finds either the old content or the complete new content. A symbolic link
    is followed. A lone surrogate, which UTF-8 cannot encode, is written as ``?``.

    Raises:
        UserError: The path is a folder or a device, or the file cannot be created.
    """
    _check_writable_kind(path)
    target = path.resolve() if path.is_symlink() else path
    temporary = target.with_name(f".{target.name[:100]}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_stale_temp_files(target.parent, glob.escape(target.name[:100]))
        handle = temporary.open("w", encoding="utf-8", errors="replace", newline="")
    except OSError as error:
        raise UserError(f"{error.strerror}; choose another output", code="output-not-writable", file=path) from None
    try:
        with handle:
            yield handle
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def remove_stale_temp_files(directory: Path, name: str = "*") -> None:
    """Deletes the temporary files ``.NAME.PID.part`` of processes that were killed while they wrote a file.

    Args:
        name: Name of the file, as a glob pattern.
    """
    for temporary in directory.glob(f".{name}.*.part"):
        pid = temporary.suffixes[-2][1:] if len(temporary.suffixes) > 1 else ""
        if pid.isdecimal() and temporary.is_file() and not _is_alive(int(pid)):
            temporary.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    import psutil

    return bool(psutil.pid_exists(pid))


def _check_writable_kind(path: Path) -> None:
    """Checks that a path is free or a regular file."""
    if path.is_dir():
        raise UserError("is a folder; name a file to write", code="not-a-file", file=path)
    _check_not_endless(path, "name a file to write")


def _check_not_endless(path: Path, fix: str = "pass a file") -> None:
    """Checks that a path is not a device or a pipe, which reading may never come to the end of."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"is a device or a pipe; {fix}", code="not-a-file", file=path)


def validate_not_overwriting(outputs: Iterable[Path], inputs: Iterable[str | Path | None]) -> None:
    """Checks that no output is also an input, for example through a link, or an existing file of an input folder.

    Raises:
        UserError: An output is an input, a file of an input folder, a folder or a device.
    """
    sources = [Path(source) for source in inputs if source is not None]
    for out in outputs:
        _check_writable_kind(out)
        for source in sources:
            if out.exists() and source.exists() and out.samefile(source):
                raise UserError("is also an input; choose another output", code="output-exists", file=out)
            if out.exists() and source.is_dir() and out.resolve().is_relative_to(source.resolve()):
                raise UserError(
                    f"is a file of the input {source}; choose another output", code="output-exists", file=out
                )


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically."""
    with open_atomically(path) as handle:
        handle.write(replace_surrogates(text))


def replace_surrogates(text: str) -> str:
    """Returns the text with lone surrogates, which UTF-8 cannot encode, replaced by U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")


def write_json(path: Path, value: object) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_text(path, dump_json(value))


def dump_json(value: object) -> str:
    """Returns `value` as indented JSON, the content of a file of `write_json`."""
    return replace_surrogates(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


class DuplicateKeyError(ValueError):
    """A JSON object has a key twice. JSON readers would silently use the last value."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the object of key-value pairs, as the `object_pairs_hook` of a JSON decoder.

    Raises:
        DuplicateKeyError: A key occurs twice.
    """
    value = dict(pairs)
    if len(value) < len(pairs):
        keys: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in keys or keys.add(key))  # type: ignore[func-returns-value]
        raise DuplicateKeyError(f"an object contains the key {quoted(duplicate)} twice. Keep one of the two.")
    return value


def read_text(path: Path) -> str:
    """Reads a text file in UTF-8, UTF-16 or UTF-32.

    Raises:
        UserError: The file is missing, cannot be read, or has another encoding.
    """
    _check_not_endless(path)
    try:
        return decode_text(path.read_bytes(), path)
    except FileNotFoundError:
        raise UserError("no such file", code="file-not-found", file=path) from None
    except OSError as error:
        raise UserError(str(error.strerror), code="file-unreadable", file=path) from None


def read_json(path: Path) -> Any:
    """Reads a JSON file in UTF-8 or UTF-16.

    Raises:
        UserError: The file is missing or not valid JSON, and then the message contains the line. It has another
            encoding, or an object has a key twice.
    """
    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except DuplicateKeyError as error:
        raise UserError(str(error), code="duplicate-key", file=path) from None
    except json.JSONDecodeError as error:
        message = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise UserError(message, code="invalid-json", file=path) from None
    except RecursionError:
        raise UserError("the JSON is nested too deeply", code="invalid-json", file=path) from None
    except ValueError as error:  # a number with thousands of digits
        raise UserError(str(error), code="invalid-json", file=path) from None


def read_records(path: Path, model: type[Model]) -> Iterator[Model]:
    """Yields the records of a JSON-lines file.

    Raises:
        UserError: The file is missing, or a line is not a valid record. `record` is the line number, and `field` the
            first invalid field.
    """
    _check_not_endless(path)
    try:
        handle = path.open(encoding="utf-8-sig")
    except OSError as error:
        code = "file-not-found" if isinstance(error, FileNotFoundError) else "file-unreadable"
        raise UserError(str(error.strerror), code=code, file=path) from None
    with handle:
        try:
            for number, line in enumerate(handle, start=1):
                if line.strip():
                    yield _parse(model, line, path, number)
        except UnicodeDecodeError:
            raise not_utf8(path) from None


def _parse(model: type[Model], line: str, path: Path, number: int) -> Model:
    try:
        return model.model_validate_json(line)
    except ValidationError as error:
        field, message = first_problem(error)
        code = "invalid-field" if field else "invalid-json"
        raise UserError(message, code=code, file=path, record=number, field=field) from None


def first_problem(error: ValidationError) -> tuple[str | None, str]:
    """Returns the field and the message of the first problem. Keys of the file in the field are escaped."""
    first = error.errors()[0]
    field = ".".join(quoted(key)[1:-1] for key in first["loc"])
    return field or None, first["msg"]


def describe_validation_error(error: ValidationError) -> str:
    """Returns the first problem as ``"FIELD: MESSAGE"``. Keys of the file in the field are escaped."""
    field, message = first_problem(error)
    return f"{field}: {message}" if field else message


def dump_record(record: BaseModel) -> str:
    """Returns a record as one line of JSON."""
    return replace_surrogates(_ENCODER.encode(record.model_dump(mode="python", by_alias=True))) + "\n"


def write_records(path: Path, records: Iterable[BaseModel]) -> int:
    """Writes a JSON-lines file atomically and returns the number of its records."""
    count = 0
    with open_atomically(path) as handle:
        for record in records:
            handle.write(dump_record(record))
            count += 1
    return count


class RecordSink(Protocol):
    """Collects records about answers, in a file (`RecordLog`) or in memory (`RecordList`). Keys are unique."""

    keys: set[tuple[str, int]]

    def append(self, records: Iterable[Any]) -> None:
        """Appends the records whose keys are new."""


class RecordLog:
    """An append-only JSON-lines file of records with unique keys, with which a killed run can resume.

    Opening it removes an incomplete last line. `append` writes a batch in one call and skips records whose key exists,
    so that there are no duplicates.

    Attributes:
        path: The file.
        keys: The keys of the saved records.

    Raises:
        UserError: A line is not a record. The message says how to replace it.
    """

    def __init__(self, path: Path, model: type[AnswerRecord]) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _check_not_endless(path)
            drop_incomplete_line(path)
        try:
            self.keys = {record.key for record in read_records(path, model)} if path.exists() else set()
        except UserError as error:
            raise error.with_fix("Delete this line and run the same command again.") from None

    def append(self, records: Iterable[AnswerRecord]) -> None:
        """Appends the records with new keys in one write, and syncs the file to disk."""
        new_records = [record for record in records if record.key not in self.keys]
        if not new_records:
            return
        with self.path.open("ab") as handle:
            handle.write("".join(dump_record(record) for record in new_records).encode("utf-8"))
            handle.flush()
            os.fsync(handle.fileno())
        self.keys.update(record.key for record in new_records)


class RecordList(Generic[AnswerType]):
    """Records with unique keys in memory.

    Attributes:
        records: The records in the order in which they were appended.
        keys: The keys of the records.
    """

    def __init__(self) -> None:
        self.records: list[AnswerType] = []
        self.keys: set[tuple[str, int]] = set()

    def append(self, records: Iterable[AnswerType]) -> None:
        """Appends the records with new keys."""
        for record in records:
            if record.key not in self.keys:
                self.records.append(record)
                self.keys.add(record.key)


def drop_incomplete_line(path: Path) -> None:
    """Truncates a file after its last line break. A process that was killed may have written part of a line."""
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
    """Returns the SHA-256 of a text in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def digest_json(value: object) -> str:
    """Returns the SHA-256 of a JSON value in hexadecimal. The order of keys has no influence."""
    return digest_text(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str))


def digest_file(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest_model(path: Path) -> str:
    """Returns the SHA-256 of a model folder in hexadecimal.

    It covers the names and bytes of the weights, configuration, tokenizer and chat template, but not the folder's path.
    """
    suffixes = {".safetensors", ".json", ".jinja", ".model", ".txt"}
    files = sorted(
        file for file in path.iterdir() if file.is_file() and file.suffix in suffixes and file.name != MANIFEST
    )
    return digest_json({file.name: digest_file(file) for file in files})
