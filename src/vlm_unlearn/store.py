"""Run folders: atomic files, append-only JSON lines that survive kill -9, manifests, digests and the cache folder."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO, TypeVar

from filelock import FileLock, Timeout
from pydantic import BaseModel, ValidationError

from vlm_unlearn.errors import RequestError, shown
from vlm_unlearn.records import AnswerRecord

Model = TypeVar("Model", bound=BaseModel)
PACKAGES = ("vlm-unlearn", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "pillow")


def cache_folder() -> Path:
    """The folder for trained tiny bases and reference values: ``$VLM_UNLEARN_CACHE``, else the platform's cache folder."""
    from platformdirs import user_cache_path

    moved = os.environ.get("VLM_UNLEARN_CACHE")
    return Path(os.path.expanduser(moved)) if moved else user_cache_path("vlm-unlearn")


@contextmanager
def writing(path: Path) -> Iterator[TextIO]:
    """A text file to write, of any size, so that a reader, or a kill at any moment, sees the old content or the new, never a part.

    A link is followed. A lone surrogate, which no UTF-8 file can hold, is written as ``?``.

    Raises:
        RequestError: a folder, or something else than a file, is there, or the file can't be made.
    """
    _refuse_special(path)
    target = path.resolve() if path.is_symlink() else path
    part = target.with_name(f".{target.name[:100]}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _delete_parts_of_the_dead(target)
        handle = part.open("w", encoding="utf-8", errors="replace", newline="")
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}; choose another output") from None
    try:
        with handle:
            yield handle
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _delete_parts_of_the_dead(target: Path) -> None:
    """Deletes what processes that were killed while they wrote this file have left."""
    for part in target.parent.glob(f".{glob.escape(target.name[:100])}.*.part"):
        pid = part.suffixes[-2][1:] if len(part.suffixes) > 1 else ""
        if pid.isdecimal() and part.is_file() and not _alive(int(pid)):
            part.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    import psutil

    return bool(psutil.pid_exists(pid))


def _refuse_special(path: Path) -> None:
    if path.is_dir():
        raise RequestError(f"{path}: is a folder; name a file to write")
    if path.exists() and not path.is_file():
        raise RequestError(f"{path}: is a device or a pipe; name a file to write")


def _refuse_endless(path: Path) -> None:
    """Refuses what reading may never come to an end of."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise RequestError(f"{path}: is a device or a pipe; a file is wanted")


def refuse_overwriting(outputs: Iterable[Path], inputs: Iterable[str | Path | None]) -> None:
    """Looks before anything is written that no output is an input, under whatever name.

    Raises:
        RequestError: one is, or a folder or a device stands where a file is to be written.
    """
    known = [Path(source) for source in inputs if source is not None]
    for out in outputs:
        _refuse_special(out)
        for source in known:
            if out.exists() and source.exists() and out.samefile(source):
                raise RequestError(f"{out}: is an input too; choose another output")


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically."""
    with writing(path) as handle:
        handle.write(without_surrogates(text))


def without_surrogates(text: str) -> str:
    """The text with lone surrogates, which no UTF-8 file can hold, replaced by U+FFFD."""
    return text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")


def write_json(path: Path, value: object) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        RequestError: the file is missing, or is not JSON; the line is named.
    """
    _refuse_endless(path)
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: byte {error.start} is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise RequestError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise RequestError(f"{path}: nested too deeply to be data") from None
    except ValueError as error:  # a number of thousands of digits
        raise RequestError(f"{path}: {error}") from None


def read_records(path: Path, model: type[Model]) -> Iterator[Model]:
    """Yields the records of a JSON-lines file.

    Raises:
        RequestError: the file is missing or a line is not such a record; the line and the field are named.
    """
    _refuse_endless(path)
    try:
        handle = path.open(encoding="utf-8-sig")
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from None
    with handle:
        try:
            for number, line in enumerate(handle, start=1):
                if line.strip():
                    yield _parse(model, line, f"{path}: line {number}")
        except UnicodeDecodeError:
            raise RequestError(f"{path}: not UTF-8 text") from None


def _parse(model: type[Model], line: str, where: str) -> Model:
    try:
        return model.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(shown(part)[1:-1] for part in first["loc"])
        raise RequestError(f"{where}: {field + ': ' if field else ''}{first['msg']}") from None


def dump_record(record: BaseModel) -> str:
    """One JSON line."""
    return without_surrogates(json.dumps(record.model_dump(mode="python", by_alias=True), ensure_ascii=False)) + "\n"


def write_records(path: Path, records: Iterable[BaseModel]) -> int:
    """Writes a whole JSON-lines file atomically; returns how many records it holds."""
    count = 0
    with writing(path) as handle:
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
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in wanted and path.name != "manifest.json")
    return digest_json({path.name: digest_file(path) for path in files})


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that numbers depend on."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def peak_memory_mb() -> int:
    """Peak resident memory of this process so far, in MiB (0 where the platform doesn't tell)."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1024 * 1024 if sys.platform == "darwin" else 1024)


def open_run(folder: Path, identity: Mapping[str, object]) -> dict[str, Any]:
    """Starts or resumes a run folder and returns its manifest.

    `identity` is everything that decides the run's results. A folder that holds another run is refused, so that two
    experiments are never mixed in one file.

    Raises:
        RequestError: the folder's manifest has another identity, or the folder holds files but no manifest.
    """
    path = folder / "manifest.json"
    resolved = json.loads(json.dumps(identity, default=str))
    refuse_foreign(folder)
    if path.exists():
        manifest = read_manifest(folder)
        if manifest["identity"] != resolved:
            changed = ", ".join(_differences(manifest["identity"], resolved))
            raise RequestError(f"{folder}: holds another run (different: {changed}); choose another output folder or delete this one")
        return manifest
    manifest = {"schema": 1, "identity": resolved, "versions": package_versions(), "wall_seconds": 0.0, "finished": False}
    write_json(path, manifest)
    return manifest


def refuse_foreign(folder: Path) -> None:
    """Refuses to make a run folder where something else is.

    Raises:
        RequestError: a file is there, or a folder with other things than a run.
    """
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder}: is a file, not a folder; choose another output folder")
    if folder.exists() and not (folder / "manifest.json").exists() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise RequestError(f"{folder}: is not empty and holds no manifest.json; choose another output folder")


