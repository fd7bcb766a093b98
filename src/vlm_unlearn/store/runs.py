"""Folders of runs: manifests, locks, what was built once, and the cache folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vlm_unlearn.errors import UserError
from vlm_unlearn.store.files import read_json, user_path, write_json

PACKAGES = ("vlm-unlearn", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "pillow")


def cache_folder() -> Path:
    """The folder for trained tiny bases and reference values: ``$VLM_UNLEARN_CACHE``, else the platform's cache folder."""
    from platformdirs import user_cache_path

    moved = os.environ.get("VLM_UNLEARN_CACHE")
    return user_path(moved) if moved else user_cache_path("vlm-unlearn")


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
    status = Path("/proc/self/status")
    if (
        status.is_file()
    ):  # Linux, where the next way would count what the process that started this one held at that moment
        found = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        if found:
            return int(found[0]) // 1024
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
        UserError: the folder's manifest has another identity, or the folder holds files but no manifest.
    """
    path = folder / "manifest.json"
    resolved = json.loads(json.dumps(identity, default=str))
    validate_same_run(folder)
    if path.exists():
        manifest = read_manifest(folder)
        if manifest["identity"] != resolved:
            changed = ", ".join(_differences(manifest["identity"], resolved))
            raise UserError(
                f"{folder}: holds another run (different: {changed}); choose another output folder or delete this one"
            )
        return manifest
    manifest = {
        "schema": 1,
        "identity": resolved,
        "versions": package_versions(),
        "wall_seconds": 0.0,
        "finished": False,
    }
    write_json(path, manifest)
    return manifest


def validate_same_run(folder: Path) -> None:
    """Refuses to make a run folder where something else is.

    Raises:
        UserError: a file is there, or a folder with other things than a run.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, not a folder; choose another output folder")
    if (
        folder.exists()
        and not (folder / "manifest.json").exists()
        and any(not entry.name.startswith(".") for entry in folder.iterdir())
    ):
        raise UserError(f"{folder}: is not empty and holds no manifest.json; choose another output folder")


def read_manifest(folder: Path) -> dict[str, Any]:
    """A run folder's manifest.

    Raises:
        UserError: it is missing or was edited into something else.
    """
    manifest = read_json(folder / "manifest.json")
    whole = (
        isinstance(manifest, dict)
        and isinstance(manifest.get("identity"), dict)
        and isinstance(manifest.get("finished"), bool)
    )
    if not whole or not _amount(manifest.get("wall_seconds")) or not _amount(manifest.get("peak_memory_mb", 0)):
        raise UserError(f"{folder / 'manifest.json'}: is not a run's manifest; choose another folder")
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


def describe_path(path: Path) -> str:
    """``'; it is a training run: ...'``: what lies at a path where something else was wanted, as far as it can be told."""
    if not path.exists():
        return "; there is nothing of that name"
    if (path / "dataset.json").is_file():
        return "; it is a training set, for train's data="
    if any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        return "; it is a model folder, for model="
    try:
        kind = read_manifest(path)["identity"].get("kind")
    except UserError:
        return ""
    return f"; it {_WRITTEN_BY[kind].format(path, path)}" if kind in _WRITTEN_BY else ""


def record_cost(
    folder: Path, wall_seconds: float, finished: bool = False, ended: Mapping[str, object] | None = None
) -> None:
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
        UserError: as `lock_folder` and `validate_same_run`.
    """
    validate_same_run(folder)
    with lock_folder(folder):
        yield


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Makes a folder and holds it for this process; the system lets go of it when the process ends, however it ends.

    Raises:
        UserError: another process is at work in the folder, or the folder can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; choose another output folder") from None
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"{folder}: another process is at work in this folder") from None


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
def build_atomically(folder: Path) -> Iterator[Path | None]:
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