def read_manifest(folder: Path) -> dict[str, Any]:
    """A run folder's manifest.

    Raises:
        RequestError: it is missing or was edited into something else.
    """
    manifest = read_json(folder / "manifest.json")
    whole = isinstance(manifest, dict) and isinstance(manifest.get("identity"), dict) and isinstance(manifest.get("finished"), bool)
    if not whole or not _amount(manifest.get("wall_seconds")) or not _amount(manifest.get("peak_memory_mb", 0)):
        raise RequestError(f"{folder / 'manifest.json'}: is not a run's manifest; choose another folder")
    return dict(manifest)


def _amount(value: object) -> bool:
    """Whether it is a number that can be reckoned with: JSON holds integers of any length, and Python's reads NaN and Infinity."""
    return isinstance(value, int | float) and 0 <= value < 1e15  # false for NaN


_WRITTEN_BY = {
    "train": "is a training run: `vlm-unlearn evaluate SUITE model={} --out DIR` evaluates it, `vlm-unlearn export {} --out DIR` ships it",
    "evaluate": "is an evaluation, which judge, score and compare read",
    "attack search": "is an attack search",
    "demo": "is a demo: its training runs are in its folder runs, its evaluations in its folder evaluations",
}


def what_it_is(path: Path) -> str:
    """``'; it is a training run: ...'``: what lies at a path where something else was wanted, as far as it can be told."""
    if not path.exists():
        return "; there is nothing of that name"
    if (path / "dataset.json").is_file():
        return "; it is a training set, for train's data="
    if any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        return "; it is a model folder, for model="
    try:
        kind = read_manifest(path)["identity"].get("kind")
    except RequestError:
        return ""
    return f"; it {_WRITTEN_BY[kind].format(path, path)}" if kind in _WRITTEN_BY else ""


def note_cost(folder: Path, wall_seconds: float, finished: bool = False, ended: Mapping[str, object] | None = None) -> None:
    """Adds wall time to a run's manifest, notes the process's peak memory so far, and marks the run finished.

    `ended` says how it ended: optimizer steps, why it stopped. Time after the last note before a kill is lost: the cost is a lower
    bound for a run that was killed.
    """
    manifest = read_manifest(folder)
    manifest["wall_seconds"] = round(manifest["wall_seconds"] + wall_seconds, 3)
    manifest["peak_memory_mb"] = max(manifest.get("peak_memory_mb", 0), peak_memory_mb())
    manifest["finished"] = manifest["finished"] or finished
    manifest.update(ended or {})
    write_json(folder / "manifest.json", manifest)


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Holds a run folder as `lock_folder` does.

    Raises:
        RequestError: as `lock_folder` and `refuse_foreign`.
    """
    refuse_foreign(folder)
    with lock_folder(folder):
        yield


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Makes a folder and holds it for this process; the system lets go of it when the process ends, however it ends.

    Raises:
        RequestError: another process is at work in the folder, or the folder can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{folder}: {error.strerror}; choose another output folder") from None
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise RequestError(f"{folder}: another process is at work in this folder") from None


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted(set(old) | set(new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}")
    return found


@contextmanager
def build_once(folder: Path) -> Iterator[Path | None]:
    """Builds `folder` at most once, safe under several processes and a kill at any moment.

    Yields a scratch folder to fill, which becomes `folder` when the block ends without an error, or None when `folder` is
    there already. Other processes wait for the one that builds.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.exists():
            yield None
            return
        scratch = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        yield scratch
        os.replace(scratch, folder)
